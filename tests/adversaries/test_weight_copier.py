"""A validator that copies others' weights earns less than those it copies, the less the later it learns them."""

from orion.common.ids import Hotkey
from orion.simulator.adversaries.copier import copier_earnings

MINERS = [Hotkey(f"5{letter * 47}") for letter in "ABCDE"]


def day(*found: int) -> dict[Hotkey, int]:
    """Weights of a day on which these miners are paid nothing."""
    return {miner: 0 if place in found else 65_535 for place, miner in enumerate(MINERS)}


CHANGING = [day(), day(), day(0), day(0), day(0, 1), day(1), day(), day(2)]


def test_weights_that_never_change_are_as_good_copied() -> None:
    # Not quite: in its first epoch it had nothing to copy, and bonds remember that.
    assert 0.99 < copier_earnings([day()], 0.1, 1) < 1.0


def test_copied_weights_earn_less_while_findings_move_them_and_less_still_when_they_are_revealed_late() -> None:
    soon, late = (copier_earnings(CHANGING, 0.1, lag_epochs) for lag_epochs in (1, 3))
    assert late < soon < 1.0


def test_nothing_is_earned_from_nothing() -> None:
    assert copier_earnings([], 0.1, 1) == 0.0
