"""What the orchestrator shows: the feed, the run's status, the ledger and the other answers to queries.

Pure functions of the state; nothing here changes it.
"""

from dataclasses import dataclass

from orion.common.ids import Hotkey
from orion.common.ledger.pay import miner_pay
from orion.common.ledger.scoring import window_start
from orion.common.protocol.fields import BATCH_MAX, BOUNDARY_PAGE_MAX, VALIDATORS_MAX
from orion.common.protocol.messages import (
    Feed,
    Joined,
    Manifest,
    ManifestQuery,
    Manifests,
    Peer,
    RefusalCode,
    StageState,
)
from orion.common.protocol.pay import MinerPay
from orion.common.protocol.records import (
    Boundaries,
    BoundaryQuery,
    BoundaryRecord,
    CommitmentQuery,
    Commitments,
    Ledger,
    LedgerQuery,
    Losses,
    LossQuery,
    MergeQuery,
    MergeRecord,
    MinerStatus,
    PathwayQuery,
    Pathways,
    Repairs,
    RunStatus,
    StageStaleness,
)
from orion.common.protocol.refusals import refused
from orion.orchestrator.stages import StageProgress
from orion.orchestrator.state import RunState

_RECENT_LOSSES = 256
MERGE_RETRY_S = 2.0
"""When to ask again for a merge that is under way."""


@dataclass(frozen=True, slots=True)
class FeedParts:
    """What all callers' feeds of one version have in common; built once per version."""

    version: int
    stages: tuple[StageState, ...]
    peers: tuple[Peer, ...]
    validators: tuple[Hotkey, ...]


def feed_parts(state: RunState) -> FeedParts:
    """The common parts of the feed as it is now."""
    memory = state.memory
    peers = (
        Peer(hotkey=member.hotkey, url=member.url, stage_index=member.stage_index, state=member.state)
        for stage_index in range(memory.num_stages)
        for member in memory.membership.of_stage(stage_index)
    )
    validators = tuple(state.validators[:VALIDATORS_MAX])
    return FeedParts(memory.version, _stage_states(state), tuple(peers), validators)


def feed(state: RunState, parts: FeedParts, hotkey: Hotkey, now_s: float) -> Feed:
    """The feed for one caller: a member sees its own stage's plan and newest manifest."""
    member = state.memory.membership.get(hotkey)
    stage = state.stage_of(member) if member is not None else None
    return Feed(
        version=parts.version,
        now_s=now_s,
        finished=state.is_finished,
        assignment=Joined(stage_index=member.stage_index, state=member.state) if member is not None else None,
        stages=parts.stages,
        peers=parts.peers,
        merge_plan=stage.plan if stage is not None else None,
        manifest=stage.newest_manifest if stage is not None else None,
        validators=parts.validators,
    )


def status(state: RunState, now_s: float) -> RunStatus:
    """How the run is doing, for people."""
    memory = state.memory
    leases, losses = memory.leases, memory.losses
    return RunStatus(
        run_id=state.spec.run_id,
        now_s=now_s,
        started_s=memory.started_s,
        finished=state.is_finished,
        finish_reason=memory.finish_reason,
        outer_step=min(stage.outer_step for stage in memory.stages),
        outer_steps=state.spec.outer_steps,
        stages=_stage_states(state),
        checkpoint=memory.ledger.checkpoint,
        miners=tuple(
            MinerStatus(
                hotkey=member.hotkey,
                stage_index=member.stage_index,
                state=member.state,
                url=member.url,
                heartbeat=member.heartbeat,
                last_seen_s=member.last_seen_s,
                num_microbatches=member.num_credited,
            )
            for member in sorted(memory.membership.members.values(), key=lambda each: (each.stage_index, each.hotkey))
        ),
        microbatches_started=leases.num_started,
        microbatches_applied=leases.num_applied,
        microbatches_cancelled=leases.num_cancelled,
        microbatches_repaired=Repairs(
            rerouted=memory.num_rerouted, spliced=memory.num_spliced, released=leases.num_released
        ),
        tokens=leases.num_applied * state.spec.tokens_per_microbatch,
        anchors_equal=memory.anchors_equal,
        num_checks=memory.ledger.num_checks,
        num_verdicts_failed=memory.ledger.num_verdicts_failed,
        staleness=tuple(StageStaleness(counts=tuple(counts)) for counts in memory.staleness.counts),
        recent_losses=losses.points(max(0, losses.total - _RECENT_LOSSES), _RECENT_LOSSES),
        notices=tuple(memory.notices),
    )


def ledger(state: RunState, query: LedgerQuery) -> Ledger:
    """Credited work and verdicts from an outer step on."""
    memory = state.memory
    flops = tuple(figures.microbatch_flops for figures in state.figures)
    return memory.ledger.summary(query.from_outer_step, memory.num_entries, memory.ledger_digest, flops)


def pay(state: RunState, hotkey: Hotkey) -> MinerPay:
    """A miner's whole pay. Raises RefusedError for a hotkey that the run does not know."""
    if hotkey not in state.memory.membership.members:
        raise refused(RefusalCode.NOT_FOUND, "no such miner in this run")
    book = state.memory.ledger
    summary = ledger(state, LedgerQuery(from_outer_step=window_start(book.outer_step, state.spec)))
    return miner_pay(book, summary, state.spec, hotkey)


def losses(state: RunState, query: LossQuery) -> Losses:
    """Losses of applied microbatches from the one numbered `offset` on."""
    history = state.memory.losses
    return Losses(points=history.points(query.offset, BATCH_MAX), total=history.total)


def pathways(state: RunState, query: PathwayQuery) -> Pathways:
    """Paths and losses of an outer step's applied trips, a page at a time."""
    return state.memory.pathways.page(query.outer_step, query.offset, BATCH_MAX)


def boundaries(state: RunState, query: BoundaryQuery) -> Boundaries:
    """What each miner last reported of its neighbours, a page at a time, in the order of hotkeys."""
    members = state.memory.membership.members.values()
    reporting = sorted(
        (member.hotkey, member.stage_index, member.boundary)
        for member in members
        if member.boundary is not None and (query.after is None or member.hotkey > query.after)
    )
    return Boundaries(
        records=tuple(
            BoundaryRecord(hotkey=hotkey, stage_index=stage_index, report=report)
            for hotkey, stage_index, report in reporting[:BOUNDARY_PAGE_MAX]
        )
    )


def manifests(state: RunState, query: ManifestQuery) -> Manifests:
    """A stage's manifests from an outer step on; none when that one is not kept, or not there yet."""
    if query.stage_index >= state.memory.num_stages:
        return Manifests(manifests=())
    kept = state.memory.stages[query.stage_index].manifests
    found: list[Manifest] = []
    while (outer_step := query.from_outer_step + len(found)) in kept and len(found) < BATCH_MAX:
        found.append(kept[outer_step])
    return Manifests(manifests=tuple(found))


def merge(state: RunState, query: MergeQuery) -> MergeRecord:
    """How a stage's outer step was merged. Raises RefusedError when it is not kept, or not known yet (BUSY)."""
    stages = state.memory.stages
    stage = stages[query.stage_index] if query.stage_index < len(stages) else None
    record = None if stage is None else stage.merges.get(query.outer_step)
    if record is not None:
        return record
    where = f"merge of stage {query.stage_index}, outer step {query.outer_step}"
    if stage is not None and stage.outer_step <= query.outer_step < state.memory.final_outer_step:
        raise refused(RefusalCode.BUSY, f"the {where} has not been settled yet", MERGE_RETRY_S)
    raise refused(RefusalCode.NOT_FOUND, f"the {where} is not kept")


def commitments(state: RunState, query: CommitmentQuery) -> Commitments:
    """What miners committed to in an outer step, in the order of their hotkeys."""
    step = state.memory.ledger.steps.get(query.outer_step)
    return Commitments(records=tuple(record for _, record in sorted(step.commitments.items())) if step else ())


def _stage_states(state: RunState) -> tuple[StageState, ...]:
    return tuple(_stage_state(state, stage) for stage in state.memory.stages)


def _stage_state(state: RunState, stage: StageProgress) -> StageState:
    task = stage.task
    training_step = state.training_step(stage)
    return StageState(
        stage_index=stage.stage_index,
        phase=stage.phase,
        outer_step=stage.outer_step,
        deadline_s=stage.deadline_s,
        checkpoint=stage.newest_checkpoint,
        checkpoint_by=task.hotkey if task is not None and task.upload is None else None,
        anchor_digest=stage.anchor_digest,
        trains_ahead=training_step is not None and training_step > stage.outer_step,
    )
