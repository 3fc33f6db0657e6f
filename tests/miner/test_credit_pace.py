"""When who is turned away should come again."""

import pytest

from orion.miner.credit_pace import HINT_MAX_S, HINT_MIN_S, CreditPace

INTERVAL_S = 0.1


def paced() -> CreditPace:
    pace = CreditPace()
    for k in range(100):
        pace.freed(k * INTERVAL_S)
    return pace


LAST_S = 99 * INTERVAL_S


def test_the_hint_is_what_is_left_until_the_next_credit() -> None:
    pace = paced()
    assert pace.hint_s(LAST_S) == pytest.approx(INTERVAL_S)
    assert pace.hint_s(LAST_S + 0.06) == pytest.approx(0.04)
    assert pace.hint_s(LAST_S + 5.0) == HINT_MIN_S


def test_senders_are_told_to_come_one_after_the_other() -> None:
    pace = paced()
    hints = []
    for _ in range(3):
        hints.append(pace.hint_s(LAST_S))
        pace.turned_away(LAST_S)
    assert hints == pytest.approx([INTERVAL_S, 2 * INTERVAL_S, 3 * INTERVAL_S])
    assert pace.hint_s(LAST_S + 0.25) == pytest.approx(0.15)
    for _ in range(100):
        pace.turned_away(LAST_S)
    assert pace.hint_s(LAST_S) == HINT_MAX_S


def test_a_pause_ends_promises_and_is_no_interval() -> None:
    pace = paced()
    for _ in range(5):
        pace.turned_away(LAST_S)
    pace.paused()
    assert pace.hint_s(500.0) == pytest.approx(INTERVAL_S)
    pace.freed(500.0)
    assert pace.hint_s(500.0) == pytest.approx(INTERVAL_S)
