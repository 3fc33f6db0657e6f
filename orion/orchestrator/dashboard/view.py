"""The page as a pure function of the run's state and its histories.

Owns every figure on the page: the browser only draws. Lists are bounded by the constants below, whatever the swarm's
size; counts beside them are of all.
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import pairwise
from statistics import median

from orion.common.ids import Hotkey, MemberState
from orion.common.protocol.messages import Heartbeat
from orion.orchestrator.dashboard.chronicle import Part, StepTimes, part_of
from orion.orchestrator.dashboard.numbers import short, short_or_none
from orion.orchestrator.dashboard.page import (
    Curves,
    Edge,
    Head,
    Log,
    LogLine,
    Map,
    MinerBar,
    MinerCell,
    Span,
    StageColumn,
    StepRow,
    Timeline,
)
from orion.orchestrator.dashboard.peaks import peak_flops_per_s
from orion.orchestrator.dashboard.trust import DIGEST_CHARS
from orion.orchestrator.dashboard.watch import RunWatch
from orion.orchestrator.membership import Member
from orion.orchestrator.stages import NEVER_S, StageProgress
from orion.orchestrator.state import RunState

MINERS_SHOWN_MAX = 512
"""On the map and in the timeline, all stages together."""
STEPS_SHOWN = 4
"""Outer steps of each stage in the timeline."""
PATHS_SHOWN = 256
"""Newest trips that the map's flow is made of."""
EDGES_MAX = 1_024
LOSSES_AVERAGED = 32
STRAGGLER_TIMES = 2.0
"""Times the usual upload of the other replicas from which on one straggles, if it is a second longer as well."""
_STRAGGLER_MIN_S = 1.0
_PARTS = (Part.WAIT, Part.TRAIN, Part.UPLOAD, Part.REDUCE, Part.APPLY, Part.FINISH, Part.DONE)


def head(state: RunState, watch: RunWatch) -> Head:
    """The run in figures."""
    memory, spec, leases = state.memory, state.spec, state.memory.leases
    rate = microbatch_rate(watch)
    present = [member for members in memory.membership.stages for member in members.values()]
    active = [member for member in present if member.state is MemberState.ACTIVE]
    mfu, num_peaks = _mfu(state, active)
    losses = memory.losses.losses[-LOSSES_AVERAGED:]
    fraction = _fraction(state)
    elapsed_s = 0.0 if memory.started_s is None else memory.now_s - memory.started_s
    checkpoint = memory.ledger.checkpoint
    return Head(
        run_id=spec.run_id,
        model=spec.model.name,
        num_params=sum(spec.stage_sizes),
        num_stages=spec.num_stages,
        replicas=spec.replicas,
        sync=spec.sync,
        finished=state.is_finished,
        finish_reason=memory.finish_reason,
        started_s=memory.started_s,
        outer_step=min(stage.outer_step for stage in memory.stages),
        first_outer_step=spec.first_outer_step,
        outer_steps=spec.outer_steps,
        inner_steps=spec.inner_steps,
        fraction=short(fraction),
        remaining_s=None if not 0.02 < fraction < 1 else round(elapsed_s * (1 - fraction) / fraction),
        loss=short(sum(losses) / len(losses)) if losses else None,
        tokens=leases.num_applied * spec.tokens_per_microbatch,
        tokens_per_s=short(rate * spec.tokens_per_microbatch),
        flops_per_s=short(rate * sum(figures.microbatch_flops for figures in state.figures)),
        busy=short_or_none(watch.recent[-1].busy if watch.recent else None),
        mfu=short_or_none(mfu),
        num_peaks=num_peaks,
        num_active=len(active),
        num_present=len(present),
        started=leases.num_started,
        applied=leases.num_applied,
        cancelled=leases.num_cancelled,
        in_flight=len(leases.live),
        rerouted=memory.num_rerouted,
        spliced=memory.num_spliced,
        released=leases.num_released,
        num_checks=memory.ledger.num_checks,
        num_failed=memory.ledger.num_verdicts_failed,
        anchors_equal=memory.anchors_equal,
        checkpoint_step=None if checkpoint is None else checkpoint.outer_step,
    )


def microbatch_rate(watch: RunWatch) -> float:
    """Applied microbatches a second, over the last while."""
    if len(watch.recent) < 2:
        return 0.0
    first, last = watch.recent[0], watch.recent[-1]
    return (last.applied - first.applied) / (last.time_s - first.time_s)


def _fraction(state: RunState) -> float:
    if state.is_finished:
        return 1.0
    spec = state.spec
    steps = spec.outer_steps - spec.first_outer_step
    total = steps * spec.inner_steps * spec.microbatches_per_step * spec.replicas
    by_steps = (min(stage.outer_step for stage in state.memory.stages) - spec.first_outer_step) / steps
    return min(1.0, max(by_steps, state.memory.leases.num_applied / total))


def _mfu(state: RunState, active: Sequence[Member]) -> tuple[float | None, int]:
    known = [
        (_flops_per_s(state, member), peak)
        for member in active
        if (peak := peak_flops_per_s(member.device)) is not None
    ]
    if not known:
        return None, 0
    return sum(achieved or 0.0 for achieved, _ in known) / sum(peak for _, peak in known), len(known)


def _flops_per_s(state: RunState, member: Member) -> float | None:
    """Of forward and backward together, as the miner's own rate says."""
    if member.heartbeat is None:
        return None
    per_token = state.figures[member.stage_index].microbatch_flops / state.spec.tokens_per_microbatch
    return member.heartbeat.tokens_per_s * per_token


# --- the map ----------------------------------------------------------------------------------------------------------


def pipeline_map(state: RunState, watch: RunWatch) -> Map:
    """Stages × replicas, with what flowed between them."""
    members = _members(state)
    shown = _shown(members)
    paths = list(_recent_paths(state))
    return Map(
        stages=tuple(_column(state, watch, stage, members[stage.stage_index], shown) for stage in state.memory.stages),
        edges=_edges(paths, shown),
        num_paths=len(paths),
        microbatches_per_s=short(microbatch_rate(watch)),
    )


def _members(state: RunState) -> list[list[Member]]:
    """By stage, present ones first; those that have gone too."""
    found: list[list[Member]] = [[] for _ in state.memory.stages]
    for member in state.memory.membership.members.values():
        found[member.stage_index].append(member)
    for stage in found:
        stage.sort(key=lambda member: (not member.is_present, member.hotkey))
    return found


def _shown(members: list[list[Member]]) -> set[Hotkey]:
    """Who is listed: all, or of each stage as many as fit, present ones first."""
    per_stage = max(1, MINERS_SHOWN_MAX // len(members))
    return {member.hotkey for stage in members for member in stage[:per_stage]}


def _column(
    state: RunState, watch: RunWatch, stage: StageProgress, members: Sequence[Member], shown: set[Hotkey]
) -> StageColumn:
    layout = state.spec.layouts[stage.stage_index]
    listed = [member for member in members if member.hotkey in shown]
    first, last = layout.first_block, layout.end_block - 1
    training = state.training_step(stage) if state.memory.train.is_open else None
    told = _told_equal(watch, stage)
    return StageColumn(
        stage_index=stage.stage_index,
        blocks=f"{first}" if first == last else f"{first}–{last}",
        num_params=state.figures[stage.stage_index].num_params,
        part=part_of(state, stage),
        outer_step=stage.outer_step,
        trains=training,
        deadline_s=None if stage.deadline_s >= NEVER_S else stage.deadline_s,
        digest=None if stage.anchor_digest is None else stage.anchor_digest[:DIGEST_CHARS],
        miners=tuple(_cell(state, member, told.get(member.hotkey)) for member in listed),
        num_hidden=len(members) - len(listed),
    )


def _told_equal(watch: RunWatch, stage: StageProgress) -> dict[Hotkey, bool]:
    """Who told the agreed anchor after the newest outer step, and who another one."""
    ended = watch.chronicle.step(stage.stage_index, stage.outer_step - 1)
    if ended is None or stage.anchor_digest is None:
        return {}
    told = {hotkey: times.digest for hotkey, times in ended.miners.items() if times.digest is not None}
    return {hotkey: digest == stage.anchor_digest for hotkey, digest in told.items()}


def _cell(state: RunState, member: Member, is_equal: bool | None) -> MinerCell:
    health, why = _health(state, member)
    beat: Heartbeat | None = member.heartbeat if member.is_present else None
    achieved = _flops_per_s(state, member) if beat is not None else None
    peak = peak_flops_per_s(member.device)
    return MinerCell(
        hotkey=member.hotkey,
        state=member.state,
        health=health,
        why=why,
        device=member.device,
        busy=None if beat is None else short(beat.busy_share),
        tokens_per_s=None if beat is None else short(beat.tokens_per_s),
        flops_per_s=short_or_none(achieved),
        mfu=None if achieved is None or peak is None else short(achieved / peak),
        queued=None if beat is None else beat.queued,
        in_flight=None if beat is None else beat.in_flight,
        applied=None if beat is None else beat.applied,
        inner_step=None if beat is None else beat.inner_step,
        staleness_max=None if beat is None else beat.staleness_max,
        upload_bytes_per_s=None if beat is None else short_or_none(beat.upload_bytes_per_s),
        download_bytes_per_s=None if beat is None else short_or_none(beat.download_bytes_per_s),
        credited=member.num_credited,
        silent_s=int(max(0.0, state.memory.now_s - member.last_seen_s)),
        is_equal=is_equal,
    )


def _health(state: RunState, member: Member) -> tuple[str, str]:
    """A word that colours the miner, and what it means."""
    silent_s = state.memory.now_s - member.last_seen_s
    if not member.is_present:
        return "gone", "gone: it left, or was silent too long"
    if member.is_barred:
        return "barred", "gets no work: a failed check stands"
    if member.is_suspect:
        return "suspect", "its connection broke off; phases do not wait for it"
    if not state.is_finished and silent_s > state.spec.time_limits.member_s / 2:
        return "suspect", "silent for more than half of what is allowed"
    match member.state:
        case MemberState.JOINING:
            return "joining", "builds its anchor"
        case MemberState.READY:
            return "joining", "holds its anchor; takes work from the next outer step on"
        case _:
            return "good", "works"


def _recent_paths(state: RunState) -> Iterator[tuple[Hotkey, ...]]:
    """Ways of the newest applied trips, newest outer step first."""
    book, left = state.memory.pathways, PATHS_SHOWN
    for outer_step in sorted(book.steps, reverse=True):
        step, width = book.steps[outer_step], book.num_stages
        total = len(step.losses)
        for index in range(total - 1, max(0, total - left) - 1, -1):
            yield tuple(step.hotkeys[place] for place in step.paths[index * width : (index + 1) * width])
        left -= min(left, total)
        if left == 0:
            return


def _edges(paths: Sequence[tuple[Hotkey, ...]], shown: set[Hotkey]) -> tuple[Edge, ...]:
    tally = Counter(hop for path in paths for hop in pairwise(path))
    hops = [hop for hop in tally.most_common(EDGES_MAX) if hop[0][0] in shown and hop[0][1] in shown]
    return tuple(
        Edge(source=source, target=target, share=short(num / len(paths))) for (source, target), num in sorted(hops)
    )


# --- curves, timeline, log --------------------------------------------------------------------------------------------


def curves(state: RunState, watch: RunWatch) -> Curves:
    """Loss by tokens and steps; rates by time."""
    bins, samples = watch.curve.bins, watch.ring.samples
    per_microbatch = state.spec.tokens_per_microbatch
    flops = sum(figures.microbatch_flops for figures in state.figures)
    tokens, num = [], watch.curve.num_points - sum(each.num for each in bins)
    for each in bins:
        num += each.num
        tokens.append(num * per_microbatch)
    rates = [(later.applied - former.applied) / (later.time_s - former.time_s) for former, later in pairwise(samples)]
    return Curves(
        bin_size=watch.curve.bin_size,
        tokens=tuple(tokens),
        steps=tuple(round(each.step, 2) for each in bins),
        loss=tuple(short(each.mean) for each in bins),
        deviation=tuple(short(each.deviation) for each in bins),
        times_s=tuple(round(sample.time_s, 1) for sample in samples[1:]),
        tokens_per_s=tuple(short(rate * per_microbatch) for rate in rates),
        flops_per_s=tuple(short(rate * flops) for rate in rates),
        busy=tuple(short_or_none(sample.busy) for sample in samples[1:]),
    )


def timeline(state: RunState, watch: RunWatch) -> Timeline:
    """The newest outer steps of every stage: phases, and what each miner did when."""
    shown, now_s = _shown(_members(state)), state.memory.now_s
    return Timeline(
        rows=tuple(
            StepRow(
                stage_index=stage_index,
                outer_step=step.outer_step,
                spans=_spans(step),
                miners=_bars(step, shown, now_s),
            )
            for stage_index, steps in enumerate(watch.chronicle.steps)
            for step in list(steps)[-STEPS_SHOWN:]
        )
    )


def _spans(step: StepTimes) -> tuple[Span, ...]:
    """Of a stage in an outer step, in order; a train phase beside the merge before ends when its own upload begins."""
    begun = [(part, step.began_s[part]) for part in _PARTS if part in step.began_s]
    ends = [*(begin_s for _, begin_s in begun[1:]), step.ended_s]
    return tuple(
        Span(part=part, begin_s=round(begin_s, 2), end_s=None if end_s is None else round(end_s, 2))
        for (part, begin_s), end_s in zip(begun, ends, strict=True)
    )


def upload_times(step: StepTimes, now_s: float) -> dict[Hotkey, float]:
    """How long each awaited miner has taken, until now or the phase's end where it is not through; seconds."""
    began_s = step.began_s.get(Part.UPLOAD)
    if began_s is None:
        return {}
    over_s = min((step.began_s[part] for part in (Part.REDUCE, Part.APPLY) if part in step.began_s), default=now_s)
    return {
        hotkey: (over_s if times.stored_s is None else times.stored_s) - began_s
        for hotkey, times in step.miners.items()
    }


def upload_figures(watch: RunWatch) -> list[tuple[int, float, float]]:
    """Stage, median and longest upload of the newest outer step of each stage that is through; seconds."""
    found: list[tuple[int, float, float]] = []
    for stage_index, steps in enumerate(watch.chronicle.steps):
        ended = [step for step in steps if step.ended_s is not None and Part.UPLOAD in step.began_s and step.miners]
        if ended:
            took_s = upload_times(ended[-1], ended[-1].ended_s or 0.0).values()
            found.append((stage_index, median(took_s), max(took_s)))
    return found


def stragglers(took_s: dict[Hotkey, float]) -> set[Hotkey]:
    """Whose upload took much longer than the usual one of the others."""
    found = set()
    for hotkey, own_s in took_s.items():
        others = [other_s for other, other_s in took_s.items() if other != hotkey]
        if others and own_s > max(STRAGGLER_TIMES * median(others), median(others) + _STRAGGLER_MIN_S):
            found.add(hotkey)
    return found


def _bars(step: StepTimes, shown: set[Hotkey], now_s: float) -> tuple[MinerBar, ...]:
    took_s = upload_times(step, now_s)
    slow = stragglers(took_s)
    return tuple(
        MinerBar(
            hotkey=hotkey,
            announced_s=_hundredths(times.announced_s),
            stored_s=_hundredths(times.stored_s),
            reduced_s=_hundredths(times.reduced_s),
            applied_s=_hundredths(times.applied_s),
            upload_s=None if times.stored_s is None else round(took_s[hotkey], 2),
            is_straggler=hotkey in slow,
        )
        for hotkey, times in sorted(step.miners.items())
        if hotkey in shown
    )


def log(watch: RunWatch) -> Log:
    """What happened, and why."""
    chronicle = watch.chronicle
    return Log(
        lines=tuple(
            LogLine(
                number=line.number,
                time_s=round(line.time_s, 1),
                level=line.level,
                text=line.text,
                hotkey=line.hotkey,
            )
            for line in chronicle.lines
        ),
        num_lines=chronicle.num_lines,
    )


def _hundredths(value_s: float | None) -> float | None:
    return None if value_s is None else round(value_s, 2)
