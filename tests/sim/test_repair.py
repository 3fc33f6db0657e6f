"""A miner is lost at each stand of a microbatch: nothing is lost with it, and what survives is known by its kind."""

import itertools
from dataclasses import replace

import pytest

from orion.common.config import TimeLimits
from orion.miner.table import Stand
from orion.simulator.device import DeviceProfile
from orion.simulator.network import LinkProfile
from orion.simulator.scenarios import calm
from orion.simulator.simulation import Result, watched
from orion.simulator.strikes import Blow, Strike, Striker
from orion.simulator.swarm import Scenario, Swarm

MIDDLE = 1
STANDS = [
    Stand.RECEIVING,
    Stand.FORWARD_QUEUED,
    Stand.FORWARDING,
    Stand.SENDING,
    Stand.AWAITING_GRADIENT,
    Stand.GRADIENT_RECEIVING,
    Stand.BACKWARDING,
    Stand.RETURNING,
]
COMEBACKS = [(Stand.SENDING, 5.5, 3), (Stand.SENDING, 7.0, 3), (Stand.AWAITING_GRADIENT, 5.5, 1)]
CUT_STANDS = [Stand.FORWARDING, Stand.AWAITING_GRADIENT, Stand.RETURNING]


def struck(strike: Strike, seed: int, **fields: int) -> tuple[Swarm, Result]:
    """A run in which the strike happens."""
    swarm = Swarm(calm(**{"outer_steps": 1, "inner_steps": 4, **fields}), seed)
    striker = Striker(swarm, strike)
    swarm.world.observers.append(striker)
    result = watched(swarm, seed)
    assert striker.struck is not None, f"{strike} has not happened"
    assert striker.struck // swarm.scenario.spec.replicas == strike.stage_index
    return swarm, result


@pytest.mark.parametrize(
    ("stand", "blow"),
    [*itertools.product(STANDS, [Blow.KILL, Blow.STOP]), *itertools.product(CUT_STANDS, [Blow.CUT, Blow.MUTE])],
)
def test_nothing_is_lost_with_a_middle_miner_whatever_it_was_doing(stand: Stand, blow: Blow) -> None:
    swarm, result = struck(Strike(blow, MIDDLE, stand), seed=STANDS.index(stand))

    status = result.status
    spec = swarm.scenario.spec
    assert status.microbatches_cancelled == 0, "a replica lived, and there was time"
    assert status.microbatches_applied == status.microbatches_started
    assert status.microbatches_applied == spec.inner_steps * spec.microbatches_per_step * spec.replicas
    repaired = status.microbatches_repaired
    assert repaired.rerouted + repaired.spliced > 0, "nothing had to be repaired"


@pytest.mark.parametrize("stand", [Stand.AWAITING_GRADIENT, Stand.BACKWARDING, Stand.RETURNING])
def test_what_the_lost_one_had_sent_on_is_spliced(stand: Stand) -> None:
    """Its next hop has it, or had returned it already."""
    _, result = struck(Strike(Blow.KILL, MIDDLE, stand), seed=23)

    assert result.status.microbatches_repaired.spliced > 0


@pytest.mark.parametrize("blow", [Blow.KILL, Blow.STOP])
def test_nothing_is_lost_with_a_last_miner(blow: Blow) -> None:
    _, result = struck(Strike(blow, 2, Stand.FORWARDING), seed=3)

    assert result.status.microbatches_cancelled == 0
    assert result.status.microbatches_repaired.rerouted > 0


def test_what_a_first_miner_had_begun_is_leased_again() -> None:
    """Nobody but the one that leased a trip can say how it ended."""
    _, result = struck(Strike(Blow.KILL, 0, Stand.AWAITING_GRADIENT), seed=3)

    status = result.status
    assert status.microbatches_cancelled > 0
    assert status.microbatches_repaired.released == status.microbatches_cancelled, "some were not leased again"
    assert status.microbatches_started == status.microbatches_applied + status.microbatches_cancelled


def test_without_another_replica_everything_waits_and_is_leased_again() -> None:
    """A stopped miner that comes back in time needs no repair; one that doesn't costs its microbatches' deadlines."""
    _, result = struck(Strike(Blow.STOP, MIDDLE, Stand.FORWARDING, duration_s=2.0), seed=4, replicas=1)
    assert result.status.microbatches_cancelled == 0
    repaired = result.status.microbatches_repaired
    assert (repaired.rerouted, repaired.spliced, repaired.released) == (0, 0, 0)


def far_apart() -> Scenario:
    """Messages take tenths of a second and passes seconds: a repair lasts long enough that the one who was taken for
    lost comes back in the middle of it, with offers of its own that ran out while it stood still."""
    scenario = calm(outer_steps=1, inner_steps=3, checks_per_outer_step=0)
    limits = TimeLimits(train_s=400.0, transfer_grace_s=30.0, microbatch_s=150.0, member_s=100.0)
    flow = scenario.spec.flow.model_copy(update={"staleness_max": 64})  # what waits must not be let go for that
    return replace(
        scenario,
        spec=scenario.spec.model_copy(update={"time_limits": limits, "flow": flow}),
        link=LinkProfile(latency_s=0.2, jitter_s=0.05),
        device=DeviceProfile(forward_s=1.0, backward_s=2.0),
    )


@pytest.mark.parametrize(("stand", "stopped_s", "seed"), COMEBACKS)
def test_nothing_is_lost_with_a_miner_that_comes_back_in_the_middle_of_its_repair(
    stand: Stand, stopped_s: float, seed: int
) -> None:
    swarm = Swarm(far_apart(), seed)
    striker = Striker(swarm, Strike(Blow.STOP, MIDDLE, stand, after_num_applied=1, duration_s=stopped_s))
    swarm.world.observers.append(striker)

    status = watched(swarm, seed).status

    assert striker.is_back, "it was not struck, or has not come back"
    assert status.microbatches_cancelled == 0
    assert status.microbatches_repaired.rerouted + status.microbatches_repaired.spliced > 0, "nothing was repaired"


@pytest.mark.parametrize("is_midway", [False, True])
@pytest.mark.parametrize("back_at", [Stand.FORWARDING, Stand.AWAITING_GRADIENT, Stand.BACKWARDING])
def test_nothing_is_lost_with_a_miner_that_comes_back_beside_its_replacement(back_at: Stand, is_midway: bool) -> None:
    strike = Strike(Blow.STOP, MIDDLE, Stand.FORWARDING, back_at=back_at, is_midway=is_midway)
    swarm = Swarm(calm(outer_steps=1, inner_steps=4), seed=2)
    striker = Striker(swarm, strike)
    swarm.world.observers.append(striker)

    status = watched(swarm, 2).status

    assert striker.is_back, "it was not struck, or has not come back"
    assert status.microbatches_cancelled == 0
    assert status.microbatches_repaired.rerouted + status.microbatches_repaired.spliced > 0, "nothing was repaired"
