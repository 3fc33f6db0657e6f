"""The score of every miner, from the public ledger and the run's rules alone. Pure; anybody can compute it again.

    score = FLOPs of the credited backward passes that count × penalty ^ failed checks in the window

A backward pass counts when it lies within the window of `score_window_outer_steps` up to the ledger's newest outer
step and after the miner's last failed check: whoever was caught once has shown nothing for what it did before. The
penalty makes a failed check cost more than the work it voids, so that cheating does not pay even when few miners are
checked. Both the void and the penalty leave the window with the outer step that was checked.
"""

from collections import defaultdict

from orion.common.config import RunSpec
from orion.common.ids import Hotkey, Subject
from orion.common.protocol.records import Ledger

FAILED_CHECK_FACTOR = 0.5
"""What a failed check leaves of everything that the miner earns while it is in the window."""


def scores(ledger: Ledger, spec: RunSpec) -> dict[Hotkey, float]:
    """FLOPs-equivalents of every miner in the ledger's window, 0 included. Depends on no order of its records."""
    start = window_start(ledger.outer_step, spec)
    failed = _failed_checks(ledger, start)
    flops: defaultdict[Hotkey, list[float]] = defaultdict(list)
    for record in ledger.work:
        if not start <= record.outer_step <= ledger.outer_step:
            continue
        counts = record.outer_step > max(failed.get(record.hotkey, ()), default=-1)
        flops[record.hotkey].append(record.flops if counts else 0.0)
    # Sorted before they are added, because the last digit of a sum depends on its order.
    return {
        hotkey: sum(sorted(done)) * FAILED_CHECK_FACTOR ** len(failed.get(hotkey, ()))
        for hotkey, done in sorted(flops.items())
    }


def window_start(outer_step: int, spec: RunSpec) -> int:
    """First outer step whose work still counts when `outer_step` is the newest."""
    return max(0, outer_step - spec.validation.score_window_outer_steps + 1)


def _failed_checks(ledger: Ledger, start: int) -> dict[Hotkey, set[int]]:
    """Outer steps, within the window, of which each miner failed a check.

    Validators that checked the same outer step of a miner vote, one each with their last word; a tie is a failure,
    since a validator that replayed another prefix may well have seen nothing. Means are voted on apart from logs.
    """
    words: defaultdict[tuple[Hotkey, int, bool], dict[Hotkey, bool]] = defaultdict(dict)
    for record in ledger.verdicts:
        verdict = record.verdict
        if start <= verdict.outer_step <= ledger.outer_step:
            is_reduction = verdict.subject is Subject.REDUCTION
            words[verdict.miner, verdict.outer_step, is_reduction][record.validator] = verdict.passed
    failed: defaultdict[Hotkey, set[int]] = defaultdict(set)
    for (miner, outer_step, _), votes in words.items():
        num_passed = sum(votes.values())
        if num_passed <= len(votes) - num_passed:
            failed[miner].add(outer_step)
    return dict(failed)
