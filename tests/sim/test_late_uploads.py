"""Whole swarms with one miner whose uploads always come too late for their merge."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pytest

from orion.common.errors import TransportError
from orion.common.ids import Operation, Phase
from orion.common.protocol.codec import Body
from orion.common.protocol.messages import ObjectRef
from orion.common.protocol.records import MergeQuery, MergeRecord
from orion.simulator.clients import SimulatedObjects, SimulatedOrchestrator
from orion.simulator.clock import VirtualClock
from orion.simulator.faults import Fault, FaultKind
from orion.simulator.miner_host import MinerHost
from orion.simulator.scenarios import calm
from orion.simulator.simulation import watched
from orion.simulator.swarm import Scenario, Swarm

SEED = 1
SLOW = 2
"""The first miner of the second stage."""
UPLOAD_S = 1.5
"""What a pseudo-gradient takes over the slow link: more than the usual time and the grace, less than an outer step."""
GRACE_S = 1.0
OUTER_STEPS = 3


class _SlowUplink(SimulatedObjects):
    """A pseudo-gradient gets through after a while; an attempt that is cut off before is gone on with by the next."""

    def __init__(self, orchestrator: SimulatedOrchestrator, clock: VirtualClock) -> None:
        super().__init__(orchestrator)
        self._clock = clock
        self._began_s: dict[str, float] = {}

    async def put_many(self, bodies: Mapping[str, Body]) -> list[ObjectRef]:
        now_s = self._clock.now_s()
        began_s = [self._began_s.setdefault(key, now_s) for key in bodies if "pseudo-gradient" in key]
        if began_s and now_s < max(began_s) + UPLOAD_S:
            raise TransportError("still on its way")
        return await super().put_many(bodies)


class _Slow(MinerHost):
    def make_objects(self, orchestrator: SimulatedOrchestrator) -> SimulatedObjects:
        return _SlowUplink(orchestrator, self.clock)


def scenario_of(**fields: Any) -> Scenario:
    fields = {"num_stages": 2, "outer_steps": OUTER_STEPS, "inner_steps": 6, "checks_per_outer_step": 4} | fields
    scenario = calm(whole_share=1.0, cheats={SLOW: _Slow}, **fields)
    limits = scenario.spec.time_limits.model_copy(update={"transfer_grace_s": GRACE_S})
    return replace(scenario, spec=scenario.spec.model_copy(update={"time_limits": limits}))


def records(swarm: Swarm) -> list[MergeRecord]:
    """Of the slow miner's stage."""
    query = [MergeQuery(stage_index=1, outer_step=outer_step) for outer_step in range(OUTER_STEPS)]
    return [swarm.orchestrator.core.merge(each) for each in query]


def losses(swarm: Swarm) -> tuple[float, float]:
    """Of the first and of the last quarter of all microbatches."""
    found = [point.loss for point in swarm.losses()]
    quarter = len(found) // 4
    return sum(found[:quarter]) / quarter, sum(found[-quarter:]) / quarter


def check(swarm: Swarm) -> None:
    """Byte-equal anchors, honest means and "merged once" are invariants, and were held after every event."""
    status = watched(swarm, SEED).status
    slow = swarm.hotkeys[SLOW]
    merges = records(swarm)
    for record in merges[:-1]:
        assert slow in record.manifest.late and slow not in record.manifest.contributors
    for record in merges[1:]:
        assert record.contributions[0].voice == (slow, 1), "merged one outer step later"
    assert status.anchors_equal
    assert status.num_verdicts_failed == 0
    assert swarm.orchestrator.core.pay(slow).verified_outer_step is not None, "its whole outer steps are replayed"
    first, last = losses(swarm)
    assert last < first


@pytest.mark.parametrize("sync", ["blocking", "overlapped"])
def test_what_always_comes_late_is_merged_an_outer_step_later_and_replays(sync: str) -> None:
    swarm = Swarm(scenario_of(sync=sync), SEED)
    check(swarm)
    if sync == "overlapped":
        for outer_step in (1, 2):
            log = swarm.miners[SLOW].core.committed_log(outer_step)
            assert log is not None
            done = [entry.operation for entry in log]
            assert done[0] is Operation.BEGIN_AHEAD
            assert Operation.TAKE_MERGED in done and Operation.BEGIN_ANEW not in done, "what was begun ahead is kept"


@pytest.mark.parametrize("phase", [Phase.MERGE, Phase.TRAIN])
def test_an_orchestrator_that_is_killed_between_forgets_nothing(phase: Phase) -> None:
    outer_step = 0 if phase is Phase.MERGE else 1
    kill = Fault(FaultKind.ORCHESTRATOR_RESTART, 1, outer_step, phase, after_s=0.1, duration_s=0.5)
    swarm = Swarm(scenario_of(faults=[kill]), SEED)
    result = watched(swarm, SEED)
    assert all(record.has_fired for record in result.faults)
    assert result.status.num_verdicts_failed == 0
    assert (swarm.hotkeys[SLOW], 1) in {each.voice for each in records(swarm)[1].contributions}
