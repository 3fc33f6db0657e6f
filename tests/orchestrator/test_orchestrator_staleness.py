"""Staleness: counted for each stage from what miners tell, and shown as a histogram."""

from hypothesis import given
from hypothesis import strategies as st
from orchestrator_world import World, hotkey_of, make_spec
from prometheus_client import CollectorRegistry
from prometheus_client.exposition import generate_latest

from orion.common.ids import Hotkey
from orion.common.protocol.messages import Heartbeat
from orion.orchestrator.metrics import RunCollector
from orion.orchestrator.staleness import COUNT_MAX, StalenessBook


def test_counts_grow_by_what_is_new_and_go_on_after_a_restart() -> None:
    book = StalenessBook(2)
    book.add(0, (), (3, 1))
    book.add(0, (3, 1), (5, 1, 2))
    assert book.counts == [[5, 1, 2], []]
    book.add(0, (5, 1, 2), (1, 0, 0))
    assert book.counts == [[6, 1, 2], []], "another process counts from zero"
    book.add(0, (1, 0, 0), (COUNT_MAX, 0, 0))
    assert book.counts[0][0] == COUNT_MAX


@given(st.lists(st.lists(st.integers(0, 2**53), max_size=5), max_size=10))
def test_counts_never_fall_whatever_is_told(told: list[list[int]]) -> None:
    book, before = StalenessBook(1), []
    for now in told:
        counts = list(book.counts[0])
        book.add(0, before, now)
        assert all(new >= old for old, new in zip(counts, book.counts[0], strict=False))
        assert all(0 <= count <= COUNT_MAX for count in book.counts[0])
        before = now


def test_heartbeats_make_a_histogram_of_each_stage() -> None:
    world = World(make_spec())
    world.start()

    def beat(hotkey: Hotkey, staleness: tuple[int, ...]) -> None:
        known = world.core.status(world.now_s).miners
        heartbeat = next(miner.heartbeat for miner in known if miner.hotkey == hotkey)
        assert isinstance(heartbeat, Heartbeat)
        world.accept(hotkey, heartbeat.model_copy(update={"staleness": staleness}))

    beat(hotkey_of(0, 0), (4, 2, 1))
    beat(hotkey_of(0, 1), (1,))
    beat(hotkey_of(0, 0), (4, 3, 1, 0, 0, 1))
    status = world.core.status(world.now_s)
    assert status.staleness[0].counts == (5, 3, 1, 0, 0, 1)
    assert status.staleness[1].counts == ()

    registry = CollectorRegistry()
    registry.register(RunCollector(lambda: status, lambda: 0))
    lines = generate_latest(registry).decode().splitlines()
    for line in (
        'orion_staleness_bucket{le="0",stage="0"} 5.0',
        'orion_staleness_bucket{le="1",stage="0"} 8.0',
        'orion_staleness_bucket{le="4",stage="0"} 9.0',
        'orion_staleness_bucket{le="+Inf",stage="0"} 10.0',
        'orion_staleness_count{stage="0"} 10.0',
        'orion_staleness_sum{stage="0"} 10.0',
    ):
        assert line in lines
