"""An attacker whose log is without fault: it computes one microbatch for each set of parameters, logs that for all.

Every operation of its log is what a replay of the logged inputs gives, and its pseudo-gradient follows from its log.
What it cannot make fit is the record of what it was sent: its receipts name other inputs than its log. It works on a
middle stage, where everything that a replay needs comes from the miner itself.

Letters in names: B sequences, T tokens, U = T + 1, C boundary width.
"""

from dataclasses import replace
from random import Random
from typing import Any

from torch import Tensor

from orion.common.ids import Digest, Direction, MicrobatchId
from orion.common.protocol.messages import Refusal
from orion.common.train.engine import BackwardResult, ForwardResult, InnerStepReport
from orion.miner.cache import INCOMING, Parcel
from orion.miner.core import MinerCore
from orion.miner.device_work import DeviceWork
from orion.miner.events import BackwardDone, ForwardDone
from orion.simulator.adversaries.adversary import Adversary, AdversaryEngine
from orion.simulator.adversaries.passes import IDLE_SHARE


class _MemoEngine(AdversaryEngine):
    """Computes what it has not computed yet with its present parameters; its inputs are always the same."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._forwards: dict[int, tuple[MicrobatchId, ForwardResult]] = {}
        """By version: who was computed, and what came out."""
        self._backwards: dict[int, BackwardResult] = {}
        self._versions: dict[MicrobatchId, int] = {}
        self._num_pretended = 0

    def begin_outer_step(self) -> tuple[MicrobatchId, ...]:
        for record in (self._forwards, self._backwards, self._versions):
            record.clear()
        self._num_pretended = 0
        return super().begin_outer_step()

    def bent_forward(self, microbatch_id: MicrobatchId, x_BTC: Tensor | None, ids_BU: Tensor) -> ForwardResult:
        self._versions[microbatch_id] = self.version
        if self.version in self._forwards:
            self.adversary.attacked()
        else:
            self._forwards[self.version] = (microbatch_id, self.honest_forward(microbatch_id, x_BTC, ids_BU))
        return self._forwards[self.version][1]

    def bent_backward(self, microbatch_id: MicrobatchId, grad_BTC: Tensor) -> BackwardResult:
        version = self._versions.pop(microbatch_id)
        if version in self._backwards:
            self._num_pretended += 1
            return replace(self._backwards[version], staleness=self.version - version)
        computed_id, _ = self._forwards[version]
        self._backwards[version] = self.honest_backward(computed_id, grad_BTC)
        return self._backwards[version]

    def inner_step(self, inner_step_index: int, share: float = 1.0) -> InnerStepReport:
        """The mean of equal gradients is any one of them."""
        num_pretended, self._num_pretended = self._num_pretended, 0
        if self.num_accumulated == 0:
            return InnerStepReport(1.0, False, num_pretended, None, self.version)
        report = super().inner_step(inner_step_index, share)
        return replace(report, num_microbatches=report.num_microbatches + num_pretended)

    def drop(self, microbatch_id: MicrobatchId) -> None:
        """What was computed is still good for others."""
        self._versions.pop(microbatch_id, None)


class _MemoWork(DeviceWork):
    """Logs the inputs that were used instead of those that came."""

    used: "dict[tuple[int, Direction], Digest]"
    """By outer step and direction."""

    def _log_pass(self, result: ForwardDone | BackwardDone, inner_step: int) -> None:
        item = self._table.get(result.microbatch_id)
        assert item is not None
        came, gradient = item.input_digest, item.gradient
        item.input_digest = self.used[item.outer_step, Direction.ACTIVATION]
        if gradient is not None:
            used = self.used[item.outer_step, Direction.GRADIENT]
            item.gradient = gradient.model_copy(update={"digest": used})
        super()._log_pass(result, inner_step)
        item.input_digest, item.gradient = came, gradient


class _MemoCore(MinerCore):
    """Decides as every miner does, and has that log."""

    work_type = _MemoWork

    def uses(self, used: dict[tuple[int, Direction], Digest]) -> None:
        """What is logged instead of what came."""
        assert isinstance(self._work, _MemoWork)
        self._work.used = used


class ConsistentFreeRider(Adversary):
    """Puts its first input of each outer step in the place of all others."""

    engine_type = _MemoEngine
    device_share = IDLE_SHARE

    def make_core(self, rng: Random) -> MinerCore:
        self._parcels: dict[tuple[int, Direction], Parcel] = {}
        core = _MemoCore(self.world.spec, self.hotkey, rng, self.evidence.kept())
        self._used: dict[tuple[int, Direction], Digest] = {}
        core.uses(self._used)
        return core

    def _read(self, request_id: int) -> Refusal | None:
        request, _ = self._offers[request_id]
        refusal = super()._read(request_id)
        if refusal is None:
            transfer = request.transfer
            came = self.cache.get(transfer.microbatch_id, INCOMING[transfer.direction])
            assert came is not None
            parcel = self._parcels.setdefault((transfer.outer_step, transfer.direction), came)
            self._used[transfer.outer_step, transfer.direction] = parcel.body.digest
            self.cache.put(transfer.microbatch_id, INCOMING[transfer.direction], parcel)
        return refusal
