"""Draws: everybody is reached and verified, newcomers soon, nobody is safe."""

import itertools
import random
from collections.abc import Mapping
from statistics import fmean, pstdev

import pytest
from hypothesis import given
from hypothesis import strategies as st
from working_miner import hotkey

from orion.common.config import RunSpec, ValidationRules
from orion.common.ids import Digest, Hotkey, Subject
from orion.common.ledger.scoring import scores
from orion.common.protocol.messages import Commitment
from orion.common.protocol.records import Ledger, Verdict, VerdictRecord, WorkRecord
from orion.simulator.scenarios import tiny_spec
from orion.validator.sampling import ON_TOP_SHARE, Draw, draw_checks, draw_extent

MINERS = [hotkey(number // 4, number % 4) for number in range(12)]
RULES = ValidationRules()


def run(num_outer_steps: int, num_checks: int, seed: int, joins: Mapping[Hotkey, int]) -> dict[Hotkey, list[int]]:
    """Outer steps in which each miner was verified."""
    rng = random.Random(seed)
    last_turn: dict[Hotkey, int] = {}
    verified: dict[Hotkey, list[int]] = {miner: [] for miner in MINERS}
    for outer_step in range(num_outer_steps):
        there = {miner for miner in MINERS if joins.get(miner, 0) <= outer_step}
        for draw in draw_checks(there, last_turn, outer_step, num_checks, rng, rules=RULES):
            if draw.verifies:
                last_turn[draw.hotkey] = outer_step
                verified[draw.hotkey].append(outer_step)
    return verified


@given(st.sets(st.sampled_from(MINERS)), st.integers(0, 20), st.integers(0, 30), st.randoms())
def test_draws_are_different_miners_of_those_there(
    there: set[Hotkey], num_checks: int, outer_step: int, rng: random.Random
) -> None:
    draws = draw_checks(there, {MINERS[0]: 3}, outer_step, num_checks, rng, rules=RULES)
    drawn = {draw.hotkey for draw in draws}
    usual = draws[: min(num_checks, len(there))]
    assert len(drawn) == len(draws)
    assert len(usual) <= len(draws) <= 2 * num_checks
    assert drawn <= there
    assert all(draw.verifies for draw in draws if draw.hotkey != MINERS[0]), "newcomers are always verified"
    assert {draw.hotkey for draw in draws[len(usual) :]} <= {MINERS[0]}, "on top come others only"
    assert sorted(usual, key=lambda draw: not draw.verifies) == list(usual), "what matters most is afforded first"


def test_the_draw_depends_on_the_generator_and_not_on_the_set() -> None:
    def drawn(miners: set[Hotkey], num_checks: int, seed: int) -> tuple[Draw, ...]:
        return draw_checks(miners, {}, 0, num_checks, random.Random(seed), rules=RULES)

    forward, backward = set(MINERS), set(reversed(MINERS))
    assert drawn(forward, 5, 1) == drawn(backward, 5, 1)
    assert len({drawn(forward, 1, seed) for seed in range(60)}) > 8


def test_everybody_is_verified_again_and_again() -> None:
    for seed in range(20):
        for steps in run(200, 1, seed, {}).values():
            gaps = [later - earlier for earlier, later in itertools.pairwise([-1, *steps, 200])]
            assert max(gaps) <= 100


def test_a_newcomer_is_verified_at_once() -> None:
    newcomer = MINERS[5]
    waits = [run(160, 1, seed, {newcomer: 100})[newcomer][0] - 100 for seed in range(40)]
    assert fmean(waits) < 0.5
    assert max(waits) <= 3


def test_having_just_been_verified_is_no_licence() -> None:
    verified = [steps for seed in range(30) for steps in run(200, 1, seed, {}).values()]
    soon = [later - earlier for steps in verified for earlier, later in itertools.pairwise(steps)]
    assert any(gap == 1 for gap in soon)
    # Among twelve with half a replay an outer step, a quarter of 6 in 24 by surprise alone.
    assert sum(gap <= 6 for gap in soon) > len(soon) / 8


def test_whoever_was_verified_is_drawn_on_top_while_newcomers_have_the_turns() -> None:
    known = MINERS[:6]
    last_turn = dict.fromkeys(known, 9)
    rng = random.Random(7)
    draws = [draw_checks(set(MINERS), last_turn, 10, 2, rng, rules=RULES) for _ in range(4000)]
    assert all({draw.hotkey for draw in drawn[:2]} <= set(MINERS[6:]) for drawn in draws), (
        "they take no newcomer's place"
    )
    on_top = [draw for drawn in draws for draw in drawn[2:]]
    assert len(on_top) / len(draws) == pytest.approx(2 * ON_TOP_SHARE, abs=0.03)
    assert sum(draw.verifies for draw in on_top) / len(on_top) == pytest.approx(RULES.whole_share, abs=0.04)
    assert min(shares(*on_top)[miner] for miner in known) > 0.8 / len(known)
    suspects = {known[2]: 1.0}
    draws = [draw_checks(set(MINERS), last_turn, 10, 2, rng, rules=RULES, suspicions=suspects) for _ in range(4000)]
    assert shares(*[draw for drawn in draws for draw in drawn[2:]])[known[2]] > 0.5, "a suspect soonest"


def test_a_miner_that_cannot_be_verified_takes_few_turns() -> None:
    """One that goes away whenever it is asked, among twelve with one check: it is tried twice at once, then ever more
    seldom."""
    tries = []
    for seed in range(40):
        rng = random.Random(seed)
        last_turn = dict.fromkeys(MINERS[1:], 0)
        in_vain: dict[Hotkey, int] = {}
        for outer_step in range(1, 101):
            (draw, *_) = draw_checks(set(MINERS), last_turn, outer_step, 1, rng, rules=RULES, in_vain=in_vain)
            if draw.hotkey == MINERS[0]:
                in_vain[MINERS[0]] = in_vain.get(MINERS[0], 0) + 1
                assert outer_step > 2 or draw.verifies
            elif draw.verifies:
                last_turn[draw.hotkey] = outer_step
        assert in_vain[MINERS[0]] >= 3
        tries.append(in_vain[MINERS[0]])
    # About 7 by the halving, and one turn in twelve like everybody.
    assert fmean(tries) < 20


def test_newcomers_that_were_not_tried_come_before_those_that_were() -> None:
    fresh = MINERS[:4]
    in_vain = dict.fromkeys(MINERS[4:8], 1)
    last_turn = dict.fromkeys(MINERS[6:], 3)
    for seed in range(30):
        draws = draw_checks(set(MINERS), last_turn, 4, 8, random.Random(seed), rules=RULES, in_vain=in_vain)
        assert {draw.hotkey for draw in draws[:4]} == set(fresh)
        assert {draw.hotkey for draw in draws[4:8]} == set(in_vain), "then those whose check came to nothing"
        assert all(draw.verifies for draw in draws[:8])


def shares(*drawn: Draw) -> dict[Hotkey, float]:
    hotkeys = [draw.hotkey for draw in drawn]
    return {miner: hotkeys.count(miner) / len(hotkeys) for miner in MINERS}


def test_suspects_come_first_and_everybody_keeps_a_chance() -> None:
    suspects = {MINERS[3]: 1.0, MINERS[7]: 3.0}
    last_turn = dict.fromkeys(MINERS, 9)
    rng = random.Random(4)
    draws = [draw_checks(set(MINERS), last_turn, 10, 1, rng, rules=RULES, suspicions=suspects)[0] for _ in range(4000)]
    share = shares(*draws)
    # Half the draws are the suspects', by their weight; the others are as if there were none.
    assert abs(share[MINERS[7]] - (0.5 * 0.75 + 0.5 / 12)) < 0.03
    assert abs(share[MINERS[3]] - (0.5 * 0.25 + 0.5 / 12)) < 0.03
    assert min(share.values()) > 0.5 / 12 - 0.02


def test_suspects_that_were_verified_do_not_keep_newcomers_waiting() -> None:
    rng = random.Random(6)
    newcomers = MINERS[:2]
    last_turn = dict.fromkeys(MINERS[2:], 9)
    suspects = {MINERS[7]: 3.0, newcomers[0]: 1.0}
    draws = [draw_checks(set(MINERS), last_turn, 10, 1, rng, rules=RULES, suspicions=suspects)[0] for _ in range(2000)]
    share = shares(*draws)
    assert share[newcomers[0]] + share[newcomers[1]] == 1
    assert share[newcomers[0]] > 2 * share[newcomers[1]], "of newcomers the suspect is first"


def test_a_standing_suspicion_does_not_keep_others_from_their_turn() -> None:
    rng = random.Random(5)
    last_turn = dict.fromkeys(MINERS, 0)
    for outer_step in range(1, 100):
        for draw in draw_checks(set(MINERS), last_turn, outer_step, 2, rng, rules=RULES, suspicions={MINERS[0]: 10.0}):
            if draw.verifies:
                last_turn[draw.hotkey] = outer_step
    assert min(last_turn.values()) >= 50


def test_suspects_that_cannot_be_checked_change_nothing() -> None:
    there = set(MINERS[:6])
    unknown = {MINERS[9]: 5.0, MINERS[1]: 0.0}
    for seed in range(30):
        plain = draw_checks(there, {}, 3, 2, random.Random(seed), rules=RULES)
        assert draw_checks(there, {}, 3, 2, random.Random(seed), rules=RULES, suspicions=unknown) == plain


# --- what the draws do to pay -----------------------------------------------------------------------------------------


def paid(spec: RunSpec, num_outer_steps: int, seed: int) -> list[float]:
    """Scores of honest miners who all do the same work, by the draws and by the scoring code, ÷ their mean."""
    rng = random.Random(seed)
    rules = spec.validation
    num_miners = spec.num_stages * spec.replicas
    miners = [hotkey(number // 8, number % 8) for number in range(num_miners)]
    last_turn: dict[Hotkey, int] = {}
    verdicts: list[VerdictRecord] = []
    for outer_step in range(num_outer_steps):
        for draw in draw_checks(set(miners), last_turn, outer_step, rules.checks_per_outer_step, rng, rules=rules):
            subject = Subject.WHOLE if draw.verifies else Subject.LOG
            passed = Verdict(miner=draw.hotkey, outer_step=outer_step, subject=subject, passed=True, num_operations=1)
            verdicts.append(VerdictRecord(validator=miners[0], verdict=passed))
            if draw.verifies:
                last_turn[draw.hotkey] = outer_step
    work = [
        WorkRecord(
            hotkey=miner,
            stage_index=0,
            outer_step=outer_step,
            num_microbatches=1,
            num_committed=1,
            merge=None,
            flops=1.0,
        )
        for miner in miners
        for outer_step in range(num_outer_steps)
    ]
    ledger = Ledger(
        num_entries=1,
        digest=Digest("0" * 64),
        outer_step=num_outer_steps - 1,
        work=tuple(work),
        verdicts=tuple(verdicts),
    )
    earned = scores(ledger, spec)
    return [earned[miner] / fmean(earned.values()) for miner in miners]


SWARMS = {
    "a short run": (3, 2, 1, 8, 100),
    "a run within its window": (16, 3, 8, 28, 8),
    "a long run": (16, 3, 8, 120, 4),
}
"""Stages, replicas, checks an outer step, outer steps, and how many such runs."""
SPREAD_AND_LEAST = {
    "a short run": (0.1, 0.85),
    "a run within its window": (0.2, 0.45),
    "a long run": (0.15, 0.55),
}


@pytest.mark.parametrize("name", SWARMS)
def test_honest_miners_with_equal_work_are_paid_alike(name: str) -> None:
    num_stages, replicas, num_checks, num_outer_steps, num_runs = SWARMS[name]
    spec = tiny_spec(checks_per_outer_step=num_checks)
    spec = spec.model_copy(update={"num_stages": num_stages, "replicas": replicas})
    runs = [paid(spec, num_outer_steps, seed) for seed in range(num_runs)]
    spread, least = pstdev(share for run in runs for share in run), fmean(min(run) for run in runs)
    assert spread < SPREAD_AND_LEAST[name][0]
    assert least > SPREAD_AND_LEAST[name][1]


def rules(replay_ops_max: int = 16, whole_share: float = 0.0) -> ValidationRules:
    return ValidationRules(replay_ops_max=replay_ops_max, whole_share=whole_share)


def commitment(num_entries: int, *, num_kept: int | None = None, is_final: bool = True) -> Commitment:
    return Commitment(
        outer_step=0,
        num_entries=num_entries,
        num_applied=0,
        num_contributed=0,
        num_kept=num_entries if num_kept is None else num_kept,
        root=Digest("0" * 64),
        is_final=is_final,
    )


@given(st.integers(1, 10_000), st.integers(1, 64), st.integers(1, 20_000), st.booleans(), st.randoms())
def test_what_is_replayed_is_within_the_log_and_what_can_be_afforded(
    num_entries: int, most: int, affordable: int, verifies: bool, rng: random.Random
) -> None:
    extent = draw_extent(commitment(num_entries), rules(most, 0.5), affordable, rng, verifies=verifies)
    assert 1 <= extent.num_operations <= min(num_entries, affordable)
    assert extent.num_operations == num_entries if extent.is_whole else extent.num_operations <= most
    assert extent.is_whole == (verifies and num_entries <= affordable)


def test_every_length_of_prefix_is_drawn() -> None:
    rng = random.Random(0)
    assert {
        draw_extent(commitment(100), rules(16), 1000, rng, verifies=True).num_operations for _ in range(400)
    } == set(range(1, 17))


def test_only_what_is_there_and_affordable_is_replayed_wholly() -> None:
    rng, every = random.Random(0), rules(whole_share=1.0)
    assert draw_extent(commitment(100), every, 100, rng, verifies=True).is_whole
    assert not draw_extent(commitment(100), every, 100, rng, verifies=False).is_whole
    assert not draw_extent(commitment(100), every, 99, rng, verifies=True).is_whole
    assert not draw_extent(commitment(100, num_kept=99), every, 100, rng, verifies=True).is_whole
    assert draw_extent(commitment(100, is_final=False), every, 100, rng, verifies=True).is_whole
    assert not draw_extent(commitment(100), rules(whole_share=0.0), 100, rng, verifies=True).is_whole


@pytest.mark.parametrize(("whole_share", "share"), [(0.3, 0.3), (1.0, 1.0), (0.0, 1.0)])
def test_draws_that_verify_have_their_share(whole_share: float, share: float) -> None:
    """All of them, where the beginning of a log is all that is ever replayed."""
    rng = random.Random(0)
    last_turn = dict.fromkeys(MINERS, 9)
    draws = [
        draw_checks(set(MINERS), last_turn, 10, 1, rng, rules=rules(whole_share=whole_share))[0] for _ in range(1000)
    ]
    assert sum(draw.verifies for draw in draws) / 1000 == pytest.approx(share, abs=0.05)
