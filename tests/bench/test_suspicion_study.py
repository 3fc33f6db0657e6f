"""An attacker in a simulated swarm is suspected by real signs, and so checked earlier than by turns alone."""

import random
from statistics import fmean

from orion.bench.suspicion_study import OUTER_STEPS, first_check, format_row, suspicion_report, suspicion_row
from orion.common.ids import Hotkey

MINERS = [Hotkey(f"miner {place}") for place in range(12)]


def mean_first_check(suspicion: float) -> float:
    suspicions = {step: {MINERS[3]: suspicion} for step in range(OUTER_STEPS)} if suspicion else {}
    rng = random.Random(1)
    return fmean(first_check(MINERS, MINERS[3], suspicions, rng, num_seen=OUTER_STEPS) for _ in range(1000))


def test_by_turns_the_first_check_comes_in_the_middle_and_under_suspicion_at_once() -> None:
    assert 6.0 < mean_first_check(0.0) < 8.5
    assert mean_first_check(3.0) < 2.5


def test_random_tensors_are_suspected_and_checked_much_earlier() -> None:
    row = suspicion_row("random tensors", [1], outer_steps=4, num_draws=400)
    assert row.num_attacks > 0
    assert row.suspected >= 0.5
    assert row.others_suspected <= 0.35
    assert 1.5 * row.first_check_rounds < row.first_check_rounds_by_turns
    assert row.recheck_chance > 3.0 * row.recheck_chance_by_turns
    assert suspicion_report([row], 1)["num_seeds"] == 1
    assert format_row(row).startswith("random tensors: suspected in ")
