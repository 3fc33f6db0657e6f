"""Work that was done before its miner began an outer step anew enters no pseudo-gradient: who cheats there is not paid
for it, whether or not a replay can see it."""

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from orion.common.errors import TransportError
from orion.common.ids import Hotkey, MicrobatchId, Operation, Phase
from orion.common.protocol.codec import Body
from orion.common.protocol.messages import ObjectRef
from orion.common.protocol.pay import PaidStep
from orion.common.train.engine import BackwardResult, ForwardResult, InnerStepReport
from orion.simulator.adversaries.adversary import Adversary, AdversaryEngine, Plot
from orion.simulator.clients import SimulatedObjects, SimulatedOrchestrator
from orion.simulator.device import Device
from orion.simulator.faults import Fault, FaultKind
from orion.simulator.miner_host import MinerHost
from orion.simulator.scenarios import calm
from orion.simulator.simulation import watched
from orion.simulator.swarm import Swarm
from orion.simulator.world import World

SEED = 1


def paid_step(swarm: Swarm, miner: int, outer_step: int) -> PaidStep:
    pay = swarm.orchestrator.core.pay(swarm.hotkeys[miner])
    (step,) = [step for step in pay.steps if step.outer_step == outer_step]
    return step


def operations(swarm: Swarm, miner: int, outer_step: int) -> list[Operation]:
    log = swarm.miners[miner].core.committed_log(outer_step)
    assert log is not None
    return [entry.operation for entry in log]


def assert_paid_for_the_rest_only(swarm: Swarm, miner: int, outer_step: int) -> None:
    """What was done before the miner began anew is credited by its neighbours, and counts for nothing."""
    log = operations(swarm, miner, outer_step)
    assert log.count(Operation.BEGIN_ANEW) == 1
    num_after = log[log.index(Operation.BEGIN_ANEW) :].count(Operation.BACKWARD)
    assert 0 < num_after < log.count(Operation.BACKWARD), "it worked before and after"
    step, usual = paid_step(swarm, miner, outer_step), paid_step(swarm, miner, 0)
    assert step.num_credited > step.num_committed == num_after
    assert step.merge is not None and step.merge.num_merged == step.merge.num_settled, "the rest was merged"
    assert usual.num_credited == usual.num_committed
    assert step.counted_flops / num_after == usual.counted_flops / usual.num_committed


# --- in an overlapped run: ahead of a merge that it has itself left ---------------------------------------------------


class _NeverUploadsOne(SimulatedObjects):
    """The pseudo-gradient of outer step 1 is kept back."""

    async def put_many(self, bodies: Mapping[str, Body]) -> list[ObjectRef]:
        if any("pseudo-gradient" in key and key.startswith("outer/1/") for key in bodies):
            raise TransportError("kept back")
        return await super().put_many(bodies)


class _BlindEngine(AdversaryEngine):
    """Sends noise as long as it stands where no validator can: ahead of the merge of outer step 1."""

    _num_ahead = 0
    _is_unseen = False

    def begin_ahead(self, start_N: Tensor) -> tuple[MicrobatchId, ...]:
        dropped = super().begin_ahead(start_N)
        self._num_ahead += 1
        self._is_unseen = self._num_ahead == 2
        return dropped

    def begin_outer_step(self) -> tuple[MicrobatchId, ...]:
        self._is_unseen = False
        return super().begin_outer_step()

    def bent_forward(self, microbatch_id: MicrobatchId, x_BTC: Tensor | None, ids_BU: Tensor) -> ForwardResult:
        result = super().bent_forward(microbatch_id, x_BTC, ids_BU)
        if not self._is_unseen:
            return result
        self.adversary.attacked()
        assert result.output_BTC is not None
        return replace(result, output_BTC=torch.ones_like(result.output_BTC))


class _Blind(Adversary):
    engine_type = _BlindEngine

    def make_objects(self, orchestrator: SimulatedOrchestrator) -> SimulatedObjects:
        return _NeverUploadsOne(orchestrator)


def test_noise_ahead_of_a_merge_that_its_sender_has_left_is_not_paid() -> None:
    plot, cheat = Plot(), 2
    scenario = calm(
        sync="overlapped",
        outer_steps=3,
        inner_steps=8,
        checks_per_outer_step=6,
        whole_share=1.0,
        cheats={cheat: lambda *arguments: _Blind(*arguments, plot=plot)},
    )
    hasty = scenario.spec.time_limits.model_copy(update={"transfer_grace_s": 1.0})
    swarm = Swarm(replace(scenario, spec=scenario.spec.model_copy(update={"time_limits": hasty})), SEED)
    status = watched(swarm, SEED).status
    assert plot.attacks[swarm.hotkeys[cheat]] > 0
    assert status.num_verdicts_failed == 0, "no replay can tell"
    assert operations(swarm, cheat, 2).count(Operation.BACKWARD) > 0
    step = paid_step(swarm, cheat, 2)
    assert step.num_credited > 0, "neighbours cannot tell either"
    assert (step.num_committed, step.counted_flops) == (0, 0.0)
    honest = paid_step(swarm, cheat + 1, 2)
    assert honest.num_committed > 0 and honest.counted_flops > 0


# --- in any run: before a restart, while nothing shows yet ------------------------------------------------------------


class _HastyEngine(AdversaryEngine):
    """Accumulates nothing before its first inner step of outer step 1: on the first stage nobody awaits a gradient, and
    nothing shows in its outputs until that step is taken. It is ended before."""

    _num_begun = 0
    _num_steps = 0

    def begin_outer_step(self) -> tuple[MicrobatchId, ...]:
        self._num_begun += 1
        self._num_steps = 0
        return super().begin_outer_step()

    def bent_backward(self, microbatch_id: MicrobatchId, grad_BTC: Tensor) -> BackwardResult:
        if self._num_begun != 2 or self._num_steps:
            return super().bent_backward(microbatch_id, grad_BTC)
        self.adversary.attacked()
        self.drop(microbatch_id)
        return BackwardResult(None, self.version, 0)

    def inner_step(self, inner_step_index: int, share: float = 1.0) -> InnerStepReport:
        self._num_steps += 1
        return super().inner_step(inner_step_index, share)


class _Hasty(Adversary):
    engine_type = _HastyEngine


def test_passes_that_were_skipped_before_a_restart_are_not_paid() -> None:
    plot, cheat = Plot(), 0

    def process(world: World, hotkey: Hotkey, device: Device, stage_wish: int | None, incarnation: int) -> MinerHost:
        kind = _Hasty if incarnation == 0 else Adversary
        return kind(world, hotkey, device, stage_wish, incarnation, plot=plot)

    fault = Fault(FaultKind.RESTART, 0, 1, Phase.TRAIN, after_s=3.0, duration_s=0.3, miner=cheat, other_stage=0)
    scenario = calm(
        replicas=1,
        outer_steps=3,
        inner_steps=2,
        microbatches_per_step=16,
        checks_per_outer_step=3,
        whole_share=1.0,
        faults=[fault],
        cheats={cheat: process},
    )
    swarm = Swarm(scenario, SEED)
    result = watched(swarm, SEED)
    assert all(record.has_fired for record in result.faults)
    assert plot.attacks[swarm.hotkeys[cheat]] > 0
    assert result.status.num_verdicts_failed == 0, "no replay can tell"
    assert_paid_for_the_rest_only(swarm, cheat, 1)
