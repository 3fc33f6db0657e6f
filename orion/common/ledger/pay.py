"""A miner's pay from the book, in the terms of `docs/SCORING.md`. Pure."""

import math

from orion.common.config import RunSpec
from orion.common.ids import Hotkey
from orion.common.ledger.book import LedgerBook
from orion.common.ledger.evidence import StepLedger
from orion.common.ledger.scoring import (
    counted_flops,
    failed_checks,
    paid_until_steps,
    scores,
    verified_steps,
    window_start,
)
from orion.common.protocol.pay import STEPS_MAX, VERDICTS_PER_STEP_MAX, GivenScore, MinerPay, PaidStep
from orion.common.protocol.records import Ledger, VerdictRecord, WorkRecord


def miner_pay(book: LedgerBook, ledger: Ledger, spec: RunSpec, hotkey: Hotkey) -> MinerPay:
    """Everything that a miner's pay follows from; `ledger` is the book's summary from the window's start on."""
    start = window_start(ledger.outer_step, spec)
    failed = failed_checks(ledger, spec).get(hotkey, ())
    works = {record.outer_step: record for record in ledger.work if record.hotkey == hotkey}
    paid_until = paid_until_steps(ledger, spec).get(hotkey, -1)
    steps = [
        _paid_step(
            book,
            outer_step,
            step,
            works.get(outer_step),
            hotkey,
            is_failed=outer_step in failed,
            is_waiting=outer_step > paid_until,
        )
        for outer_step, step in sorted(book.steps.items())
        if start <= outer_step
    ]
    return MinerPay(
        hotkey=hotkey,
        outer_step=ledger.outer_step,
        window_start=start,
        score=scores(ledger, spec).get(hotkey, 0.0),
        verified_outer_step=verified_steps(ledger, spec).get(hotkey),
        counted_flops=math.fsum(step.counted_flops for step in steps),
        waiting_flops=math.fsum(step.counted_flops for step in steps if step.waiting),
        unverified_factor=spec.validation.unverified_factor,
        paid_again_from=max(failed) + spec.validation.score_window_outer_steps if failed else None,
        steps=tuple(step for step in steps if _says_something(step))[-STEPS_MAX:],
        scores=tuple(
            GivenScore(
                validator=validator,
                outer_step=sheet.outer_step,
                score=share.score,
                weight=share.weight,
                sequence=sequence,
            )
            for validator, (sequence, sheet) in sorted(book.sheets.items())
            for share in sheet.shares
            if share.hotkey == hotkey
        ),
    )


def _paid_step(
    book: LedgerBook,
    outer_step: int,
    step: StepLedger,
    work: WorkRecord | None,
    hotkey: Hotkey,
    *,
    is_failed: bool,
    is_waiting: bool,
) -> PaidStep:
    committed = step.commitments.get(hotkey)
    stage_index = work.stage_index if work is not None else committed.stage_index if committed is not None else None
    return PaidStep(
        outer_step=outer_step,
        stage_index=stage_index,
        num_credited=work.num_microbatches if work is not None else 0,
        num_committed=book.num_checkable(outer_step, stage_index, hotkey) if stage_index is not None else 0,
        counted_flops=counted_flops(work) if work is not None else 0.0,
        num_receipts=step.num_receipts.get(hotkey, 0),
        num_matched=step.num_matched.get(hotkey, 0),
        num_contradictions=sum(hotkey in found.hotkeys for found in step.contradictions.found),
        merge=book.merge_share(outer_step, stage_index, hotkey) if stage_index is not None else None,
        verdicts=tuple(
            VerdictRecord(validator=validator, verdict=verdict)
            for (validator, miner, _), verdict in sorted(step.verdicts.items(), key=lambda item: item[0])
            if miner == hotkey
        )[:VERDICTS_PER_STEP_MAX],
        waiting=is_waiting and work is not None,
        failed=is_failed,
    )


def _says_something(step: PaidStep) -> bool:
    return bool(step.stage_index is not None or step.num_receipts or step.verdicts)
