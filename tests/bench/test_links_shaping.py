"""When frames arrive on emulated links: by the clock that the test gives."""

from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orion.bench.links.profile import LinkProfile, Way
from orion.bench.links.shaping import DOWNLOAD_QUEUE_S_MAX, HELD_BYTES_MAX, Shaper

FRAME = bytes(1000)


def shaper_of(*profiles: LinkProfile) -> Shaper:
    return Shaper(profiles, Random(1))


def test_a_frame_arrives_after_its_senders_delay() -> None:
    shaper = shaper_of(LinkProfile(delay_ms=30), LinkProfile())
    shaper.offer(10.0, 0, 1, b"there")
    assert shaper.next_s() == pytest.approx(10.03)
    assert shaper.due(10.029) == []
    assert shaper.due(10.031) == [(1, b"there")]
    shaper.offer(10.031, 1, 0, b"back")
    assert shaper.due(10.031) == [(0, b"back")]
    assert shaper.next_s() is None
    assert (shaper.num_delivered, shaper.num_dropped) == (2, 0)


def test_a_download_takes_its_frames_one_after_the_other_and_drops_what_it_cannot_queue() -> None:
    shaper = shaper_of(LinkProfile(), LinkProfile(), LinkProfile(download_mbit=8.0))  # a millisecond for each frame
    for _ in range(5):
        shaper.offer(0.0, 0, 2, FRAME)
        shaper.offer(0.0, 1, 2, FRAME)
    assert len(shaper.due(0.0051)) == 5
    assert len(shaper.due(0.0101)) == 5
    for _ in range(2000):
        shaper.offer(1.0, 0, 2, FRAME)
    assert shaper.num_dropped == pytest.approx(2000 - 1000 * DOWNLOAD_QUEUE_S_MAX, abs=2)


def test_a_stall_holds_everything_back_and_then_lets_it_go_at_once() -> None:
    shaper = shaper_of(LinkProfile(stall_every_s=1.0, stall_ms=200.0), LinkProfile())
    late_s = []
    for index in range(20_000):
        sent_s = index / 1000
        shaper.offer(sent_s, 0, 1, FRAME)
        arrival_s = max(sent_s, shaper.next_s() or sent_s)
        late_s.append(arrival_s - sent_s)
        assert shaper.due(arrival_s), "the frame arrives when it is said to"
    assert max(late_s) == pytest.approx(0.2, abs=2e-3)
    # A fifth of a second out of every 1.2, over twenty seconds.
    assert 0.08 < sum(late > 0 for late in late_s) / len(late_s) < 0.27


@pytest.mark.parametrize(("way", "passes"), [(Way.OUT, (1, 0)), (Way.IN, (0, 1)), (Way.BOTH, None)])
def test_a_cut_link_lets_nothing_through_that_way(way: Way, passes: tuple[int, int] | None) -> None:
    shaper = shaper_of(LinkProfile(delay_ms=10), LinkProfile(delay_ms=10))
    shaper.offer(0.0, 0, 1, b"under way")
    shaper.offer(0.0, 1, 0, b"under way")
    shaper.cut(0, way)
    shaper.offer(0.0, 0, 1, b"sent later")
    shaper.offer(0.0, 1, 0, b"sent later")
    receivers = [receiver for receiver, _ in shaper.due(1.0)]
    assert receivers == ([] if passes is None else [passes[1]] * 2)
    assert shaper.num_dropped == 4 - len(receivers) > 0
    shaper.heal(0)
    shaper.offer(1.0, 0, 1, b"again")
    assert shaper.due(1.1) == [(1, b"again")]


def test_who_has_too_much_under_way_is_read_no_more_until_it_has_arrived() -> None:
    shaper = shaper_of(LinkProfile(delay_ms=1000), LinkProfile())
    while shaper.is_open(0):
        shaper.offer(0.0, 0, 1, bytes(60_000))
    assert shaper.num_dropped == 0
    arrived = shaper.due(1.1)
    assert HELD_BYTES_MAX <= sum(len(frame) for _, frame in arrived) < HELD_BYTES_MAX + 60_000
    assert shaper.is_open(0)


@given(
    st.lists(st.tuples(st.floats(0, 0.1), st.integers(0, 2), st.integers(0, 2)), max_size=60),
    st.integers(0, 2**32),
)
def test_frames_of_a_pair_keep_their_order_and_none_is_lost(steps: list[tuple[float, int, int]], seed: int) -> None:
    profile = LinkProfile(delay_ms=20, jitter_ms=50, stall_every_s=0.5, stall_ms=100)
    shaper = Shaper([profile] * 3, Random(seed))
    now_s, arrived, sent = 0.0, [], []
    for index, (pause_s, sender, receiver) in enumerate(steps):
        now_s += pause_s
        arrived += shaper.due(now_s)
        frame = bytes([sender, receiver, index])
        shaper.offer(now_s, sender, receiver, frame)
        sent.append(frame)
        shaper.check_invariants()
    arrived += shaper.due(now_s + 10.0)
    frames = [frame for _, frame in arrived]
    assert sorted(frames) == sorted(sent)
    for pair in {frame[:2] for frame in sent}:
        assert [frame for frame in frames if frame[:2] == pair] == [frame for frame in sent if frame[:2] == pair]


@pytest.mark.parametrize("wrong", [{"upload_mbit": 0.0}, {"delay_ms": -1.0}, {"download_mbit": float("nan")}])
def test_a_link_that_cannot_be_is_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="LinkProfile"):
        LinkProfile(**wrong)
