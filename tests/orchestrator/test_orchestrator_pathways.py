"""Pathways: who ran each applied trip, and its loss; a path that can't be true is not kept."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from orchestrator_world import World, hotkey_of, make_spec

from orion.common.ids import Hotkey, MicrobatchId, Outcome
from orion.common.protocol.fields import BATCH_MAX
from orion.common.protocol.messages import MicrobatchEnd
from orion.common.protocol.records import PathwayQuery, Pathways
from orion.orchestrator.pathways import PathwayBook

A0, A1, B0, B1 = (hotkey_of(stage, replica) for stage in range(2) for replica in range(2))


def pathways(world: World, outer_step: int = 0, offset: int = 0) -> Pathways:
    return world.core.pathways(PathwayQuery(outer_step=outer_step, offset=offset))


def paths(page: Pathways) -> list[tuple[Hotkey, ...]]:
    return [tuple(page.miners[place] for place in pathway.path) for pathway in page.pathways]


def test_path_and_loss_of_every_applied_trip_can_be_read() -> None:
    world = World()
    world.start()
    first, second = world.lease(A0, 2)
    world.travel(first.microbatch_id, (A0, B0), loss=3.5)
    world.report(A0, ends=(MicrobatchEnd(microbatch_id=second.microbatch_id, outcome=Outcome.CANCELLED, reason="x"),))
    (third,) = world.lease(A1)
    world.travel(third.microbatch_id, (A1, B0), loss=2.5)
    page = pathways(world)
    assert paths(page) == [(A0, B0), (A1, B0)]
    assert [pathway.loss for pathway in page.pathways] == [3.5, 2.5]
    assert [pathway.microbatch_id for pathway in page.pathways] == [first.microbatch_id, third.microbatch_id]
    assert page.total == 2
    assert paths(pathways(world, offset=1)) == [(A1, B0)]
    assert pathways(world, outer_step=1).total == 0


@pytest.mark.parametrize(
    "path",
    [(), (A0,), (A1, B0), (B0, A0), (A0, A0), (A0, hotkey_of(1, 9)), (A0, B0, B1)],
    ids=["none", "short", "not the lessee", "turned round", "wrong stage", "unknown", "long"],
)
def test_a_path_that_cannot_be_true_is_not_kept_and_the_trip_counts(path: tuple[Hotkey, ...]) -> None:
    world = World()
    world.start()
    (leased,) = world.lease(A0)
    end = MicrobatchEnd(microbatch_id=leased.microbatch_id, outcome=Outcome.APPLIED, loss=1.0, path=path)
    world.report(A0, ends=(end,))
    assert pathways(world).total == 0
    assert world.status.microbatches_applied == 1


def test_pathways_are_forgotten_with_their_trips() -> None:
    world = World(make_spec(keep_outer_steps=2, outer_steps=6))
    world.start()
    for _ in range(4):
        world.outer_step()
    assert [pathways(world, outer_step).total for outer_step in range(5)] == [0, 0, 8, 8, 0]


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(4, 6), st.floats(-10, 10)), max_size=30), st.integers(1, 7))
def test_pages_put_together_are_the_whole(trips: list[tuple[int, int, float]], num_max: int) -> None:
    book = PathwayBook(2)
    names = [hotkey_of(place // 4, place % 4) for place in range(7)]
    for number, (first, second, loss) in enumerate(trips):
        book.add(3, MicrobatchId(number), (names[first], names[second]), loss)
    found: list[tuple[tuple[Hotkey, ...], float]] = []
    while (page := book.page(3, len(found), num_max)).pathways:
        assert len(page.pathways) <= num_max <= BATCH_MAX
        found += [(path, pathway.loss) for path, pathway in zip(paths(page), page.pathways, strict=True)]
    assert found == [((names[first], names[second]), loss) for first, second, loss in trips]
    assert page.total == len(trips)
