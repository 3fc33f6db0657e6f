"""Seeded schedules of faults: whatever goes wrong, the run ends and no invariant breaks on the way.

Every failure prints the seed and the schedule; `run_scenario(stormy(seed), seed)` repeats it.
"""

from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orion.common.ids import Phase
from orion.simulator.faults import Fault, FaultKind, Shape, draw_schedule
from orion.simulator.scenarios import calm, stormy
from orion.simulator.simulation import SimulationFailedError, run_scenario

SEEDS = range(50)


@pytest.mark.parametrize("seed", SEEDS)
def test_no_fault_breaks_an_invariant_or_stops_the_run(seed: int) -> None:
    result = run_scenario(stormy(seed), seed)
    assert result.status.finished
    assert all(record.has_fired for record in result.faults), "\n".join(map(str, result.faults))


def test_these_seeds_try_every_kind_of_fault() -> None:
    assert {fault.kind for seed in SEEDS for fault in stormy(seed).faults} == set(FaultKind)


@given(seed=st.integers(0, 2**32), num_faults=st.integers(0, 12), replicas=st.integers(1, 4))
def test_a_schedule_leaves_every_stage_a_replica(seed: int, num_faults: int, replicas: int) -> None:
    shape = Shape(num_stages=3, replicas=replicas, outer_steps=3)
    schedule = draw_schedule(Random(seed), shape, num_faults)
    assert schedule == draw_schedule(Random(seed), shape, num_faults)
    assert len(schedule) == num_faults
    crashed = [fault.miner for fault in schedule if fault.kind is FaultKind.CRASH]
    assert len(set(crashed)) == len(crashed)
    for stage_index in range(3):
        assert sum(miner // replicas == stage_index for miner in crashed) < replicas


def test_a_failure_names_seed_and_schedule() -> None:
    every_replica_of_a_stage = tuple(
        Fault(FaultKind.CRASH, 1, 0, Phase.TRAIN, after_s=0.1, duration_s=0.0, miner=miner) for miner in (2, 3)
    )
    scenario = calm(virtual_s_max=40.0, faults=every_replica_of_a_stage)
    with pytest.raises(SimulationFailedError) as failure:
        run_scenario(scenario, seed=7)
    text = str(failure.value)
    assert "seed 7" in text
    assert all(str(fault) in text for fault in every_replica_of_a_stage)
