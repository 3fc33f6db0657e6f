"""Members that die, members that come, and an orchestrator that is restarted, at chosen moments."""

import pytest

from orion.common.ids import MemberState, Phase
from orion.common.protocol.records import LedgerQuery
from orion.simulator.faults import Fault, FaultKind
from orion.simulator.scenarios import calm
from orion.simulator.simulation import run_scenario, watched
from orion.simulator.swarm import Swarm

SEED = 3
VICTIM = 2
"""A miner of stage 1."""


def crash(phase: Phase, after_s: float = 0.1) -> Fault:
    """In outer step 1: the train phase of 0 begins before anybody has joined."""
    return Fault(FaultKind.CRASH, 1, 1, phase, after_s=after_s, duration_s=0.0, miner=VICTIM)


@pytest.mark.parametrize("phase", [Phase.TRAIN, Phase.UPLOAD, Phase.MERGE])
def test_a_killed_miner_does_not_stop_the_run(phase: Phase) -> None:
    swarm = Swarm(calm(outer_steps=3, faults=[crash(phase)]), SEED)
    result = watched(swarm, SEED)
    assert all(record.has_fired for record in result.faults)
    assert any(swarm.hotkeys[VICTIM] in notice and "is not waited for" in notice for notice in result.status.notices)
    assert result.status.microbatches_applied > 0


def test_a_newcomer_is_useful_after_the_next_outer_step() -> None:
    swarm = Swarm(calm(outer_steps=4, num_spares=1, faults=[crash(Phase.TRAIN, after_s=0.5)]), SEED)
    newcomer = len(swarm.hotkeys) - 1
    swarm.world.clock.schedule(6.0, lambda: swarm.start_miner(newcomer))
    result = watched(swarm, SEED)
    (member,) = [miner for miner in result.status.miners if miner.hotkey == swarm.hotkeys[newcomer]]
    assert member.stage_index == 1, "it goes where a miner is missing"
    assert member.state is MemberState.ACTIVE
    work = swarm.orchestrator.core.ledger(LedgerQuery()).work
    worked_in = [record.outer_step for record in work if record.hotkey == swarm.hotkeys[newcomer]]
    assert worked_in == list(range(min(worked_in), 4)), "once it works it goes on"
    assert result.chain_weights[newcomer] > 0


@pytest.mark.parametrize("after_s", [0.6, 1.4])
@pytest.mark.parametrize("stage_index", [0, 1, 2])
def test_a_miner_that_starts_anew_at_once_takes_part_again(stage_index: int, after_s: float) -> None:
    # That it is not found guilty for what its first process lost is an invariant.
    miner = 2 * stage_index
    restart = Fault(FaultKind.RESTART, stage_index, 1, Phase.TRAIN, after_s=after_s, duration_s=0.2, miner=miner)
    swarm = Swarm(calm(outer_steps=3, checks_per_outer_step=6, faults=[restart]), SEED)
    result = watched(swarm, SEED)
    (member,) = [member for member in result.status.miners if member.hotkey == swarm.hotkeys[miner]]
    assert member.state is MemberState.ACTIVE
    assert result.chain_weights[miner] > 0


@pytest.mark.parametrize("miner", [0, 1])
def test_what_a_miner_reports_after_it_started_anew_counts_though_it_was_never_missed(miner: int) -> None:
    restart = Fault(FaultKind.RESTART, miner, 1, Phase.TRAIN, after_s=0.7, duration_s=0.5, miner=miner)
    shape = {"num_stages": 2, "replicas": 1, "outer_steps": 2, "inner_steps": 4, "checks_per_outer_step": 2}
    result = run_scenario(calm(faults=[restart], **shape), SEED)
    assert all(record.has_fired for record in result.faults)
    assert result.status.microbatches_applied == 2 * 4 * 2
    assert result.status.num_verdicts_failed == 0, "its log holds less than it was credited for, for a good reason"
    assert not any("gone" in notice or "cut short" in notice for notice in result.status.notices)


@pytest.mark.parametrize("stage_index", [0, 2])
@pytest.mark.parametrize("after_s", [0.0, 0.12])
@pytest.mark.parametrize("phase", [Phase.TRAIN, Phase.UPLOAD, Phase.MERGE])
def test_an_orchestrator_that_is_restarted_in_any_phase_goes_on(phase: Phase, after_s: float, stage_index: int) -> None:
    # In the last outer step, so that the end of the run is among what has to go on. That the journal leads to the
    # state at which the old process ended is an invariant.
    restart = Fault(FaultKind.ORCHESTRATOR_RESTART, stage_index, 1, phase, after_s=after_s, duration_s=1.0)
    result = run_scenario(calm(outer_steps=2, faults=[restart]), SEED)
    assert all(record.has_fired for record in result.faults)
    assert any("was away" in notice for notice in result.status.notices)
    assert result.status.microbatches_applied == 16
    assert result.status.microbatches_cancelled == 0


@pytest.mark.parametrize("at_s", [0.05, 0.3, 0.6])
def test_an_orchestrator_that_is_restarted_while_members_join_goes_on(at_s: float) -> None:
    swarm = Swarm(calm(outer_steps=1), SEED)
    clock = swarm.world.clock
    clock.schedule(at_s, swarm.kill_orchestrator)
    clock.schedule(at_s + 1.0, swarm.restart_orchestrator)
    assert watched(swarm, SEED).status.microbatches_applied == 8
