"""What the churn benchmark makes of what it saw."""

from random import Random

import pytest

from orion.bench.churn.plan import (
    Churn,
    Course,
    Pace,
    Sample,
    Stall,
    Stretch,
    choose_victim,
    churn_spec,
    longest_calm_gap_s,
    mean_surviving_share,
    stall_after,
    surviving_share,
    throughput_ratio,
)


def sampled(*samples: tuple[float, bool, tuple[int, ...]]) -> tuple[Sample, ...]:
    return tuple(Sample(at_s, trains, 0, working) for at_s, trains, working in samples)


def test_the_surviving_share_is_the_weakest_stages_while_all_train() -> None:
    samples = sampled((0.0, True, (3, 4, 3)), (1.0, True, (3, 2, 3)), (2.0, False, (0, 0, 0)), (3.0, True, (1, 1, 1)))
    stretch = Stretch(False, 0.0, 3.0)
    assert surviving_share(Course((stretch,), (), samples), stretch, 3) == pytest.approx((1 + 2 / 3) / 2)
    crowded = sampled((0.0, True, (4, 4, 4)))
    assert surviving_share(Course((stretch,), (), crowded), stretch, 3) == 1.0


def test_a_stretch_under_blows_is_held_against_the_calm_ones_around_it() -> None:
    """The machine is twice as fast in the first half; of the capacity two thirds survive."""
    stretches = tuple(Stretch(number % 2 == 0, 30.0 * number, 30.0 * (number + 1)) for number in range(5))
    gaps_s = [0.1, 0.15, 0.1, 0.25, 0.2]  # seconds for each microbatch
    applied = tuple(
        stretch.began_s + gap_s * place
        for stretch, gap_s in zip(stretches, gaps_s, strict=True)
        for place in range(round(30.0 / gap_s))
    )
    samples = sampled(*((10.0 * number, True, (3, 2 if number // 3 % 2 else 3)) for number in range(15)))
    course = Course(stretches, applied, samples)
    assert mean_surviving_share(course, 3) == pytest.approx(2 / 3)
    possible = 30.0 * 2 / 3 * ((10.0 + 10.0) / 2 + (10.0 + 5.0) / 2)
    assert throughput_ratio(course, 3) == pytest.approx((200 + 120) / possible)
    assert course.rates_per_s(calm=True) == pytest.approx((10.0 + 10.0 + 5.0) / 3)
    assert course.rates_per_s(calm=False) == pytest.approx((200 + 120) / 60)


def test_a_stall_is_the_longest_wait_after_a_kill_and_not_before_it() -> None:
    stretches = (Stretch(True, 0.0, 10.2), Stretch(False, 10.2, 40.0))
    course = Course(stretches, (1.0, 9.0, 10.0, 11.5, 12.0, 30.0, 31.0), ())
    stall = stall_after(course, 10.5)
    assert (stall.kill_s, stall.stall_s) == (10.5, pytest.approx(18.0)), "it began within the time that is looked at"
    assert stall_after(course, 9.5).stall_s == pytest.approx(18.0)
    assert stall_after(course, 31.5).stall_s == pytest.approx(8.5), "until the end"
    early = Course((Stretch(True, 0.0, 10.4),), (1.0, 9.0, 10.0, 10.3), ())
    assert stall_after(early, 10.1).stall_s == pytest.approx(0.2)
    assert longest_calm_gap_s(early) == pytest.approx(8.0)
    assert longest_calm_gap_s(course) == pytest.approx(8.0), "what lies in a stretch under blows is none"


def test_of_a_stall_the_time_of_merges_can_be_left_out() -> None:
    samples = sampled(*((float(at_s), trains, (1,)) for at_s, trains in enumerate([True, True, False, False, True])))
    course = Course((Stretch(False, 0.0, 4.0),), (0.5, 4.0), samples)
    stall = stall_after(course, 0.2)
    assert stall.stall_s == pytest.approx(3.5)
    assert stall.in_training_s == pytest.approx(1.5)


def test_only_a_miner_that_others_can_stand_in_for_is_struck() -> None:
    rng = Random(1)
    assert choose_victim(rng, {0: ["a"], 1: ["b"], 2: []}) is None
    assert {choose_victim(rng, {0: ["a"], 1: ["b", "c"], 2: ["d"]}) for _ in range(20)} == {"b", "c"}


def test_a_spec_has_outer_steps_of_about_the_wanted_length() -> None:
    pace = Pace(forward_s=0.1, backward_s=0.2)
    spec = churn_spec(3, 3, 12.0, pace)
    seconds = spec.inner_steps * spec.microbatches_per_step * (pace.forward_s + pace.backward_s)
    assert seconds == pytest.approx(12.0, rel=0.2)


def test_bars_that_do_not_hold_are_named() -> None:
    good = Churn(
        started=10,
        applied=10,
        repaired={"rerouted": 1, "spliced": 1, "released": 0},
        cancelled=0,
        lost=0,
        throughput_ratio=0.95,
        surviving_share=0.8,
        longest_stall_s=1.0,
        stalls=(Stall(kill_s=3.0, stall_s=1.0, in_training_s=0.8),),
        longest_undisturbed_s=0.5,
        faults_fired={"kill": 1, "stop": 1, "cut": 1},
        tokens_per_s={"undisturbed": 2.0, "disturbed": 1.0},
    )
    assert good.faults() == []
    bad = Churn(
        **{
            **good.as_json(),
            "lost": 1,
            "throughput_ratio": 0.5,
            "longest_stall_s": 9.0,
            "faults_fired": {"kill": 1, "stop": 0, "cut": 1},
        }
    )
    assert len(bad.faults()) == 4
