"""`StageEngine`: the arithmetic of one stage on one device. Miner and validator run the same one.

It owns the fp32 master parameters (through the stage), the inner optimizer, the outer state, and what microbatches
between their forward and their backward hold. It knows no peers, clock or network, and one thread calls it: what it
computes is a function of the loaded outer state and the sequence of calls alone. On the same build with one thread
that holds bit for bit, so a validator can repeat a miner's calls and compare bytes; elsewhere it compares within
measured noise.

Versions. The optimizer changes the master parameters in place, but nothing computes with those: after each inner step
the engine publishes a *version*, a new set of compute parameters (bf16 where the device is good at it) that is never
written to. A forward computes with the newest version and what it holds keeps that version alive: the graph, or, once
`graphs_max` graphs are kept, the stage's input and the version itself, from which backward recomputes. So a gradient
is always the exact one of the forward whose output was sent, however many inner steps came between; only its
application is late, by `staleness` steps. Recomputing with the newest parameters instead would give a gradient of
something that no other stage ever saw. The caller's credits bound what is held, and so the versions alive;
`num_versions` reports them.

Invariants: a microbatch id is held at most once; its gradient enters the accumulators at most once; what is not
finite enters nothing. Tensors cross the boundary on the host in the run's wire dtype, cast explicitly at both ends,
so that a replay reads the bytes that the miner read.

Letters in names: B sequences, T tokens, U = T + 1 (a token more, for the targets), C boundary width, V vocabulary,
N flat parameters.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.func import functional_call

from orion.common.errors import OrionError
from orion.common.ids import MicrobatchId
from orion.common.model.params import flatten_params, load_flat_params, matrix_params, project_params
from orion.common.model.stage import Stage, token_loss
from orion.common.train.config import InnerConfig, OuterConfig
from orion.common.train.inner import build_inner_optimizer, clip_in_place, clip_share
from orion.common.train.outer import OuterState, apply_outer_step
from orion.common.train.schedule import learning_rate_factor

_HOST = torch.device("cpu")


class EngineUseError(OrionError, ValueError):
    """The caller broke the order of calls: a microbatch id held twice or not at all, an input missing or too much."""


class NonFiniteError(OrionError, ArithmeticError):
    """A forward or backward gave infinities or NaN; the engine let go of the microbatch and accumulated nothing."""


@dataclass(frozen=True, slots=True, eq=False)
class ForwardResult:
    """What a forward gave. The last stage has no output but a loss, and, unless it is the first too, an input
    gradient."""

    output_BTC: Tensor | None
    """For the next stage: on the host, wire dtype."""
    loss: float | None
    """Nats per token."""
    input_grad_BTC: Tensor | None
    """For the stage before: on the host, wire dtype."""
    version: int
    """Inner steps of this outer step that the parameters had seen."""


@dataclass(frozen=True, slots=True, eq=False)
class BackwardResult:
    """What a backward gave."""

    input_grad_BTC: Tensor | None
    """For the stage before, on the host in wire dtype; None on the first stage."""
    version: int
    """That of the microbatch's forward."""
    staleness: int
    """Inner steps taken between the microbatch's forward and its backward."""


@dataclass(frozen=True, slots=True)
class InnerStepReport:
    """What an inner step did."""

    grad_norm: float
    """Of this stage's mean gradient before clipping; not finite when the step was refused."""
    clipped: bool
    num_microbatches: int
    """Whose gradients were in it; they are used up, also by a refused step."""
    refused_reason: str | None
    """Why the parameters were left as they were; None when the step was taken."""
    version: int
    """The newest version, after this step."""


@dataclass(frozen=True, slots=True, eq=False)
class Version:
    number: int
    params: Mapping[str, Tensor]


@dataclass(frozen=True, slots=True, eq=False)
class _Held:
    """A microbatch between forward and backward."""

    version: Version
    ids_BT: Tensor
    x_BTC: Tensor | None
    """The stage's input; with a graph, the leaf that it begins at."""
    graph_BTC: Tensor | None = None
    """The stage's output with its graph; None when backward must recompute it."""


class StageEngine:
    """Computes one stage. Call `load` and `begin_outer_step` before anything else."""

    def __init__(
        self,
        stage: Stage,
        *,
        inner: InnerConfig,
        outer: OuterConfig,
        total_params: int,
        device: torch.device,
        compute_dtype: torch.dtype,
        wire_dtype: torch.dtype,
        graphs_max: int,
    ) -> None:
        """Takes over `stage` and moves it to `device`.

        `total_params` counts the whole model, for the stage's share of the gradient bound. `graphs_max` bounds the
        microbatches whose graph is kept; beyond it backward recomputes (0 = always).
        """
        self._stage = stage.to(device=device, dtype=torch.float32)
        self._is_first, self._is_last = stage.layout.is_first, stage.layout.is_last
        self._inner, self._outer = inner, outer
        self._device, self._compute_dtype, self._wire_dtype = device, compute_dtype, wire_dtype
        self._graphs_max = graphs_max
        self._master = {name: param.detach() for name, param in self._stage.named_parameters()}
        self._optimizer = build_inner_optimizer(self._master, matrix_params(self._stage), inner)
        num_params = sum(param.numel() for param in self._master.values())
        self._norm_bound = clip_share(num_params, total_params, inner.clip_norm)
        self._gradient_sums: list[Tensor] = []
        """fp32, in the order of the parameters, each microbatch weighted by its tokens ÷ those of the first; empty
        while nothing is accumulated."""
        self._num_accumulated = 0
        self._accumulated_tokens = 0
        self._first_tokens = 0
        """Of the first microbatch in the sums."""
        self._held: dict[MicrobatchId, _Held] = {}
        self._state: OuterState | None = None
        self._ahead_N: Tensor | None = None
        """Where the outer step was begun while its anchor was not known yet: fp32, where the outer state lies."""
        self._version = self._publish(0)

    @property
    def outer_state(self) -> OuterState:
        """The outer state that was loaded or applied last."""
        if self._state is None:
            raise EngineUseError("no outer state was loaded")
        return self._state

    @property
    def is_ahead(self) -> bool:
        """Whether the outer step was begun before its anchor was there, which has not come yet."""
        return self._ahead_N is not None

    @property
    def version(self) -> int:
        """Inner steps taken since the outer step began."""
        return self._version.number

    @property
    def num_held(self) -> int:
        """Microbatches between their forward and their backward."""
        return len(self._held)

    @property
    def num_graphs(self) -> int:
        """Microbatches among them whose graph is kept."""
        return sum(held.graph_BTC is not None for held in self._held.values())

    @property
    def num_versions(self) -> int:
        """Versions of the compute parameters that are alive, the newest included."""
        return len({self._version, *(held.version for held in self._held.values())})

    @property
    def num_accumulated(self) -> int:
        """Microbatches whose gradients wait for the next inner step."""
        return self._num_accumulated

    def load(self, state: OuterState) -> None:
        """Makes `state` the engine's outer state (kept where it lies) and its anchor the local parameters.

        Raises ValueError when it is of another length than the stage.
        """
        load_flat_params(self._stage, state.anchor_N)
        self._state = state
        self._ahead_N = None
        self._version = self._publish(self._version.number)

    def begin_ahead(self, start_N: Tensor) -> tuple[MicrobatchId, ...]:
        """Begins an outer step, as `begin_outer_step` does, at `start_N` while its anchor is not known yet.

        `start_N` is flat fp32 where the outer state lies; nobody writes into it. `take_merged` must come before the
        pseudo-gradient is asked for. Returns what `begin_outer_step` does.
        """
        load_flat_params(self._stage, start_N)
        self._ahead_N = start_N
        self._version = self._publish(self._version.number)
        return self.begin_outer_step()

    def take_merged(self, state: OuterState) -> None:
        """The anchor of the outer step that was begun ahead is there: adds what it differs by from where that began.

        What was done since then stays, with all that is held and accumulated. Raises EngineUseError when the outer step
        was not begun ahead, ValueError when the state is of another length than the stage.
        """
        if self._ahead_N is None:
            raise EngineUseError("the outer step was not begun ahead of its anchor")
        shift_N = torch.sub(state.anchor_N, self._ahead_N)
        local_N = flatten_params(self._stage).to(shift_N.device)
        load_flat_params(self._stage, torch.add(local_N, shift_N))
        self._state, self._ahead_N = state, None
        self._version = self._publish(self._version.number)

    def begin_outer_step(self) -> tuple[MicrobatchId, ...]:
        """Starts over: no microbatches, no gradients, version 0 and, unless the config keeps it, no optimizer state.

        Returns the ids of microbatches that were still held and are now lost, in the order of their forwards.
        """
        lost = tuple(self._held)
        self._held.clear()
        self._clear_gradients()
        if self._inner.inner_state == "reset":
            self._optimizer.reset()
        self._version = Version(0, self._version.params)
        return lost

    def pseudo_gradient_N(self) -> Tensor:
        """Anchor minus local parameters: fp32, where the outer state lies. Finite, since only finite steps are
        taken. Raises EngineUseError while the outer step's anchor is not known."""
        state = self.outer_state
        if self._ahead_N is not None:
            raise EngineUseError("the outer step was begun ahead of its anchor, which has not come yet")
        return torch.sub(state.anchor_N, flatten_params(self._stage).to(state.anchor_N.device))

    def apply_outer(self, mean_N: Tensor) -> OuterState:
        """Applies the mean pseudo-gradient to the outer state and restarts the local parameters from its new anchor.

        Raises ValueError when `mean_N` does not fit the outer state. Call `begin_outer_step` next.
        """
        state = apply_outer_step(self.outer_state, mean_N, self._outer)
        self.load(state)
        return state

    def forward(self, microbatch_id: MicrobatchId, x_BTC: Tensor | None, ids_BU: Tensor) -> ForwardResult:
        """Runs the stage with the newest version, and on the last stage loss and backward too.

        `x_BTC` is the stage before's output in wire dtype, None on the first stage; `ids_BU` int64. Other stages than
        the last hold the microbatch until `backward` or `drop`. Raises EngineUseError for an id that is held already
        or an input that does not fit, NonFiniteError when the result is not finite.
        """
        if microbatch_id in self._held:
            raise EngineUseError(f"microbatch {microbatch_id} is held already")
        self._require_input(x_BTC)
        ids_BU = ids_BU.to(self._device)
        x_BTC = None if x_BTC is None else self._receive(x_BTC)
        if self._is_last:
            return self._forward_and_backward(microbatch_id, x_BTC, ids_BU)
        keeps_graph = self.num_graphs < self._graphs_max
        held = _Held(self._version, ids_BU[:, :-1], _leaf(x_BTC, requires_grad=keeps_graph))
        with torch.set_grad_enabled(keeps_graph):
            output_BTC = self._run(held)
        sent_BTC = self._send(microbatch_id, output_BTC)
        self._held[microbatch_id] = replace(held, graph_BTC=output_BTC) if keeps_graph else held
        return ForwardResult(sent_BTC, None, None, held.version.number)

    def backward(self, microbatch_id: MicrobatchId, grad_BTC: Tensor) -> BackwardResult:
        """Accumulates the parameter gradients of a held microbatch, lets go of it, and gives the gradient of its input.

        `grad_BTC` is the gradient of what `forward` returned, in wire dtype. Raises EngineUseError for an id that is
        not held or a gradient that does not fit, NonFiniteError when the result is not finite.
        """
        held = self._held.get(microbatch_id)
        if held is None:
            raise EngineUseError(f"microbatch {microbatch_id} is not held")
        if held.graph_BTC is None:
            held = replace(held, x_BTC=_leaf(held.x_BTC, requires_grad=True))
        output_BTC = self._run(held) if held.graph_BTC is None else held.graph_BTC
        if grad_BTC.dtype != self._wire_dtype or grad_BTC.shape != output_BTC.shape:
            raise EngineUseError(
                f"gradient is {grad_BTC.dtype} of shape {tuple(grad_BTC.shape)}, "
                f"expected {self._wire_dtype} of shape {tuple(output_BTC.shape)}"
            )
        del self._held[microbatch_id]
        input_grad_BTC = self._accumulate(microbatch_id, held, output_BTC, self._receive(grad_BTC))
        return BackwardResult(input_grad_BTC, held.version.number, self._version.number - held.version.number)

    def drop(self, microbatch_id: MicrobatchId) -> None:
        """Lets go of a held microbatch without using it. Raises EngineUseError for an id that is not held."""
        if self._held.pop(microbatch_id, None) is None:
            raise EngineUseError(f"microbatch {microbatch_id} is not held")

    @torch.no_grad()
    def evaluate(self, x_BTC: Tensor | None, ids_BU: Tensor) -> ForwardResult:
        """Runs the stage with the newest version and holds nothing; the arguments and errors are those of `forward`."""
        self._require_input(x_BTC)
        ids_BU = ids_BU.to(self._device)
        x_BTC = None if x_BTC is None else self._receive(x_BTC)
        output = self._run(_Held(self._version, ids_BU[:, :-1], x_BTC))
        if self._is_last:
            return ForwardResult(None, float(token_loss(output, ids_BU[:, 1:])), None, self._version.number)
        return ForwardResult(output.to(_HOST, self._wire_dtype), None, None, self._version.number)

    def inner_step(self, inner_step_index: int, share: float = 1.0) -> InnerStepReport:
        """One optimizer update from the token-weighted mean of the accumulated gradients, which it uses up.

        `inner_step_index` counts inner steps from the start of the run and sets the learning rate. `share`, in (0, 1],
        scales it: the part of a full batch that was accumulated. A mean that is not finite is refused: the parameters
        stay as they are, and the report says why. Raises EngineUseError when nothing was accumulated.
        """
        if self._num_accumulated == 0:
            raise EngineUseError("no gradients are accumulated")
        num_microbatches = self._num_accumulated
        mean_scale = self._first_tokens / self._accumulated_tokens
        norm = clip_in_place(self._gradient_sums, self._norm_bound, mean_scale)
        if norm.is_finite:
            gradients = dict(zip(self._master, self._gradient_sums, strict=True))
            self._optimizer.step(gradients, share * learning_rate_factor(self._inner.schedule, inner_step_index))
            project_params(self._stage)
            self._version = self._publish(self._version.number + 1)
        self._clear_gradients()
        refused_reason = None if norm.is_finite else "the gradient is not finite"
        return InnerStepReport(norm.norm, norm.clipped, num_microbatches, refused_reason, self._version.number)

    def _forward_and_backward(self, microbatch_id: MicrobatchId, x_BTC: Tensor | None, ids_BU: Tensor) -> ForwardResult:
        held = _Held(self._version, ids_BU[:, :-1], _leaf(x_BTC, requires_grad=True))
        loss = token_loss(self._run(held), ids_BU[:, 1:])
        input_grad_BTC = self._accumulate(microbatch_id, held, loss, None)
        return ForwardResult(None, float(loss.detach()), input_grad_BTC, held.version.number)

    def _accumulate(
        self, microbatch_id: MicrobatchId, held: _Held, output: Tensor, output_grad: Tensor | None
    ) -> Tensor | None:
        """Differentiates `output`, adds up the parameters' gradients, and returns the input's as it is to be sent."""
        params = list(held.version.params.values())
        sources = params if held.x_BTC is None else [*params, held.x_BTC]
        gradients = torch.autograd.grad(output, sources, output_grad)
        if not bool(output.detach().isfinite().all()):
            raise NonFiniteError(f"microbatch {microbatch_id}: the stage's output is not finite")
        input_grad_BTC = None if held.x_BTC is None else self._send(microbatch_id, gradients[-1])
        self._add_up(gradients[: len(params)], held.ids_BT.numel())
        return input_grad_BTC

    def _add_up(self, gradients: tuple[Tensor, ...], num_tokens: int) -> None:
        if not self._gradient_sums:
            # Not copied: autograd has made each for its parameter alone, since no parameter is merely added to another.
            # Only one that is part of a larger one's is: the fused optimizer goes over memory without heed of strides.
            self._gradient_sums = [gradient.to(torch.float32).contiguous() for gradient in gradients]
            self._first_tokens = num_tokens
        elif num_tokens == self._first_tokens:
            torch._foreach_add_(self._gradient_sums, gradients)
        else:
            torch._foreach_add_(self._gradient_sums, gradients, alpha=num_tokens / self._first_tokens)
        self._num_accumulated += 1
        self._accumulated_tokens += num_tokens

    def _run(self, held: _Held) -> Tensor:
        output: Any = functional_call(self._stage, dict(held.version.params), (held.x_BTC, held.ids_BT))
        assert isinstance(output, Tensor)
        return output

    def _publish(self, number: int) -> Version:
        """A version of the master parameters as they are now, in memory of its own."""
        params = {
            name: param.to(self._compute_dtype, copy=True).requires_grad_() for name, param in self._master.items()
        }
        return Version(number, params)

    def _clear_gradients(self) -> None:
        self._gradient_sums = []
        self._num_accumulated = 0
        self._accumulated_tokens = self._first_tokens = 0

    def _require_input(self, x_BTC: Tensor | None) -> None:
        if (x_BTC is None) != self._is_first:
            raise EngineUseError("the first stage takes no input, every other one needs it")
        if x_BTC is not None and x_BTC.dtype != self._wire_dtype:
            raise EngineUseError(f"input is {x_BTC.dtype}, expected {self._wire_dtype}")

    def _receive(self, tensor_BTC: Tensor) -> Tensor:
        return tensor_BTC.to(self._device, self._compute_dtype)

    def _send(self, microbatch_id: MicrobatchId, tensor_BTC: Tensor) -> Tensor:
        sent_BTC = tensor_BTC.detach().to(_HOST, self._wire_dtype)
        if not bool(sent_BTC.isfinite().all()):
            raise NonFiniteError(f"microbatch {microbatch_id}: what would be sent is not finite")
        return sent_BTC


def _leaf(x_BTC: Tensor | None, requires_grad: bool) -> Tensor | None:
    """The stage's input as a leaf of its own, so that a graph can begin there."""
    return None if x_BTC is None else x_BTC.detach().requires_grad_(requires_grad)
