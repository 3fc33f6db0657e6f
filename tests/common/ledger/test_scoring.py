"""Scores and chain weights: what must hold for every ledger and every subnet, and why cheating does not pay."""

import math
from functools import cache
from itertools import product
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from orion.common.config import RunSpec
from orion.common.ids import Digest, Hotkey, Subject
from orion.common.ledger.scoring import (
    ABSENT_FACTOR,
    check_rate,
    expected_pay,
    gain_of_cheating,
    merge_factor,
    scores,
    turn_outer_steps,
    window_start,
)
from orion.common.ledger.weights import U16_MAX, as_u16, chain_weights
from orion.common.protocol.records import (
    Ledger,
    MergeShare,
    Verdict,
    VerdictRecord,
    WorkRecord,
)

WINDOW = 5
DIGEST = Digest("0" * 64)
RUNS = Path(__file__).parents[3] / "runs"


def make_spec(window: int = WINDOW, **validation: object) -> RunSpec:
    """By default unverified work counts in full, so that what else decides a score can be looked at by itself."""
    rules = {"score_window_outer_steps": window, "unverified_factor": 1.0, **validation}
    return RunSpec.load(RUNS / "local.toml", {"validation": rules})


SPEC = make_spec()


def hotkey(kind: str, number: int) -> Hotkey:
    return Hotkey("5" + f"{kind}{number + 1}".ljust(47, "x"))


MINERS = [hotkey("Miner", number) for number in range(4)]
VALIDATORS = [hotkey("Checker", number) for number in range(3)]
NOBODY = hotkey("Nobody", 1)


def work(
    miner: Hotkey, outer_step: int, flops: float, *, committed: int = 4, merge: MergeShare | None = None
) -> WorkRecord:
    return WorkRecord(
        hotkey=miner,
        stage_index=0,
        outer_step=outer_step,
        num_microbatches=4,
        num_committed=committed,
        merge=merge,
        flops=flops,
    )


def verdict(
    validator: Hotkey,
    miner: Hotkey,
    outer_step: int,
    passed: bool,
    *,
    subject: Subject = Subject.LOG,
    num_operations: int = 1,
) -> VerdictRecord:
    return VerdictRecord(
        validator=validator,
        verdict=Verdict(
            miner=miner, outer_step=outer_step, passed=passed, num_operations=num_operations, subject=subject
        ),
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
    st.builds(work, st.sampled_from(MINERS), st.integers(0, 12), st.floats(0, 1e20), committed=st.integers(0, 6)),
    max_size=12,
)
verdict_lists = st.lists(
    st.builds(
        verdict,
        st.sampled_from(VALIDATORS),
        st.sampled_from(MINERS),
        st.integers(0, 12),
        st.booleans(),
        subject=st.sampled_from(Subject),
        num_operations=st.integers(0, 4),
    ),
    max_size=8,
    unique_by=lambda record: (
        record.validator,
        record.verdict.miner,
        record.verdict.outer_step,
        record.verdict.subject,
    ),
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


def test_a_failed_check_leaves_nothing_until_it_leaves_the_window() -> None:
    records = [work(miner, outer_step, 1.0) for miner in MINERS[:2] for outer_step in range(16)]
    caught = [verdict(VALIDATORS[0], MINERS[0], 7, False), verdict(VALIDATORS[0], MINERS[1], 7, True)]
    for outer_step in range(7, 12):
        assert scores(ledger(records, caught, outer_step), SPEC) == {MINERS[0]: 0.0, MINERS[1]: 5.0}
    assert scores(ledger(records, caught, 12), SPEC) == {MINERS[0]: 5.0, MINERS[1]: 5.0}


@pytest.mark.parametrize(("committed", "score"), [(0, 0.0), (1, 25.0), (4, 100.0), (9, 100.0)])
def test_only_what_can_be_checked_counts(committed: int, score: float) -> None:
    assert scores(ledger([work(MINERS[0], 9, 100.0, committed=committed)]), SPEC) == {MINERS[0]: score}


def merged(num_merged: int, num_agreed: int, num_settled: int = 4, num_asked: int = 4) -> MergeShare:
    return MergeShare(num_settled=num_settled, num_merged=num_merged, num_asked=num_asked, num_agreed=num_agreed)


@pytest.mark.parametrize(
    ("share", "factor"),
    [
        (None, 1.0),
        (merged(4, 4), 1.0),
        (merged(0, 4), ABSENT_FACTOR),
        (merged(4, 0), ABSENT_FACTOR),
        (merged(0, 0), ABSENT_FACTOR**2),
        (merged(2, 4), (1 + ABSENT_FACTOR) / 2),
        (merged(4, 0, num_asked=0), 1.0),
        (merged(0, 4, num_settled=0), 1.0),
    ],
)
def test_taking_part_in_merges_counts(share: MergeShare | None, factor: float) -> None:
    assert merge_factor(share) == factor
    assert scores(ledger([work(MINERS[0], 9, 8.0, merge=share)]), SPEC) == {MINERS[0]: 8.0 * factor}


def test_validators_outvote_each_other_on_the_same_check() -> None:
    records = [work(MINERS[0], 9, 1.0)]
    votes = [verdict(VALIDATORS[number], MINERS[0], 9, passed) for number, passed in enumerate((False, True, True))]
    assert scores(ledger(records, votes), SPEC) == {MINERS[0]: 1.0}
    assert scores(ledger(records, votes[:2]), SPEC) == {MINERS[0]: 0.0}


def test_whoever_looked_at_less_outvotes_nobody() -> None:
    records = [work(MINERS[0], 9, 1.0)]
    shallow = [verdict(VALIDATORS[number], MINERS[0], 9, True, num_operations=3) for number in (1, 2)]
    caught = verdict(VALIDATORS[0], MINERS[0], 9, False, num_operations=4)
    assert scores(ledger(records, [caught, *shallow]), SPEC) == {MINERS[0]: 0.0}
    other_subject = [verdict(VALIDATORS[number], MINERS[0], 9, True, subject=Subject.WHOLE) for number in (1, 2)]
    assert scores(ledger(records, [caught, *other_subject]), SPEC) == {MINERS[0]: 0.0}
    drawn = [
        verdict(VALIDATORS[number], MINERS[0], 9, passed, subject=Subject.REDUCTION)
        for number, passed in enumerate((False, True, True))
    ]
    assert scores(ledger(records, drawn), SPEC) == {MINERS[0]: 0.0}


# --- why cheating does not pay ----------------------------------------------------------------------------------------


@cache
def others_checked(outer_step: int, num: int) -> list[VerdictRecord]:
    return [verdict(VALIDATORS[0], hotkey("Bystander", number), outer_step, True) for number in range(num)]


def pay_by_the_rule(share: float, found: float, spec: RunSpec) -> float:
    """Expected score of a cheat ÷ an honest miner's, every course of a window weighed, by the scoring code itself.

    In a course each outer step of both miners is replayed wholly or not, and the cheat's is honest or not. The rest of
    an outer step's checks looks at others.
    """
    window, num_checks = spec.validation.score_window_outer_steps, spec.validation.checks_per_outer_step
    records = [work(miner, outer_step, 1.0) for miner in MINERS[:2] for outer_step in range(window)]
    expected = {miner: 0.0 for miner in MINERS[:2]}
    chances = {None: 1 - found, True: found * (1 - share), False: found * share}
    for course in product(chances, repeat=window):
        for miner, outcomes in ((MINERS[0], course), (MINERS[1], [None if each is None else True for each in course])):
            looks = [
                verdict(VALIDATORS[0], miner, step, outcome, subject=Subject.WHOLE)
                for step, outcome in enumerate(outcomes)
                if outcome is not None
            ]
            for step, outcome in enumerate(outcomes):
                looks += others_checked(step, num_checks - (outcome is not None))
            earned = scores(ledger(records, looks, window - 1), spec)[miner]
            expected[miner] += math.prod(chances[outcome] for outcome in course) * earned
    return expected[MINERS[0]] / expected[MINERS[1]]


@settings(max_examples=30, deadline=None)
@given(st.floats(0, 1), st.floats(0, 1), st.integers(1, 4), st.sampled_from([1, 2, 3, 6]), st.sampled_from([0.1, 0.5]))
def test_the_arithmetic_is_that_of_the_scores(
    share: float, found: float, window: int, num_checks: int, factor: float
) -> None:
    spec = make_spec(window, unverified_factor=factor, checks_per_outer_step=num_checks)
    assert pay_by_the_rule(share, found, spec) == pytest.approx(expected_pay(share, found, spec), abs=1e-9)


@pytest.mark.parametrize("run_file", sorted(RUNS.glob("*.toml")), ids=lambda path: path.stem)
@given(share=st.floats(0.001, 1))
def test_cheating_pays_at_no_share_in_any_run_that_ships(run_file: Path, share: float) -> None:
    spec = RunSpec.load(run_file)
    assert gain_of_cheating(share, check_rate(spec) * spec.validation.whole_share, spec) < 0


def test_too_few_checks_are_seen() -> None:
    spec = swarm_spec(48, 1, window=50)
    found = check_rate(spec) * spec.validation.whole_share
    assert gain_of_cheating(1.0, found, spec) > 0
    assert gain_of_cheating(0.0, 0.5, spec) == 0
    assert check_rate(make_spec(checks_per_outer_step=3)) == 0.5
    assert check_rate(make_spec(checks_per_outer_step=3), num_validators=2) == 0.75


def swarm_spec(num_miners: int, num_checks: int, *, window: int) -> RunSpec:
    """Of one stage."""
    spec = make_spec(window, checks_per_outer_step=num_checks, unverified_factor=0.1)
    return spec.model_copy(update={"num_stages": 1, "replicas": num_miners})


@pytest.mark.parametrize(
    ("num_miners", "num_checks", "pay", "gain"),
    [
        (6, 1, 0.001, -0.099),
        (22, 1, 0.049, -0.051),
        (22, 2, 0.012, -0.088),
        (48, 1, 0.127, 0.027),
        (48, 2, 0.055, -0.045),
        (48, 4, 0.015, -0.085),
        (48, 8, 0.001, -0.099),
    ],
)
def test_the_table_of_the_guide_is_that_of_the_arithmetic(
    num_miners: int, num_checks: int, pay: float, gain: float
) -> None:
    spec = swarm_spec(num_miners, num_checks, window=50)
    found = check_rate(spec) * spec.validation.whole_share
    assert expected_pay(1.0, found, spec) == pytest.approx(pay, abs=5e-4)
    assert gain_of_cheating(1.0, found, spec) == pytest.approx(gain, abs=5e-4)
    most = max(gain_of_cheating(number / 100, found, spec) for number in range(1, 101))
    assert (most > 0) == (gain > 0), "where it does not pay to cheat always, it does not pay to cheat now and then"


# --- chain weights ----------------------------------------------------------------------------------------------------

OWNER = 7
UIDS = {miner: uid for uid, miner in enumerate(MINERS)}
score_maps = st.dictionaries(st.sampled_from([*MINERS, NOBODY]), st.floats(0, 1e30))


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
    assert chain_weights({NOBODY: 1.0}, UIDS, OWNER, 0.0, 1.0) == {OWNER: 1.0}
    assert chain_weights({}, UIDS, None, 0.2, 1.0) == {}
    owner_mines = chain_weights(earned, UIDS, 0, 0.2, 1.0)
    assert owner_mines == {0: pytest.approx(0.8, abs=1e-4), 1: pytest.approx(0.2, abs=1e-4)}


def test_shares_below_the_chain_s_resolution_are_dropped() -> None:
    assert chain_weights({MINERS[0]: 1.0, MINERS[1]: 1e-7}, UIDS, None, 0.0, 1.0) == {0: 1.0}


@pytest.mark.parametrize("score", [-1.0, math.nan, math.inf])
def test_impossible_scores_are_refused(score: float) -> None:
    with pytest.raises(ValueError, match="score"):
        chain_weights({MINERS[0]: score}, UIDS, None, 0.0, 1.0)


def test_work_counts_little_until_a_replay_has_passed_in_the_window() -> None:
    spec = make_spec(unverified_factor=0.1)
    miner, other = MINERS[:2]
    records = [work(each, outer_step, 10.0) for each in (miner, other) for outer_step in (8, 9)]
    checked = verdict(VALIDATORS[0], miner, 8, True, subject=Subject.WHOLE)
    assert scores(ledger(records, [checked]), spec) == {miner: 20.0, other: 2.0}
    assert scores(ledger(records), spec) == {miner: 2.0, other: 2.0}, "nobody is worse off than the others"
    reduced = verdict(VALIDATORS[0], miner, 8, True, subject=Subject.REDUCTION)
    assert scores(ledger(records, [reduced]), spec) == {miner: 2.0, other: 2.0}, "a mean says nothing of a log"
    beginning = verdict(VALIDATORS[0], miner, 8, True)
    assert scores(ledger(records, [beginning]), spec) == {miner: 2.0, other: 2.0}, "its upload may be another's"
    without_whole = make_spec(unverified_factor=0.1, whole_share=0.0)
    assert scores(ledger(records, [beginning]), without_whole) == {miner: 20.0, other: 2.0}
    long_ago = verdict(VALIDATORS[0], miner, 9 - WINDOW, True, subject=Subject.WHOLE)
    assert scores(ledger(records, [long_ago]), spec) == {miner: 2.0, other: 2.0}
    failed = verdict(VALIDATORS[1], miner, 9, False)
    assert scores(ledger(records, [checked, failed]), spec) == {miner: 0.0, other: 2.0}


def test_work_counts_in_full_up_to_a_turn_after_the_newest_verified_outer_step() -> None:
    spec = make_spec(10, unverified_factor=0.1, checks_per_outer_step=3)
    assert turn_outer_steps(spec) == 2
    records = [work(MINERS[0], outer_step, 10.0) for outer_step in range(10)]
    looks = [verdict(VALIDATORS[0], MINERS[0], outer_step, True, subject=Subject.WHOLE) for outer_step in (1, 4)]
    others = [record for outer_step in range(10) for record in others_checked(outer_step, 2 + (outer_step > 4))]
    assert scores(ledger(records, looks + others), spec) == {MINERS[0]: pytest.approx(73.0)}, "two after, then a tenth"
    assert scores(ledger(records, looks[:1] + others), spec) == {MINERS[0]: pytest.approx(55.0)}, "three turns of two"
    later = verdict(VALIDATORS[1], MINERS[0], 9, True, subject=Subject.WHOLE)
    assert scores(ledger(records, [*looks, *others, later]), spec) == {MINERS[0]: 100.0}, "nothing is lost for good"


def test_nobody_loses_pay_where_validators_check_less_than_they_should() -> None:
    spec = make_spec(10, unverified_factor=0.1, checks_per_outer_step=3)
    records = [work(MINERS[0], outer_step, 10.0) for outer_step in range(10)]
    looked = verdict(VALIDATORS[0], MINERS[0], 1, True, subject=Subject.WHOLE)
    assert scores(ledger(records, [looked]), spec) == {MINERS[0]: 100.0}
    usual = [
        verdict(validator, hotkey("Bystander", number), 7, True) for validator in VALIDATORS[:3] for number in range(3)
    ]
    assert scores(ledger(records, [looked, *usual]), spec) == {MINERS[0]: pytest.approx(73.0)}
    more_than_usual = others_checked(7, 7)
    assert scores(ledger(records, [looked, *more_than_usual]), spec) == {MINERS[0]: 100.0}, "nor where it checks more"
    means = [
        verdict(VALIDATORS[0], hotkey("Reducer", number), 2, True, subject=Subject.REDUCTION) for number in range(9)
    ]
    assert scores(ledger(records, [looked, *means]), spec) == {MINERS[0]: 100.0}, "these are nobody's turn"


def test_a_turn_is_the_time_in_which_everybody_can_be_checked_once() -> None:
    assert turn_outer_steps(swarm_spec(48, 8, window=50)) == 6
    assert turn_outer_steps(swarm_spec(6, 1, window=50)) == 6
    assert turn_outer_steps(swarm_spec(21, 14, window=6)) == 1
    assert turn_outer_steps(swarm_spec(3, 4, window=6)) == 0
    assert turn_outer_steps(swarm_spec(3, 0, window=6)) == 0


@given(works, verdict_lists, st.sampled_from(MINERS), st.integers(0, 9))
def test_a_passed_replay_costs_its_miner_nothing(
    records: list[WorkRecord], verdicts: list[VerdictRecord], miner: Hotkey, outer_step: int
) -> None:
    spec = make_spec(unverified_factor=0.1)
    before = scores(ledger(records, verdicts), spec)
    passed = verdict(hotkey("Checker", 7), miner, outer_step, True, subject=Subject.WHOLE, num_operations=9)
    after = scores(ledger(records, [*verdicts, passed]), spec)
    assert after.get(miner, 0.0) >= before.get(miner, 0.0)
