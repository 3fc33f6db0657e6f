"""The score of every miner, from the public ledger and the run's rules alone. Pure; anybody can compute it again.

    score = 0 while a failed check is in the window, else
            Σ FLOPs of the backward passes that count × what the miner did for the merge

Within the window of `score_window_outer_steps` up to the ledger's newest outer step, a miner's backward passes of an
outer step count as far as both ends of each transfer agree and its commitment covers them, so that they can be checked.
They count in full when its pseudo-gradient is in the mean of every partition and its bytes stand in every partition
that it was to reduce; by half for each of the two where there is nothing of it, and in proportion between.

All of it counts `unverified_factor` while no replay of a whole outer step has passed in the window: what nobody has
looked at is a claim. Whoever is fast because it computes nothing, goes away whenever it is challenged, or uploads
another pseudo-gradient than its work led to, earns next to nothing by that.

A failed check voids all work before it and all work after it until it leaves the window: `docs/SCORING.md` shows why
that costs more than cheating saves. The functions at the end of this file are that arithmetic.
"""

import math
from collections import defaultdict

from orion.common.config import RunSpec
from orion.common.ids import Hotkey, Subject
from orion.common.protocol.records import Ledger, MergeShare, Verdict, WorkRecord

ABSENT_FACTOR = 0.5
"""What work is worth whose pseudo-gradient reached no mean: it carried others' microbatches, and taught nothing. And
what is left when a miner reduced none of what it was asked to."""


def scores(ledger: Ledger, spec: RunSpec) -> dict[Hotkey, float]:
    """FLOPs-equivalents of every miner in the ledger's window, 0 included. Depends on no order of its records."""
    start = window_start(ledger.outer_step, spec)
    failed = failed_checks(ledger, spec)
    flops: defaultdict[Hotkey, list[float]] = defaultdict(list)
    for record in ledger.work:
        if start <= record.outer_step <= ledger.outer_step:
            flops[record.hotkey].append(0.0 if record.hotkey in failed else counted_flops(record))
    verified = verified_miners(ledger, spec)
    return {  # exact, whatever their order
        hotkey: math.fsum(done) * (1.0 if hotkey in verified else spec.validation.unverified_factor)
        for hotkey, done in sorted(flops.items())
    }


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
    contributed = merge.num_merged / merge.num_settled if merge.num_settled else 1.0
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


def verified_miners(ledger: Ledger, spec: RunSpec) -> set[Hotkey]:
    """Miners of whom some validator replayed an outer step of the window to its pseudo-gradient, and found no fault.

    Where the run's rules know no whole replays, that of a log's beginning is all that can be asked.
    """
    subject = Subject.WHOLE if spec.validation.whole_share > 0 else Subject.LOG
    start = window_start(ledger.outer_step, spec)
    return {
        record.verdict.miner
        for record in ledger.verdicts
        if start <= record.verdict.outer_step <= ledger.outer_step
        and record.verdict.passed
        and record.verdict.subject is subject
    }


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


def expected_pay(share: float, found: float, window: int) -> float:
    """Pay, relative to an honest miner's, of one that cheats in a share of its outer steps for a long time.

    `found` is the probability that an outer step in which it cheated is checked and found out. It is paid whenever none
    of the last `window` outer steps was.
    """
    return (1 - found * share) ** window


def gain_of_cheating(share: float, found: float, window: int, cost: float = HONEST_COST_MAX) -> float:
    """What cheating in a share of the outer steps brings, in pay of an honest miner: the cost that it saves, less the
    pay that it loses. Convex in the share and 0 for share 0: where it is negative for share 1, it is for all."""
    return cost * share - (1 - expected_pay(share, found, window))
