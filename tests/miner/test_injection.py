"""`Injection`: near the throughput of the best constant, with far less waiting than one that is too large."""

from collections.abc import Callable

import pytest
from pipeline_kit import Constant, Pipeline, mean_seconds, rate

from orion.miner.injection import Injection, TripTimes

CREDITS = 256
SLOW_S, END_S = 150.0, 300.0
TOO_MANY = 48
CONSTANTS = (4, 8, 16, 32, TOO_MANY)


def adaptive(num_stages: int) -> Injection:
    return Injection(num_stages, CREDITS)


def run(
    make: Callable[[int], Injection], num_stages: int, replicas: int, latency_s: float, slow: tuple[float, ...] = ()
) -> tuple[float, float]:
    """Trips a second and seconds a trip; `slow` are the slownesses of the second stage's replicas."""
    pipeline = Pipeline(num_stages, replicas, latency_s, make)
    for device, slowness in zip(pipeline.stages[min(1, num_stages - 1)], slow, strict=False):
        device.slowness = slowness
    ended = pipeline.run(END_S)
    return rate(ended, END_S / 4, END_S), mean_seconds(ended, END_S / 4, END_S)


@pytest.mark.parametrize(
    ("num_stages", "replicas", "latency_s", "slow", "seconds_share"),
    [
        (3, 1, 0.01, (), 0.4),
        (3, 2, 0.01, (), 0.6),
        (3, 2, 0.2, (), 0.75),
        (4, 1, 0.2, (), 1.0),  # too many never get into a pipeline whose first stage does backward first
        (4, 3, 0.05, (), 0.75),
        (3, 2, 0.02, (3.0,), 0.4),
        (3, 2, 0.02, (2.5, 2.5), 0.2),
    ],
    ids=["near", "near pairs", "far pairs", "far", "four stages", "one slow", "slow stage"],
)
def test_nearly_as_fast_as_the_best_constant_with_less_waiting(
    num_stages: int, replicas: int, latency_s: float, slow: tuple[float, ...], seconds_share: float
) -> None:
    shape = (num_stages, replicas, latency_s, slow)
    by_constant = {num: run(lambda stages, num=num: Constant(num, stages), *shape) for num in CONSTANTS}
    best_rate = max(rate for rate, _ in by_constant.values())

    found_rate, found_s = run(adaptive, *shape)

    assert found_rate >= 0.94 * best_rate
    assert found_s <= seconds_share * by_constant[TOO_MANY][1]


def test_no_constant_is_right_everywhere() -> None:
    """What makes a constant wrong: it starves the one pipeline or floods the other."""
    for num in (8, 16):
        far, _ = run(lambda stages, num=num: Constant(num, stages), 3, 2, 0.2)
        _, slow_s = run(lambda stages, num=num: Constant(num, stages), 3, 2, 0.02, (2.5, 2.5))
        found_far, _ = run(adaptive, 3, 2, 0.2)
        _, found_slow_s = run(adaptive, 3, 2, 0.02, (2.5, 2.5))
        assert far < 0.97 * found_far
        assert slow_s > 1.2 * found_slow_s


def test_follows_a_stage_that_slows_down_and_recovers() -> None:
    pipeline = Pipeline(3, 2, 0.02, adaptive)

    def slow_down() -> None:
        for device in pipeline.stages[2]:
            device.slowness = 4.0

    def recover() -> None:
        for device in pipeline.stages[2]:
            device.slowness = 1.0

    pipeline.at(SLOW_S, slow_down)
    pipeline.at(2 * SLOW_S, recover)
    ended = pipeline.run(3 * SLOW_S)

    def targets(begin_s: float, end_s: float) -> float:
        found = [trip.target for trip in ended if begin_s <= trip.time_s < end_s]
        return sum(found) / len(found)

    before, slowed, after = (targets((k + 0.5) * SLOW_S, (k + 1) * SLOW_S) for k in range(3))
    assert slowed < 0.75 * before
    assert after > 0.8 * before
    # The slowed stage, two replicas of 4 × 0.3 s, stays busy.
    assert rate(ended, 1.5 * SLOW_S, 2 * SLOW_S) >= 0.95 * 2 / 1.2
    assert rate(ended, 2.5 * SLOW_S, 3 * SLOW_S) >= 0.94 * rate(ended, 0.5 * SLOW_S, SLOW_S)


def test_follows_miners_that_leave_and_come() -> None:
    pipeline = Pipeline(3, 4, 0.02, adaptive)

    def set_present(is_present: bool) -> None:
        for device in pipeline.stages[1][1:]:
            device.is_present = is_present

    pipeline.at(SLOW_S, lambda: set_present(False))
    pipeline.at(2 * SLOW_S, lambda: set_present(True))
    ended = pipeline.run(3 * SLOW_S)

    # One replica of the middle stage, 0.3 s a trip, is left between; and in the end there are four again.
    assert rate(ended, 1.5 * SLOW_S, 2 * SLOW_S) >= 0.97 / 0.3
    assert mean_seconds(ended, 1.5 * SLOW_S, 2 * SLOW_S) < 5.0
    assert rate(ended, 2.5 * SLOW_S, 3 * SLOW_S) >= 0.95 * rate(ended, 0.5 * SLOW_S, SLOW_S)


# --- by itself --------------------------------------------------------------------------------------------------------


def test_the_target_stays_within_stages_and_credits_whatever_is_said() -> None:
    injection = Injection(4, 10)
    assert injection.target == 4
    for _ in range(200):
        injection.ended(TripTimes(injection.target, 1.0, 1e9))
    assert injection.target == 4, "a liar that says that all was waiting"
    for _ in range(200):
        injection.ended(TripTimes(injection.target, 1.0, 0.0))
    assert injection.target == 10
    injection.ended(TripTimes(10, 0.0, 0.0))
    assert injection.target == 10, "a trip without time says nothing"
    assert Injection(4, 1).target == 1


def test_trips_while_there_was_little_to_do_say_nothing() -> None:
    injection = Injection(2, 100)
    for _ in range(100):
        injection.ended(TripTimes(injection.target, 1.0, 0.2))
    assert injection.target == 100
    for num_in_flight in range(60, 0, -1):
        injection.ended(TripTimes(num_in_flight, 1.0, 0.9))
    assert injection.target == 100


def test_leases_wait_before_they_are_needed() -> None:
    injection = Injection(3, 20)
    assert injection.wanted(num_started=0, num_waiting=0) == 4
    assert injection.wanted(num_started=3, num_waiting=1) == 0
    assert injection.wanted(num_started=3, num_waiting=0) == 1
    for k in range(50):
        injection.started(k * 0.1)
        injection.leased(0.25)
    # Five starts in the time that a lease takes, with the margin.
    assert injection.num_ahead == 6
    assert injection.wanted(num_started=3, num_waiting=5) == 1
    assert injection.wanted(num_started=18, num_waiting=0) == 2, "never beyond the credits"
    assert injection.wanted(num_started=20, num_waiting=0) == 0


def test_a_single_credit_is_leased_when_it_is_free() -> None:
    injection = Injection(3, 1)
    assert injection.wanted(num_started=0, num_waiting=0) == 1
    assert injection.wanted(num_started=0, num_waiting=1) == 0
    assert injection.wanted(num_started=1, num_waiting=0) == 0


def test_a_pause_is_no_interval() -> None:
    injection = Injection(3, 20)
    for k in range(20):
        injection.started(k * 0.1)
    injection.leased(0.1)
    ahead = injection.num_ahead
    injection.paused()
    injection.started(1000.0)
    assert injection.num_ahead == ahead
