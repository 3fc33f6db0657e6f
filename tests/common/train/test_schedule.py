"""The inner learning rate as a pure function of the step's number."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from orion.common.train.schedule import InnerSchedule, learning_rate_factor

SCHEDULES = st.builds(
    InnerSchedule,
    shape=st.sampled_from(["cosine", "constant"]),
    num_warmup_steps=st.integers(0, 50),
    num_total_steps=st.integers(51, 500),
    floor=st.floats(0, 1),
)


def test_warm_up_then_half_a_cosine_down_to_the_floor() -> None:
    schedule = InnerSchedule(num_warmup_steps=4, num_total_steps=12, floor=0.2)

    factors = [learning_rate_factor(schedule, step) for step in (0, 1, 2, 3, 4, 8, 12, 10_000)]

    assert factors == pytest.approx([0.25, 0.5, 0.75, 1.0, 1.0, 0.6, 0.2, 0.2])


def test_constant_stays_at_the_full_rate() -> None:
    schedule = InnerSchedule(shape="constant", num_warmup_steps=2, num_total_steps=1)

    assert [learning_rate_factor(schedule, step) for step in (0, 1, 2, 100_000)] == [0.5, 1.0, 1.0, 1.0]


@given(SCHEDULES, st.integers(0, 1000))
def test_factor_never_leaves_its_range_and_falls_after_the_warm_up(schedule: InnerSchedule, step: int) -> None:
    factor = learning_rate_factor(schedule, step)

    if step < schedule.num_warmup_steps:
        assert 0 < factor <= 1
    else:
        assert schedule.floor <= factor <= 1
        assert learning_rate_factor(schedule, step + 1) <= factor


def test_a_negative_step_is_refused() -> None:
    with pytest.raises(ValueError, match="negative"):
        learning_rate_factor(InnerSchedule(), -1)


def test_a_warm_up_longer_than_the_run_is_refused() -> None:
    with pytest.raises(ValidationError, match="below num_total_steps"):
        InnerSchedule(num_warmup_steps=10, num_total_steps=10)
