"""The score of every miner, from the public ledger and the run's rules alone. Pure; anybody can compute it again.

    score = 0 while a failed check is in the window, else
            Σ FLOPs of the backward passes that count × what the miner did for the merge

Within the window of `score_window_outer_steps` up to the ledger's newest outer step, a miner's backward passes of an
outer step count as far as both ends of each transfer agree and its newest commitment says that inner steps have
averaged them: so they are in its log, can be checked, and are in the pseudo-gradient that the log leads to. What was
done before the log was begun anew is not.
They count in full when its pseudo-gradient is in the mean of every partition and its bytes stand in every partition
that it was to reduce; by half for each of the two where there is nothing of it, and in proportion between. A
pseudo-gradient that came to the next merge counts there as much as it weighs: discounted by its age.

Work is paid as far as it was verified: in full up to the newest outer step of the window of which a replay of the whole
has passed, and one turn of checks further, because an honest miner must wait its turn; `unverified_factor` of it
beyond, and of everything while no such replay has passed. What nobody has looked at is a claim. Whoever is fast because
it computes nothing, goes away whenever it is challenged, uploads another pseudo-gradient than its work led to, or was
honest only until it was looked at, earns little by that.

A failed check voids all work before it and all work after it until it leaves the window: `docs/SCORING.md` shows why
that costs more than cheating saves. The functions at the end of this file are that arithmetic.
"""

import math
from collections import Counter, defaultdict
from itertools import accumulate

from orion.common.config import RunSpec
from orion.common.ids import Hotkey, Subject
from orion.common.protocol.age import aged
from orion.common.protocol.records import Ledger, MergeShare, Verdict, WorkRecord

ABSENT_FACTOR = 0.5
"""What work is worth whose pseudo-gradient reached no mean: it carried others' microbatches, and taught nothing. And
what is left when a miner reduced none of what it was asked to."""


def scores(ledger: Ledger, spec: RunSpec) -> dict[Hotkey, float]:
    """FLOPs-equivalents of every miner in the ledger's window, 0 included. Depends on no order of its records."""
    start = window_start(ledger.outer_step, spec)
    failed = failed_checks(ledger, spec)
    paid_until = paid_until_steps(ledger, spec)
    flops: defaultdict[Hotkey, list[float]] = defaultdict(list)
    for record in ledger.work:
        if start <= record.outer_step <= ledger.outer_step:
            is_verified = record.outer_step <= paid_until.get(record.hotkey, -1)
            factor = 1.0 if is_verified else spec.validation.unverified_factor
            flops[record.hotkey].append(0.0 if record.hotkey in failed else counted_flops(record) * factor)
    return {hotkey: math.fsum(done) for hotkey, done in sorted(flops.items())}  # exact, whatever their order


def window_start(outer_step: int, spec: RunSpec) -> int:
    """First outer step whose work still counts when `outer_step` is the newest."""
    return max(0, outer_step - spec.validation.score_window_outer_steps + 1)


def counted_flops(record: WorkRecord) -> float:
    """What a miner's work of one outer step counts while none of its checks failed."""
    if record.num_microbatches == 0:
        return 0.0
    covered = min(record.num_microbatches, record.num_committed) / record.num_microbatches
    return record.flops * covered * merge_factor(record.merge)


def merge_factor(merge: MergeShare | None) -> float:
    """What a miner's part in the merge leaves of its work; 1 before the merge is settled."""
    if merge is None:
        return 1.0
    contributed = aged(merge.num_merged / merge.num_settled, merge.age) if merge.num_settled else 1.0
    reduced = merge.num_agreed / merge.num_asked if merge.num_asked else 1.0
    return _between(contributed) * _between(reduced)


def _between(share: float) -> float:
    return ABSENT_FACTOR + (1 - ABSENT_FACTOR) * share


def failed_checks(ledger: Ledger, spec: RunSpec) -> dict[Hotkey, tuple[int, ...]]:
    """Outer steps, within the window, of which each miner failed a check, in order.

    Validators that looked at the same thing vote, one each. A passed check outvotes a failed one only when it went at
    least as far: who replayed a shorter prefix may well have seen nothing. A tie is a failure. Reductions are drawn, so
    that two validators seldom look at the same partitions: one failed check of them stands.
    """
    start = window_start(ledger.outer_step, spec)
    words: defaultdict[tuple[Hotkey, int, Subject], dict[Hotkey, Verdict]] = defaultdict(dict)
    for record in ledger.verdicts:
        verdict = record.verdict
        if start <= verdict.outer_step <= ledger.outer_step:
            words[verdict.miner, verdict.outer_step, verdict.subject][record.validator] = verdict
    failed: defaultdict[Hotkey, set[int]] = defaultdict(set)
    for (miner, outer_step, subject), votes in words.items():
        if _is_failed(subject, list(votes.values())):
            failed[miner].add(outer_step)
    return {miner: tuple(sorted(outer_steps)) for miner, outer_steps in failed.items()}


def verifying_subject(spec: RunSpec) -> Subject:
    """What a passed check must be of, that it verifies its miner's work."""
    return Subject.WHOLE if spec.validation.whole_share > 0 else Subject.LOG


def verified_steps(ledger: Ledger, spec: RunSpec) -> dict[Hotkey, int]:
    """Of each miner, the newest outer step of the window that some validator replayed to its pseudo-gradient, finding
    no fault; who is missing was not verified.

    Where the run's rules know no whole replays, that of a log's beginning is all that can be asked.
    """
    subject = verifying_subject(spec)
    start = window_start(ledger.outer_step, spec)
    verified: dict[Hotkey, int] = {}
    for record in ledger.verdicts:
        verdict = record.verdict
        if start <= verdict.outer_step <= ledger.outer_step and verdict.passed and verdict.subject is subject:
            verified[verdict.miner] = max(verdict.outer_step, verified.get(verdict.miner, -1))
    return verified


def paid_until_steps(ledger: Ledger, spec: RunSpec) -> dict[Hotkey, int]:
    """Of each verified miner, the last outer step whose work counts in full.

    That is as far after its newest verified outer step as validators have not yet made a turn of checks, as many as
    there are miners in a full swarm. Counted in checks and not in outer steps, so that nobody loses pay where
    validators are slow, or away; and of each validator only as many of an outer step as are usual, so that nobody does
    where it draws more, because others have joined.
    """
    turn = spec.num_stages * spec.replicas
    given = Counter(
        (record.validator, record.verdict.outer_step)
        for record in ledger.verdicts
        if record.verdict.subject is not Subject.REDUCTION
    )
    checks: Counter[int] = Counter()
    for (_, outer_step), num_given in given.items():
        checks[outer_step] += min(num_given, spec.validation.checks_per_outer_step)
    paid_until = {}
    for hotkey, verified in verified_steps(ledger, spec).items():
        later = range(verified + 1, ledger.outer_step + 1)
        totals = accumulate(checks[outer_step] for outer_step in later)
        paid_until[hotkey] = verified + sum(total <= turn for total in totals)
    return paid_until


def _is_failed(subject: Subject, verdicts: list[Verdict]) -> bool:
    failures = [verdict for verdict in verdicts if not verdict.passed]
    if not failures or subject is Subject.REDUCTION:
        return bool(failures)
    least_far = min(verdict.num_operations for verdict in failures)
    against = sum(verdict.passed and verdict.num_operations >= least_far for verdict in verdicts)
    return len(failures) >= against


# --- why cheating does not pay ----------------------------------------------------------------------------------------

HONEST_COST_MAX = 0.9
"""Cost ÷ pay of honest work for which the arithmetic below must hold. A miner that earns less than a ninth above its
costs has little to lose, whatever the rule: no score goes below zero."""


def check_rate(spec: RunSpec, num_validators: int = 1) -> float:
    """The probability that a miner's outer step is checked, in a full swarm whose validators draw by themselves."""
    per_validator = min(1.0, spec.validation.checks_per_outer_step / (spec.num_stages * spec.replicas))
    return 1 - (1 - per_validator) ** num_validators


def turn_outer_steps(spec: RunSpec) -> int:
    """Whole outer steps in which one validator makes a turn of checks: as many as a full swarm has miners."""
    num_checks = spec.validation.checks_per_outer_step
    return spec.num_stages * spec.replicas // num_checks if num_checks else 0


def expected_pay(share: float, found: float, spec: RunSpec) -> float:
    """Pay, relative to an honest miner's, of one that cheats in a share of its outer steps for a long time.

    `found` is the probability that a whole replay looks at an outer step, and so that one in which the miner cheated is
    found out. It is paid whenever none of the last outer steps of a window was found, and then as far as a whole replay
    of an honest one verified it.
    """
    return _counted_share(share, found, spec) / _counted_share(0.0, found, spec)


def _counted_share(share: float, found: float, spec: RunSpec) -> float:
    """Of all that was done in a window, what counts on average."""
    window, turn = spec.validation.score_window_outer_steps, turn_outer_steps(spec)
    clear, unseen = 1 - found * share, 1 - found
    # An outer step waits for verification when nothing from a turn before it up to now was looked at; nothing in the
    # whole window may have been found out.
    looks = [min(age + 1 + turn, window) for age in range(window)]
    waits = math.fsum(unseen**num * clear ** (window - num) for num in looks) / window
    return clear**window - (1 - spec.validation.unverified_factor) * waits


def gain_of_cheating(share: float, found: float, spec: RunSpec, cost: float = HONEST_COST_MAX) -> float:
    """What cheating in a share of the outer steps brings, in pay of an honest miner: the cost that it saves, less the
    pay that it loses."""
    return cost * share - (1 - expected_pay(share, found, spec))
