"""A miner is lost at each stand of a microbatch: nothing is lost with it, and what survives is known by its kind."""

import itertools

import pytest

from orion.miner.table import Stand
from orion.simulator.scenarios import calm
from orion.simulator.simulation import Result, watched
from orion.simulator.strikes import Blow, Strike, Striker
from orion.simulator.swarm import Swarm

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
