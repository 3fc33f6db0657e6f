"""Scores and chain weights: what must hold for every ledger and every subnet."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st
from validator_world import hotkey, make_spec

from orion.common.ids import Digest, Hotkey
from orion.common.ledger.scoring import FAILED_CHECK_FACTOR, scores, window_start
from orion.common.ledger.weights import U16_MAX, as_u16, chain_weights
from orion.common.protocol.records import (
    Ledger,
    Verdict,
    VerdictRecord,
    WorkRecord,
)

WINDOW = 5
DIGEST = Digest("0" * 64)
SPEC = make_spec(validation={"score_window_outer_steps": WINDOW})
MINERS = [hotkey(number) for number in range(4)]
VALIDATORS = [hotkey(8, number) for number in range(3)]


def work(miner: Hotkey, outer_step: int, flops: float) -> WorkRecord:
    return WorkRecord(
        hotkey=miner,
        stage_index=0,
        outer_step=outer_step,
        num_microbatches=1,
        num_committed=1,
        merge=None,
        flops=flops,
    )


def verdict(validator: Hotkey, miner: Hotkey, outer_step: int, passed: bool) -> VerdictRecord:
    return VerdictRecord(
        validator=validator,
        verdict=Verdict(miner=miner, outer_step=outer_step, passed=passed, num_operations=1),
    )


def ledger(records: list[WorkRecord], verdicts: list[VerdictRecord] | None = None, outer_step: int = 9) -> Ledger:
    return Ledger(
        num_entries=1,
        digest=DIGEST,
        outer_step=outer_step,
        work=tuple(records),
        verdicts=tuple(verdicts or ()),
    )


works = st.lists(
    st.builds(work, st.sampled_from(MINERS), st.integers(0, 12), st.floats(0, 1e20)),
    max_size=12,
)
verdict_lists = st.lists(
    st.builds(verdict, st.sampled_from(VALIDATORS), st.sampled_from(MINERS), st.integers(0, 12), st.booleans()),
    max_size=8,
    unique_by=lambda record: (record.validator, record.verdict.miner, record.verdict.outer_step),
)


@given(works, verdict_lists, st.randoms())
def test_scores_do_not_depend_on_order(records: list[WorkRecord], verdicts: list[VerdictRecord], rng) -> None:  # type: ignore[no-untyped-def]
    expected = scores(ledger(records, verdicts), SPEC)
    shuffled, reshuffled = list(records), list(verdicts)
    rng.shuffle(shuffled)
    rng.shuffle(reshuffled)
    assert scores(ledger(shuffled, reshuffled), SPEC) == expected
    assert all(math.isfinite(score) and score >= 0 for score in expected.values())


@given(works, verdict_lists, st.sampled_from(MINERS), st.integers(0, 9), st.floats(0, 1e20))
def test_more_work_never_scores_less_and_changes_nobody_else(
    records: list[WorkRecord], verdicts: list[VerdictRecord], miner: Hotkey, outer_step: int, flops: float
) -> None:
    before = scores(ledger(records, verdicts), SPEC)
    after = scores(ledger([*records, work(miner, outer_step, flops)], verdicts), SPEC)
    assert after.get(miner, 0.0) >= before.get(miner, 0.0)
    assert {name: score for name, score in after.items() if name != miner} == {
        name: score for name, score in before.items() if name != miner
    }


def test_work_expires_with_the_window() -> None:
    assert window_start(9, SPEC) == 5
    records = [work(MINERS[0], outer_step, 1.0) for outer_step in range(12)]
    assert scores(ledger(records), SPEC) == {MINERS[0]: 5.0}
    assert scores(ledger(records, outer_step=3), SPEC) == {MINERS[0]: 4.0}
    assert scores(ledger(records, outer_step=40), SPEC) == {}


def test_a_failed_check_voids_the_work_up_to_it_and_costs() -> None:
    records = [work(miner, outer_step, 1.0) for miner in MINERS[:2] for outer_step in range(5, 10)]
    passed = verdict(VALIDATORS[0], MINERS[1], 7, True)
    caught = verdict(VALIDATORS[0], MINERS[0], 7, False)
    assert scores(ledger(records, [passed, caught]), SPEC) == {MINERS[0]: 2.0 * FAILED_CHECK_FACTOR, MINERS[1]: 5.0}
    again = verdict(VALIDATORS[0], MINERS[0], 5, False)
    assert scores(ledger(records, [caught, again]), SPEC)[MINERS[0]] == 2.0 * FAILED_CHECK_FACTOR**2
    caught_now = verdict(VALIDATORS[0], MINERS[0], 9, False)
    assert scores(ledger(records, [caught_now]), SPEC)[MINERS[0]] == 0.0


def test_a_failed_check_leaves_with_the_window() -> None:
    records = [work(MINERS[0], outer_step, 1.0) for outer_step in range(4, 10)]
    assert scores(ledger(records, [verdict(VALIDATORS[0], MINERS[0], 4, False)]), SPEC) == {MINERS[0]: 5.0}


def test_validators_outvote_each_other_on_the_same_check() -> None:
    records = [work(MINERS[0], 9, 1.0)]
    votes = [verdict(VALIDATORS[number], MINERS[0], 9, passed) for number, passed in enumerate((False, True, True))]
    assert scores(ledger(records, votes), SPEC) == {MINERS[0]: 1.0}
    assert scores(ledger(records, votes[:2]), SPEC) == {MINERS[0]: 0.0}


# --- chain weights ----------------------------------------------------------------------------------------------------

OWNER = 7
UIDS = {miner: uid for uid, miner in enumerate(MINERS)}
score_maps = st.dictionaries(st.sampled_from([*MINERS, hotkey(6)]), st.floats(0, 1e30))


@given(score_maps, st.sampled_from([None, OWNER, 2]), st.floats(0, 0.99), st.floats(0.01, 1))
def test_weights_add_up_and_survive_the_chain_s_rounding(
    earned: dict[Hotkey, float], owner_uid: int | None, burn_share: float, weight_max: float
) -> None:
    weights = chain_weights(earned, UIDS, owner_uid, burn_share, weight_max)
    if not weights:
        assert owner_uid is None
        return
    assert math.fsum(weights.values()) == pytest.approx(1.0)
    assert set(weights) <= {*UIDS.values(), OWNER}
    units = as_u16(weights)
    assert max(units.values()) == U16_MAX
    assert min(units.values()) >= 1
    total = sum(units.values())
    assert weights == {uid: pytest.approx(num_units / total) for uid, num_units in units.items()}


@given(score_maps, st.floats(0.3, 1))
def test_no_miner_exceeds_the_cap_where_it_can_be_kept(earned: dict[Hotkey, float], weight_max: float) -> None:
    weights = chain_weights(earned, UIDS, None, 0.0, weight_max)
    known = [score for name, score in earned.items() if score > 0 and name in UIDS]
    if len(known) * weight_max > 1 and len(weights) == len(known):
        assert max(weights.values()) <= weight_max + 2 / U16_MAX


@given(score_maps)
def test_who_has_earned_more_never_gets_less(earned: dict[Hotkey, float]) -> None:
    weights = chain_weights(earned, UIDS, OWNER, 0.1, 0.4)
    ranked = sorted((name for name in earned if name in UIDS), key=lambda name: earned[name])
    shares = [weights.get(UIDS[name], 0.0) for name in ranked]
    assert shares == sorted(shares)


def test_the_burn_share_goes_to_the_owner() -> None:
    earned = {MINERS[0]: 3.0, MINERS[1]: 1.0}
    assert chain_weights(earned, UIDS, OWNER, 0.2, 1.0) == {
        0: pytest.approx(0.6, abs=1e-4),
        1: pytest.approx(0.2, abs=1e-4),
        OWNER: pytest.approx(0.2, abs=1e-4),
    }
    assert chain_weights({}, UIDS, OWNER, 0.2, 1.0) == {OWNER: 1.0}
    assert chain_weights({hotkey(6): 1.0}, UIDS, OWNER, 0.0, 1.0) == {OWNER: 1.0}
    assert chain_weights({}, UIDS, None, 0.2, 1.0) == {}
    owner_mines = chain_weights(earned, UIDS, 0, 0.2, 1.0)
    assert owner_mines == {0: pytest.approx(0.8, abs=1e-4), 1: pytest.approx(0.2, abs=1e-4)}


def test_shares_below_the_chain_s_resolution_are_dropped() -> None:
    assert chain_weights({MINERS[0]: 1.0, MINERS[1]: 1e-7}, UIDS, None, 0.0, 1.0) == {0: 1.0}


@pytest.mark.parametrize("score", [-1.0, math.nan, math.inf])
def test_impossible_scores_are_refused(score: float) -> None:
    with pytest.raises(ValueError, match="score"):
        chain_weights({MINERS[0]: score}, UIDS, None, 0.0, 1.0)
