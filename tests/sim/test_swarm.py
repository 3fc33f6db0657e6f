"""A whole swarm of real cores, hands and engines in virtual time, with nothing going wrong."""

import pytest

from orion.common.ids import Phase
from orion.simulator.scenarios import calm
from orion.simulator.simulation import Result, run_scenario
from orion.simulator.swarm import Swarm

SEED = 1


@pytest.fixture(scope="module")
def learned() -> Result:
    """A run long enough to learn from."""
    return run_scenario(calm(outer_steps=4, inner_steps=6), SEED)


def test_a_clean_run_reaches_every_outer_step_and_applies_every_microbatch(learned: Result) -> None:
    status = learned.status
    assert status.finished
    assert status.finish_reason == "all outer steps are done"
    assert [(stage.phase, stage.outer_step) for stage in status.stages] == [(Phase.DONE, 4)] * 3
    num_microbatches = 4 * 6 * 2 * 2  # outer steps × inner steps × microbatches × replicas
    assert status.microbatches_started == status.microbatches_applied == num_microbatches
    assert status.microbatches_cancelled == 0
    assert status.notices == ()


def test_the_loss_falls(learned: Result) -> None:
    losses = [point.loss for point in learned.losses]
    first, last = losses[:12], losses[-12:]
    assert sum(last) / len(last) < sum(first) / len(first) - 0.2


def test_anchors_are_byte_equal_and_checks_pass(learned: Result) -> None:
    # That every anchor of every outer step is the same on all replicas is an invariant, checked as they are reached.
    assert learned.status.anchors_equal
    # In each of four outer steps one log, and two partitions, which have two to four reducers.
    assert 4 * (1 + 2) <= learned.status.num_checks <= 4 * (1 + 4)
    assert learned.status.num_verdicts_failed == 0


def test_work_is_paid(learned: Result) -> None:
    credited = [miner.num_microbatches for miner in learned.status.miners]
    assert sum(credited) == 3 * learned.status.microbatches_applied
    assert all(share > 0.01 for share in learned.chain_weights.values()), "some are not verified yet"
    assert sum(learned.chain_weights.values()) == pytest.approx(1.0, abs=1e-3)


def test_the_same_seed_gives_the_same_events_and_another_seed_gives_others() -> None:
    scenario = calm(outer_steps=1)
    digests = [run_scenario(scenario, seed).event_log_digest for seed in (SEED, SEED, SEED + 1)]
    assert digests[0] == digests[1]
    assert digests[0] != digests[2]


def test_watching_changes_nothing() -> None:
    scenario = calm(outer_steps=1)
    unwatched = Swarm(scenario, SEED)
    unwatched.start()
    assert unwatched.run()
    assert unwatched.world.log.digest() == run_scenario(scenario, SEED).event_log_digest


@pytest.mark.parametrize(("num_stages", "replicas"), [(1, 1), (1, 3), (2, 1), (3, 3)])
def test_other_shapes_of_swarm_run_too(num_stages: int, replicas: int) -> None:
    result = run_scenario(calm(num_stages=num_stages, replicas=replicas, outer_steps=2), SEED)
    assert result.status.microbatches_applied == 2 * 2 * 2 * replicas
    assert result.status.anchors_equal
