"""Whole swarms that train the next outer step while they merge the last one, with and without faults."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from orion.common.errors import TransportError
from orion.common.ids import MicrobatchId, Operation, Phase
from orion.common.protocol.codec import Body
from orion.common.protocol.messages import ObjectRef
from orion.common.train.engine import StageEngine
from orion.simulator.clients import SimulatedObjects, SimulatedOrchestrator
from orion.simulator.faults import Fault, FaultKind
from orion.simulator.miner_host import MinerHost
from orion.simulator.scenarios import calm, stormy
from orion.simulator.simulation import run_scenario, watched
from orion.simulator.swarm import Scenario, Swarm

SEED = 1


def overlapped(**fields: Any) -> Scenario:
    return calm(sync="overlapped", **fields)


def operations(swarm: Swarm, miner: int, outer_step: int) -> list[Operation]:
    log = swarm.miners[miner].core.committed_log(outer_step)
    assert log is not None
    return [entry.operation for entry in log]


def test_nothing_is_lost_and_every_log_replays_from_public_bytes() -> None:
    # That anchors are byte-equal everywhere, and no honest miner is found guilty, are invariants.
    scenario = overlapped(outer_steps=4, inner_steps=4, checks_per_outer_step=6, whole_share=1.0)
    swarm = Swarm(scenario, SEED)
    result = watched(swarm, SEED)
    assert result.status.microbatches_started == result.status.microbatches_applied == 4 * 4 * 2 * 2
    assert result.status.notices == ()
    assert result.status.num_checks > 4 * 6
    for miner in range(6):
        assert Operation.BEGIN_AHEAD not in operations(swarm, miner, 0)
        for outer_step in (1, 2, 3):
            done = operations(swarm, miner, outer_step)
            assert done[0] is Operation.BEGIN_AHEAD
            assert done.count(Operation.TAKE_MERGED) == 1


def test_the_same_work_takes_less_time_than_with_pauses_for_merging() -> None:
    blocking, overlapping = (run_scenario(calm(sync=sync), SEED) for sync in ("blocking", "overlapped"))
    assert blocking.status.microbatches_applied == overlapping.status.microbatches_applied
    assert overlapping.virtual_s < blocking.virtual_s


class _StartsElsewhere(StageEngine):
    """Begins where nobody can follow: beside the point that its upload leads to."""

    def begin_ahead(self, start_N: Tensor) -> tuple[MicrobatchId, ...]:
        return super().begin_ahead(torch.add(start_N, 0.3))


class _Liar(MinerHost):
    def make_engine(self, *arguments: Any, **options: Any) -> StageEngine:
        return _StartsElsewhere(*arguments, **options)


def test_who_begins_elsewhere_than_its_upload_says_is_found_out() -> None:
    scenario = overlapped(outer_steps=3, checks_per_outer_step=6, whole_share=1.0, cheats={2: _Liar})
    swarm = Swarm(scenario, SEED)
    status = watched(swarm, SEED).status
    guilty = {notice.split(" ")[0] for notice in status.notices if "failed a check" in notice}
    assert status.num_verdicts_failed > 0
    assert all(swarm.hotkeys[2] in notice for notice in status.notices if "failed a check" in notice), guilty


class _NeverUploadsOne(SimulatedObjects):
    """The pseudo-gradient of outer step 1 does not get through."""

    async def put_many(self, bodies: Mapping[str, Body]) -> list[ObjectRef]:
        if any("pseudo-gradient" in key and key.startswith("outer/1/") for key in bodies):
            raise TransportError("lost")
        return await super().put_many(bodies)


class _Unlucky(MinerHost):
    def make_objects(self, orchestrator: SimulatedOrchestrator) -> SimulatedObjects:
        return _NeverUploadsOne(orchestrator)


def test_what_follows_from_an_upload_that_never_came_is_begun_anew_and_nobody_is_blamed() -> None:
    scenario = overlapped(outer_steps=4, inner_steps=8, checks_per_outer_step=6, whole_share=1.0, cheats={2: _Unlucky})
    hasty = scenario.spec.time_limits.model_copy(update={"transfer_grace_s": 1.0})
    scenario = replace(scenario, spec=scenario.spec.model_copy(update={"time_limits": hasty}))
    swarm = Swarm(scenario, SEED)
    status = watched(swarm, SEED).status
    assert any("upload cut short" in notice for notice in status.notices)
    assert status.num_verdicts_failed == 0
    assert any("too old" in notice for notice in status.notices)
    done = operations(swarm, 2, 2)
    assert done[0] is Operation.BEGIN_AHEAD
    assert Operation.TAKE_MERGED in done, "it might still have come"
    done = operations(swarm, 2, 3)
    assert done[0] is Operation.BEGIN_AHEAD
    assert Operation.BEGIN_ANEW in done
    assert Operation.TAKE_MERGED not in done


@pytest.mark.parametrize("phase", [Phase.UPLOAD, Phase.MERGE])
@pytest.mark.parametrize("kind", [FaultKind.CRASH, FaultKind.RESTART, FaultKind.CUT_OFF])
def test_a_miner_that_is_lost_while_it_trains_ahead_stops_nobody(kind: FaultKind, phase: Phase) -> None:
    fault = Fault(kind, 1, 1, phase, after_s=0.05, duration_s=2.0, miner=2)
    result = run_scenario(overlapped(outer_steps=3, faults=[fault]), SEED)
    assert all(record.has_fired for record in result.faults)
    assert result.status.num_verdicts_failed == 0


@pytest.mark.parametrize("phase", [Phase.UPLOAD, Phase.MERGE])
def test_an_orchestrator_that_is_restarted_while_two_outer_steps_are_under_way_goes_on(phase: Phase) -> None:
    restart = Fault(FaultKind.ORCHESTRATOR_RESTART, 1, 1, phase, after_s=0.05, duration_s=1.0)
    result = run_scenario(overlapped(outer_steps=3, faults=[restart]), SEED)
    assert all(record.has_fired for record in result.faults)
    assert result.status.microbatches_applied == 3 * 2 * 2 * 2


@pytest.mark.parametrize("seed", range(12))
def test_no_fault_breaks_an_invariant_or_stops_an_overlapped_run(seed: int) -> None:
    result = run_scenario(stormy(seed, sync="overlapped"), seed)
    assert result.status.finished
    assert all(record.has_fired for record in result.faults), "\n".join(map(str, result.faults))
