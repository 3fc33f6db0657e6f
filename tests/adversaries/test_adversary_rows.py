"""Rows of the table: means over seeds, and bars that no luck of one seed hides."""

from dataclasses import replace

import pytest

from orion.simulator.adversaries.rows import EARNINGS_BEFORE_MAX, Row, rows_of
from orion.simulator.adversaries.trial import Trial

TRIAL = Trial(
    name="some",
    share=0.25,
    num_attacks=3,
    effort=1.0,
    detected_after_outer_steps=1,
    earnings_before=0.9,
    earnings_after=0.0,
    honest_spread=0.1,
    honest_punished=0,
    honest_checks=9,
    honest_failed=0,
    loss=2.0,
    loss_effect=0.1,
    reasons=(),
    outvoted=0,
    pay=(),
    luck={},
)


def test_one_row_for_each_attack_and_share_of_all_its_seeds() -> None:
    many = replace(TRIAL, share=0.3)
    rows = rows_of([TRIAL, replace(TRIAL, loss_effect=0.3), many])

    assert [(row.share, len(row.trials)) for row in rows] == [(0.25, 2), (0.3, 1)]
    assert rows[0].loss_effect == pytest.approx(0.2)
    assert rows[0].faults() == ()


def test_a_trial_without_a_pay_day_says_nothing_of_pay() -> None:
    row = Row((TRIAL, replace(TRIAL, earnings_before=None, honest_spread=None), replace(TRIAL, earnings_before=0.5)))

    assert row.earnings_before == pytest.approx(0.7)
    assert row.earnings_before_error == pytest.approx(0.2)
    assert row.honest_spread == pytest.approx(0.1)
    assert Row((replace(TRIAL, earnings_before=None),)).earnings_before is None


def test_a_single_seed_has_no_error() -> None:
    assert Row((TRIAL,)).earnings_before_error is None


def test_what_was_not_always_found_was_not_found() -> None:
    slow = replace(TRIAL, detected_after_outer_steps=4)
    assert Row((TRIAL, slow)).detected_after_outer_steps == 4
    assert Row((TRIAL, slow, replace(TRIAL, detected_after_outer_steps=None))).detected_after_outer_steps is None


@pytest.mark.parametrize(
    ("changes", "part"),
    [
        ({"num_attacks": 0}, "never happened"),
        ({"earnings_before": EARNINGS_BEFORE_MAX + 0.3}, "honest miners beside it: ± 10%"),
        ({"earnings_after": 0.3}, "after it was found"),
        ({"honest_punished": 1}, "punished"),
    ],
)
def test_a_bar_that_one_seed_breaks_for_all_is_named(changes: dict[str, float], part: str) -> None:
    (fault,) = Row((TRIAL, replace(TRIAL, **changes))).faults()  # type: ignore[arg-type]
    assert part in fault
