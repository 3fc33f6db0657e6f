"""Who can be believed, as the page shows it: agreement of replicas, staleness, and what everybody has earned. Pure."""

from collections import Counter
from collections.abc import Iterator

from orion.common.ids import Hotkey
from orion.common.ledger.scoring import (
    counted_flops,
    failed_checks,
    paid_until_steps,
    scores,
    verified_steps,
    window_start,
)
from orion.common.protocol.records import Ledger
from orion.orchestrator.dashboard.numbers import short
from orion.orchestrator.dashboard.page import Agreement, Ranked, Staleness, Trust
from orion.orchestrator.dashboard.watch import RunWatch
from orion.orchestrator.state import RunState

RANKED_MAX = 512
AGREEMENTS_SHOWN = 16
DIGEST_CHARS = 10


def trust(state: RunState, watch: RunWatch, ranking: tuple[Ranked, ...]) -> Trust:
    """Agreement of replicas, staleness, and a ranking that was made before."""
    return Trust(
        agreement=tuple(_agreements(watch)),
        staleness=tuple(
            Staleness(stage_index=stage_index, counts=tuple(counts))
            for stage_index, counts in enumerate(state.memory.staleness.counts)
        ),
        ranking=ranking[:RANKED_MAX],
        num_unranked=max(0, len(ranking) - RANKED_MAX),
    )


def _agreements(watch: RunWatch) -> Iterator[Agreement]:
    for stage_index, steps in enumerate(watch.chronicle.steps):
        for step in list(steps)[-AGREEMENTS_SHOWN:]:
            told = Counter(times.digest for times in step.miners.values() if times.digest is not None)
            if step.ended_s is not None and told:
                digest, num_equal = told.most_common(1)[0]
                yield Agreement(
                    stage_index=stage_index,
                    outer_step=step.outer_step,
                    num_told=told.total(),
                    num_equal=num_equal,
                    digest=digest[:DIGEST_CHARS],
                )


def rank(state: RunState) -> tuple[Ranked, ...]:
    """Every miner that has worked within the score window, best first. Costs a walk over the window's ledger."""
    memory, spec = state.memory, state.spec
    flops = tuple(figures.microbatch_flops for figures in state.figures)
    start = window_start(memory.ledger.outer_step, spec)
    ledger = memory.ledger.summary(start, memory.num_entries, memory.ledger_digest, flops)
    earned, failed, verified = scores(ledger, spec), failed_checks(ledger, spec), verified_steps(ledger, spec)
    counted, waiting = _counted(ledger, paid_until_steps(ledger, spec))
    total = sum(earned.values())
    members = memory.membership.members
    best_first = sorted((hotkey for hotkey in earned if hotkey in members), key=lambda each: (-earned[each], each))
    return tuple(
        Ranked(
            rank=place,
            hotkey=hotkey,
            stage_index=members[hotkey].stage_index,
            score=short(earned[hotkey], 6),
            share=short(earned[hotkey] / total) if total else 0.0,
            waits=short(waiting[hotkey] / counted[hotkey]) if counted[hotkey] else 0.0,
            credited=members[hotkey].num_credited,
            verified_step=verified.get(hotkey),
            failed=hotkey in failed,
        )
        for place, hotkey in enumerate(best_first, start=1)
    )


def _counted(ledger: Ledger, until: dict[Hotkey, int]) -> tuple[Counter[Hotkey], Counter[Hotkey]]:
    """What each miner's work counts once verified, and how much of that waits; FLOPs."""
    counted: Counter[Hotkey] = Counter()
    waiting: Counter[Hotkey] = Counter()
    for record in ledger.work:
        flops = round(counted_flops(record))
        counted[record.hotkey] += flops
        if record.outer_step > until.get(record.hotkey, -1):
            waiting[record.hotkey] += flops
    return counted, waiting
