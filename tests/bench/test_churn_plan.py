"""What the churn benchmark makes of what it saw."""

from random import Random

import pytest

from orion.bench.churn.plan import (
    Churn,
    Course,
    Pace,
    Sample,
    choose_victim,
    churn_spec,
    longest_gap_s,
    longest_stall_s,
    surviving_share,
)


def test_the_surviving_share_is_the_weakest_stages_while_all_train() -> None:
    samples = (Sample(0.0, True, (3, 3, 3)), Sample(1.0, True, (3, 2, 3)), Sample(2.0, False, (0, 0, 0)))
    assert surviving_share(Course(0.0, 3.0, (), samples), 3) == pytest.approx((1 + 2 / 3) / 2)


def test_a_stall_is_the_longest_wait_after_a_kill_and_not_before_it() -> None:
    course = Course(0.0, 40.0, (1.0, 9.0, 10.0, 11.5, 12.0, 30.0, 31.0), kills_at_s=(10.5,))
    assert longest_stall_s(course) == pytest.approx(18.0), "it began within the time that is looked at"
    early = Course(0.0, 10.4, (1.0, 9.0, 10.0, 10.3), kills_at_s=(10.1,))
    assert longest_stall_s(early) == pytest.approx(0.2)
    assert longest_gap_s(early) == pytest.approx(8.0)


def test_of_a_stall_the_time_of_merges_can_be_left_out() -> None:
    samples = tuple(Sample(float(at_s), trains, (1,)) for at_s, trains in enumerate([True, True, False, False, True]))
    course = Course(0.0, 4.0, (0.5, 4.0), samples, kills_at_s=(0.0,))
    assert longest_stall_s(course) == pytest.approx(3.5)
    assert longest_stall_s(course, in_training=True) == pytest.approx(1.5)


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
        longest_stall_in_training_s=0.8,
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
