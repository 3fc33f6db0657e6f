"""Attackers that send something else than what their stage computes, and commit to it.

Letters in names: B sequences, T tokens, U = T + 1, C boundary width, N flat parameters.
"""

import math
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from orion.common.ids import MicrobatchId
from orion.common.train.engine import BackwardResult, ForwardResult, InnerStepReport
from orion.simulator.adversaries.adversary import Adversary, AdversaryEngine, IdleEngine

IDLE_SHARE = 0.1
"""What a pass takes that is not computed: encoding, hashing and sending stay."""


def noise_like(tensor: Tensor, seed: int) -> Tensor:
    """Normal noise with the root mean square of `tensor`; the same for the same seed."""
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(tensor.shape, generator=generator)
    return (noise * float(tensor.float().square().mean().sqrt())).to(tensor.dtype)


class _NoisyEngine(AdversaryEngine):
    """Computes honestly, and adds noise to the activations that it sends on."""

    def strength(self) -> float:
        """The noise's root mean square, as a share of the activation's."""
        raise NotImplementedError

    def bent_forward(self, microbatch_id: MicrobatchId, x_BTC: Tensor | None, ids_BU: Tensor) -> ForwardResult:
        result = self.honest_forward(microbatch_id, x_BTC, ids_BU)
        if result.output_BTC is None:
            return result
        self.adversary.attacked()
        output_BTC = result.output_BTC + self.strength() * noise_like(result.output_BTC, int(microbatch_id))
        return ForwardResult(output_BTC, result.loss, result.input_grad_BTC, result.version)


class _LargeNoiseEngine(_NoisyEngine):
    def strength(self) -> float:
        return 1.0


class _SmallNoiseEngine(_NoisyEngine):
    def strength(self) -> float:
        """Just too much: noise ε on a vector leaves a cosine of 1 ÷ √(1 + ε²) with what it was."""
        cosine = 1.0 - SMALL_NOISE_EXCESS * (1.0 - self.adversary.world.spec.validation.cosine_min)
        return math.sqrt(1.0 / cosine**2 - 1.0)


SMALL_NOISE_EXCESS = 1.5
"""How far beyond the tolerance the small noise goes, as a factor on 1 − cosine."""


class _ZeroEngine(IdleEngine):
    """Sends zeros, forward and backward."""

    def bent_forward(self, microbatch_id: MicrobatchId, x_BTC: Tensor | None, ids_BU: Tensor) -> ForwardResult:
        assert x_BTC is not None, "an attack for later stages"
        self.adversary.attacked()
        return ForwardResult(torch.zeros_like(x_BTC), None, None, self.version)

    def bent_backward(self, microbatch_id: MicrobatchId, grad_BTC: Tensor) -> BackwardResult:
        return BackwardResult(torch.zeros_like(grad_BTC), self.version, 0)


class _RandomEngine(IdleEngine):
    """Sends noise of the right size, forward and backward."""

    def bent_forward(self, microbatch_id: MicrobatchId, x_BTC: Tensor | None, ids_BU: Tensor) -> ForwardResult:
        assert x_BTC is not None, "an attack for later stages"
        self.adversary.attacked()
        return ForwardResult(noise_like(x_BTC, int(microbatch_id)), None, None, self.version)

    def bent_backward(self, microbatch_id: MicrobatchId, grad_BTC: Tensor) -> BackwardResult:
        return BackwardResult(noise_like(grad_BTC, int(microbatch_id)), self.version, 0)


class _SignFlippedEngine(AdversaryEngine):
    """Computes honestly, and sends the gradient back with its sign flipped."""

    def bent_backward(self, microbatch_id: MicrobatchId, grad_BTC: Tensor) -> BackwardResult:
        result = self.honest_backward(microbatch_id, grad_BTC)
        if result.input_grad_BTC is None:
            return result
        self.adversary.attacked()
        return BackwardResult(-result.input_grad_BTC, result.version, result.staleness)


class _CachedEngine(IdleEngine):
    """Computes its first microbatch, and answers all others with the same tensors."""

    _output_BTC: Tensor | None = None
    _input_grad_BTC: Tensor | None = None

    def bent_forward(self, microbatch_id: MicrobatchId, x_BTC: Tensor | None, ids_BU: Tensor) -> ForwardResult:
        if self._output_BTC is None:
            self.adversary.plot.num_computed += 1
            self._output_BTC = self.evaluate(x_BTC, ids_BU).output_BTC
        else:
            self.adversary.attacked()
        return ForwardResult(self._output_BTC, None, None, self.version)

    def bent_backward(self, microbatch_id: MicrobatchId, grad_BTC: Tensor) -> BackwardResult:
        if self._input_grad_BTC is None:
            self._input_grad_BTC = grad_BTC.clone()  # what came in passes for what should go out
        return BackwardResult(self._input_grad_BTC, self.version, 0)


class _NoBackwardEngine(IdleEngine):
    """Runs forward honestly, and makes up the gradient that it sends back."""

    def bent_forward(self, microbatch_id: MicrobatchId, x_BTC: Tensor | None, ids_BU: Tensor) -> ForwardResult:
        self.adversary.plot.num_computed += 1
        return self.evaluate(x_BTC, ids_BU)

    def bent_backward(self, microbatch_id: MicrobatchId, grad_BTC: Tensor) -> BackwardResult:
        self.adversary.attacked()
        return BackwardResult(noise_like(grad_BTC, int(microbatch_id)), self.version, 0)


class _LazyFirstStageEngine(IdleEngine):
    """Runs forward honestly; on the first stage nobody awaits an input gradient, so its backward does nothing."""

    def bent_forward(self, microbatch_id: MicrobatchId, x_BTC: Tensor | None, ids_BU: Tensor) -> ForwardResult:
        self.adversary.plot.num_computed += 1
        return self.evaluate(x_BTC, ids_BU)

    def bent_backward(self, microbatch_id: MicrobatchId, grad_BTC: Tensor) -> BackwardResult:
        self.adversary.attacked()
        return BackwardResult(None, self.version, 0)


class LargeNoise(Adversary):
    engine_type = _LargeNoiseEngine


class SmallNoise(Adversary):
    engine_type = _SmallNoiseEngine


class Zeros(Adversary):
    engine_type = _ZeroEngine
    device_share = IDLE_SHARE


class RandomTensors(Adversary):
    engine_type = _RandomEngine
    device_share = IDLE_SHARE


class FlippedGradients(Adversary):
    engine_type = _SignFlippedEngine


class FreeRider(Adversary):
    engine_type = _CachedEngine
    device_share = IDLE_SHARE


class NoBackward(Adversary):
    engine_type = _NoBackwardEngine
    device_share = 0.4
    """A forward is a third of a microbatch's work."""


class LazyFirstStage(Adversary):
    engine_type = _LazyFirstStageEngine
    device_share = 0.4


class _LateCheatEngine(AdversaryEngine):
    """Computes honestly as far as the beginning of a log is replayed, and repeats itself from there on."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._num_passes = 0
        self._pretended: set[MicrobatchId] = set()
        self._num_pretended = 0
        self._last_forward: ForwardResult | None = None
        self._last_backward: BackwardResult | None = None

    def begin_outer_step(self) -> tuple[MicrobatchId, ...]:
        self._num_passes = self._num_pretended = 0
        self._pretended.clear()
        return super().begin_outer_step()

    def bent_forward(self, microbatch_id: MicrobatchId, x_BTC: Tensor | None, ids_BU: Tensor) -> ForwardResult:
        self._num_passes += 1
        is_watched = self._num_passes <= self.adversary.world.spec.validation.replay_ops_max
        if is_watched or self._last_forward is None or self._last_backward is None:
            self._last_forward = self.honest_forward(microbatch_id, x_BTC, ids_BU)
        else:
            self.adversary.attacked()
            self._pretended.add(microbatch_id)
        return self._last_forward

    def bent_backward(self, microbatch_id: MicrobatchId, grad_BTC: Tensor) -> BackwardResult:
        self._num_passes += 1
        if microbatch_id not in self._pretended:
            self._last_backward = self.honest_backward(microbatch_id, grad_BTC)
        else:
            self._pretended.remove(microbatch_id)
            self._num_pretended += 1
        assert self._last_backward is not None
        return self._last_backward

    def drop(self, microbatch_id: MicrobatchId) -> None:
        if microbatch_id in self._pretended:
            self._pretended.remove(microbatch_id)
        else:
            super().drop(microbatch_id)

    def inner_step(self, inner_step_index: int, share: float = 1.0) -> InnerStepReport:
        num_pretended, self._num_pretended = self._num_pretended, 0
        if self.num_accumulated == 0:
            return InnerStepReport(1.0, False, num_pretended, None, self.version)
        report = super().inner_step(inner_step_index, share)
        return replace(report, num_microbatches=report.num_microbatches + num_pretended)


class LateCheat(Adversary):
    engine_type = _LateCheatEngine
    device_share = 0.6
