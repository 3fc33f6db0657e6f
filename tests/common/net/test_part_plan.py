"""Parts: how an object is cut, which part is sent when, again or twice, and how fast transfers have been."""

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orion.common.net.bandwidth import BandwidthMeter
from orion.common.net.body_slice import BodySlice
from orion.common.net.part_layout import PART_BYTES, part_ranges, part_size
from orion.common.net.part_plan import (
    ATTEMPTS_MAX,
    HEDGE_FACTOR,
    HEDGE_MIN_S,
    HEDGE_UNKNOWN_S,
    Effect,
    Pace,
    PartPlan,
    SendPart,
    StopPart,
)
from orion.common.protocol.codec import Body
from orion.common.protocol.fields import OBJECT_PARTS_MAX

# --- how an object is cut


@given(st.integers(0, 2**42), st.integers(1, 2**26))
def test_parts_cover_an_object_exactly_once(size_bytes: int, wanted_bytes: int) -> None:
    part_bytes = part_size(size_bytes, wanted_bytes)
    assert part_bytes >= wanted_bytes
    ranges = part_ranges(size_bytes, part_bytes)
    assert 1 <= len(ranges) <= OBJECT_PARTS_MAX
    assert ranges[0].start == 0 and ranges[-1].stop == size_bytes
    assert all(before.stop == after.start for before, after in pairwise(ranges))
    assert all(len(part) == part_bytes for part in ranges[:-1])


def test_what_cannot_be_cut_is_refused() -> None:
    for size_bytes, part_bytes in ((10, 0), (OBJECT_PARTS_MAX + 1, 1)):
        with pytest.raises(ValueError, match="parts"):
            part_ranges(size_bytes, part_bytes)
    assert part_size(OBJECT_PARTS_MAX * PART_BYTES) == PART_BYTES


@given(st.lists(st.binary(max_size=20), max_size=5), st.data(), st.integers(1, 9))
def test_a_slice_holds_a_body_s_bytes(pieces: list[bytes], data: st.DataObject, chunk_bytes: int) -> None:
    whole = b"head" + b"".join(pieces)
    body = Body(b"head", tuple(memoryview(piece) for piece in pieces), len(whole), "")
    start = data.draw(st.integers(0, len(whole)))
    part = BodySlice(body, range(start, data.draw(st.integers(start, len(whole)))))
    chunks = list(part.chunks(chunk_bytes))
    assert b"".join(chunks) == whole[start : start + part.size_bytes]
    assert all(0 < len(chunk) <= chunk_bytes for chunk in chunks)


# --- which part is sent when


class Driver:
    """Carries a plan's effects out in its own order of events, and keeps count of what is under way."""

    def __init__(self, sizes: dict[int, int], in_flight_max: int = 4, pace: Pace | None = None) -> None:
        self.plan = PartPlan(sizes, pace or Pace(), in_flight_max)
        self.now_s = 0.0
        self.under_way: list[SendPart] = []
        self.moved: list[int] = []
        self.take(self.plan.begin())

    def take(self, effects: list[Effect]) -> None:
        for effect in effects:
            if isinstance(effect, SendPart):
                assert effect.index not in self.moved, "a part that is there is sent again"
                self.under_way.append(effect)
                self.plan.started(effect.index, effect.attempt, self.now_s)
            else:
                self.under_way = [s for s in self.under_way if (s.index, s.attempt) != (effect.index, effect.attempt)]
        self.plan.check_invariants()

    def move(self, send: SendPart) -> None:
        self.under_way.remove(send)
        self.moved.append(send.index)
        self.take(self.plan.moved(send.index, send.attempt, self.now_s))

    def fail(self, send: SendPart) -> None:
        self.under_way.remove(send)
        self.take(self.plan.failed(send.index, send.attempt))

    def look(self) -> None:
        self.take(self.plan.looked(self.now_s))


@given(st.dictionaries(st.integers(0, 50), st.integers(0, 2**24), max_size=20), st.integers(1, 6), st.data())
def test_every_part_is_moved_once_or_one_has_failed_too_often(
    sizes: dict[int, int], in_flight_max: int, data: st.DataObject
) -> None:
    driver = Driver(sizes, in_flight_max)
    for _ in range(20 * (len(sizes) + 1)):
        if driver.plan.is_done or driver.plan.has_failed:
            break
        assert driver.under_way, "the plan waits for nothing"
        driver.now_s += data.draw(st.sampled_from([0.0, 0.1, 5.0, 60.0]))
        match data.draw(st.sampled_from(["move", "move", "move", "fail", "look"])):
            case "move":
                driver.move(data.draw(st.sampled_from(driver.under_way)))
            case "fail":
                driver.fail(data.draw(st.sampled_from(driver.under_way)))
            case _:
                driver.look()
    if not driver.plan.has_failed:
        while driver.under_way:
            driver.move(driver.under_way[0])
        assert driver.plan.is_done and sorted(driver.moved) == sorted(sizes)


@given(st.integers(1, 8), st.integers(1, 6), st.data())
def test_words_of_attempts_that_are_over_change_nothing(
    num_parts: int, in_flight_max: int, data: st.DataObject
) -> None:
    driver = Driver(dict.fromkeys(range(num_parts), 1000), in_flight_max)
    driver.move(data.draw(st.sampled_from(driver.under_way)))
    (index,) = driver.moved
    for attempt in (0, 1, 7):
        assert driver.plan.moved(index, attempt, 1.0) == driver.plan.failed(index, attempt) == []
    driver.plan.check_invariants()


def test_a_slow_part_is_tried_a_second_time_and_the_first_to_come_counts() -> None:
    driver = Driver(dict.fromkeys(range(6), 1000), in_flight_max=2)
    for _ in range(4):
        driver.now_s += 2.0
        driver.move(driver.under_way[0])
    slow, other = driver.under_way
    driver.move(other)
    look_s = driver.plan.next_look_s()
    assert look_s is not None
    driver.now_s = look_s - 0.01
    driver.look()
    assert driver.under_way == [slow], "not slow yet"
    driver.now_s = look_s
    driver.look()
    (_, hedge) = driver.under_way
    assert hedge.is_hedge and hedge.index == slow.index and driver.plan.num_hedged == 1
    assert driver.plan.next_look_s() is None, "one second try at a time, and no third"
    assert driver.plan.moved(hedge.index, hedge.attempt, driver.now_s) == [StopPart(slow.index, slow.attempt)]
    assert driver.plan.is_done


def test_without_anything_to_compare_with_a_stalled_part_is_tried_again_in_the_end() -> None:
    driver = Driver({0: 1000})
    assert driver.plan.next_look_s() == HEDGE_UNKNOWN_S
    driver.now_s = HEDGE_UNKNOWN_S
    driver.look()
    assert [send.is_hedge for send in driver.under_way] == [False, True]
    driver.fail(driver.under_way[0])
    assert [send.is_hedge for send in driver.under_way] == [True], "the other try goes on"
    driver.fail(driver.under_way[0])
    assert [send.delay_s > 0 for send in driver.under_way] == [True], "then it begins anew, after a pause"


def test_a_part_that_always_fails_ends_the_transfer() -> None:
    driver = Driver({0: 1000, 1: 1000})
    delays = []
    for _ in range(ATTEMPTS_MAX):
        (send,) = (send for send in driver.under_way if send.index == 0)
        delays.append(send.delay_s)
        driver.fail(send)
    assert driver.plan.has_failed and not driver.plan.is_done
    assert delays == sorted(delays) and delays[0] == 0


def test_only_parts_of_like_size_are_compared() -> None:
    pace = Pace()
    for _ in range(5):
        pace.add(1000, 0.01)
    assert pace.slow_after_s(1000) == HEDGE_MIN_S
    assert pace.slow_after_s(100_000) == HEDGE_UNKNOWN_S
    for seconds in (1.0, 2.0, 9.0):
        pace.add(100_000, seconds)
    assert pace.slow_after_s(150_000) == HEDGE_FACTOR * 2.0


# --- how fast transfers have been


def test_bandwidth_is_that_of_the_time_in_which_anything_moved() -> None:
    meter = BandwidthMeter()
    assert meter.bytes_per_s is None
    meter.began(10.0)
    meter.began(10.5)  # beside the first: the link is shared
    meter.moved(3_000_000, 11.0)
    meter.ended(11.0)
    meter.moved(1_000_000, 12.0)
    meter.ended(12.0)
    assert meter.bytes_per_s == pytest.approx(2e6)
    meter.began(100.0)  # idle for long: that does not count
    meter.moved(64_000_000, 132.0)
    meter.ended(132.0)
    assert meter.bytes_per_s == pytest.approx(2e6)
    meter.began(200.0)
    meter.moved(64_000_000, 208.0)
    meter.ended(208.0)
    assert meter.bytes_per_s == pytest.approx((2e6 + 8e6) / 2)


def test_small_and_failed_transfers_say_nothing_of_a_link() -> None:
    meter = BandwidthMeter()
    meter.began(0.0)
    meter.moved(1000, 1.0)
    meter.ended(1.0)
    meter.began(2.0)
    meter.ended(30.0)
    assert meter.bytes_per_s is None
