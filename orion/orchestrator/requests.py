"""What a miner or validator may ask for, message by message.

Each handler either changes the state and answers, or raises RefusedError and has changed nothing. Handlers check
everything that a message claims against what the orchestrator knows; whatever is wrong with it concerns its sender
alone. Phases are moved elsewhere: handlers only note that something has come.
"""

from collections.abc import Sequence
from typing import assert_never

from orion.common.ids import Hotkey, MemberState
from orion.common.protocol.entries import Proof, Said, TripsLeased
from orion.common.protocol.keys import checkpoint_key, pseudo_gradient_key, reduced_key
from orion.common.protocol.messages import (
    Applied,
    CheckpointUploaded,
    Done,
    Heartbeat,
    Join,
    Joined,
    Lease,
    LeasedMicrobatch,
    LeaseRequest,
    Leave,
    ObjectRef,
    Reduced,
    RefusalCode,
    Report,
    Uploaded,
)
from orion.common.protocol.records import ScoreSheet, Verdict
from orion.common.protocol.refusals import refused
from orion.orchestrator import late
from orion.orchestrator.assignment import choose_stage
from orion.orchestrator.barring import bar_if_failed, has_failed, release_if_clear
from orion.orchestrator.checkpoints import ask_another
from orion.orchestrator.events import Request, Response
from orion.orchestrator.leases import Trip
from orion.orchestrator.membership import Member
from orion.orchestrator.merge import Copy
from orion.orchestrator.reports import said, take_report
from orion.orchestrator.stages import Applying, Reducing, StageProgress, Uploading
from orion.orchestrator.state import RunState
from orion.orchestrator.suspicion import heard

_RETRY_SOON_S = 0.5
_RETRY_REGISTRATION_S = 5.0
SHEETS_PER_OUTER_STEP_MAX = 32
"""Score sheets taken from one validator while an outer step is the newest: one for each attempt to set weights."""
LEASES_PER_CREDIT_MAX = 8
"""Live leases of one miner ÷ what it admits at a time: ended trips are reported in batches, so a few times its credits
are in use at any moment; more would only be hoarding."""


def answer(state: RunState, hotkey: Hotkey, message: Request, proof: Proof | None) -> Response:
    """Does what the message asks for. Raises RefusedError."""
    if isinstance(message, Join):
        return _join(state, hotkey, message)
    if isinstance(message, Verdict):
        return _verdict(state, hotkey, message, proof)
    if isinstance(message, ScoreSheet):
        return _score_sheet(state, hotkey, message, proof)
    if isinstance(message, Report):
        return _report(state, hotkey, message, proof)
    return _answer_member(state, hotkey, message, proof)


def _answer_member(
    state: RunState,
    hotkey: Hotkey,
    message: Heartbeat | Leave | LeaseRequest | Uploaded | Reduced | Applied | CheckpointUploaded,
    proof: Proof | None,
) -> Response:
    """The messages of which each also renews its sender's membership."""
    member = state.memory.membership.get(hotkey)
    if member is None:
        raise refused(RefusalCode.NOT_MEMBER, "not a member (any more): join first")
    heard(state, member)
    match message:
        case Heartbeat():
            return _heartbeat(state, member, message)
        case Leave():
            state.remove(member, f"left: {message.reason}")
            return Done()
        case LeaseRequest():
            return _lease(state, member, message)
        case Uploaded():
            return _uploaded(state, member, message, proof)
        case Reduced():
            return _reduced(state, member, message, proof)
        case Applied():
            return _applied(state, member, message)
        case CheckpointUploaded():
            return _checkpoint_uploaded(state, member, message)
        case _:
            assert_never(message)


# --- membership -------------------------------------------------------------------------------------------------------


def _join(state: RunState, hotkey: Hotkey, join: Join) -> Joined:
    memory = state.memory
    if hotkey not in memory.permits:
        raise refused(RefusalCode.FORBIDDEN, "this hotkey is not registered on the subnet", _RETRY_REGISTRATION_S)
    if state.is_finished:
        raise refused(RefusalCode.WRONG_PHASE, "the run has ended")
    member = memory.membership.members.get(hotkey)
    if member is None or not member.is_present:
        if not memory.membership.has_room(hotkey):
            raise refused(RefusalCode.BUSY, "the run has as many miners as it can hold", _RETRY_REGISTRATION_S)
        member = _newcomer(state, hotkey, join, member)
        memory.membership.add(member)
        state.changed()
    if member.url != join.url:
        member.url = join.url
        state.changed()
    heard(state, member)
    member.next_report = 0  # a process that has started anew counts from 0; repeated records change nothing anyway
    late.leave(state.stage_of(member), hotkey)
    return Joined(stage_index=member.stage_index, state=member.state)


def _newcomer(state: RunState, hotkey: Hotkey, join: Join, known: Member | None) -> Member:
    """A record for one that was not a member, or is gone: it may well have its old stage's data still."""
    wish = join.stage_index if join.stage_index is not None or known is None else known.stage_index
    return Member(
        hotkey=hotkey,
        url=join.url,
        device=join.device,
        memory_bytes=join.memory_bytes,
        stage_index=choose_stage(state.memory.membership.supply(), state.spec.replicas, wish),
        state=MemberState.JOINING,
        last_seen_s=state.memory.now_s,
        num_credited=known.num_credited if known is not None else 0,
        is_barred=has_failed(state, hotkey),
    )


def _heartbeat(state: RunState, member: Member, heartbeat: Heartbeat) -> Done:
    stage = state.stage_of(member)
    if heartbeat.boundary is not None:
        member.boundary = heartbeat.boundary
    _count_repairs(state, member.heartbeat, heartbeat)
    known = () if member.heartbeat is None else member.heartbeat.staleness
    state.memory.staleness.add(member.stage_index, known, heartbeat.staleness)
    member.heartbeat = heartbeat.model_copy(update={"boundary": None})
    member.ready_outer_step = heartbeat.ready_outer_step
    release_if_clear(state, member)
    if heartbeat.ready_outer_step is None:
        member.distrusted_until_s = 0.0
        if member.state in (MemberState.READY, MemberState.ACTIVE) and _must_hold_anchor(stage, heartbeat):
            state.send_back(member, "it holds no anchor")
    elif member.state is MemberState.JOINING and member.trusts_ready(stage.outer_step, state.memory.now_s):
        state.set_state(member, MemberState.READY)
    return Done()


def _count_repairs(state: RunState, before: Heartbeat | None, heartbeat: Heartbeat) -> None:
    """Miners count since their process started: where a count has fallen, another one has begun."""
    if before is None or heartbeat.rerouted < before.rerouted or heartbeat.spliced < before.spliced:
        state.memory.num_rerouted += heartbeat.rerouted
        state.memory.num_spliced += heartbeat.spliced
    else:
        state.memory.num_rerouted += heartbeat.rerouted - before.rerouted
        state.memory.num_spliced += heartbeat.spliced - before.spliced


def _must_hold_anchor(stage: StageProgress, heartbeat: Heartbeat) -> bool:
    """Whether a miner that knows what the stage is doing now should hold an anchor: always, but while it applies."""
    is_current = heartbeat.outer_step == stage.outer_step and heartbeat.phase is stage.phase
    return is_current and not isinstance(stage.activity, Applying)


# --- work -------------------------------------------------------------------------------------------------------------


def _lease(state: RunState, member: Member, request: LeaseRequest) -> Lease:
    memory = state.memory
    if member.stage_index != 0:
        raise refused(RefusalCode.WRONG_STAGE, "only the first stage leases microbatches")
    stage = state.stage_of(member)
    if request.outer_step != state.training_step(stage):
        raise refused(
            RefusalCode.WRONG_PHASE, f"the stage is in {stage.phase} of outer step {stage.outer_step}", _RETRY_SOON_S
        )
    if member.state is not MemberState.ACTIVE:
        raise refused(RefusalCode.WRONG_PHASE, "takes work from the next outer step on", _RETRY_SOON_S)
    without = [index for index in range(memory.num_stages) if not memory.membership.count(index, MemberState.ACTIVE)]
    if without or not memory.train.is_open:
        raise refused(RefusalCode.NO_WORK, "not every stage is training yet", _RETRY_SOON_S)
    again = memory.leases.leased_from(member.hotkey, request.next_microbatch_id)[: request.num_microbatches]
    if again:
        return _granted(request.outer_step, again)
    num_free = LEASES_PER_CREDIT_MAX * state.spec.flow.in_flight_max - memory.leases.num_live_of.get(member.hotkey, 0)
    if num_free <= 0:
        raise refused(RefusalCode.BUSY, "report how earlier leases ended first", _RETRY_SOON_S)
    deadline_s = min(memory.now_s + state.spec.time_limits.microbatch_s, memory.train.deadline_s)
    trips = memory.leases.lease(member.hotkey, min(request.num_microbatches, num_free), deadline_s)
    if not trips:
        raise refused(RefusalCode.NO_WORK, "the share of this outer step has been given out", _RETRY_SOON_S)
    lease = _granted(request.outer_step, trips)
    state.record(TripsLeased(outer_step=request.outer_step, lessee=member.hotkey, trips=lease.microbatches))
    return lease


def _granted(outer_step: int, trips: Sequence[Trip]) -> Lease:
    leased = tuple(LeasedMicrobatch(microbatch_id=trip.microbatch_id, data_id=trip.data_id) for trip in trips)
    return Lease(outer_step=outer_step, microbatches=leased, deadline_s=min(trip.deadline_s for trip in trips))


def _report(state: RunState, hotkey: Hotkey, report: Report, proof: Proof | None) -> Done:
    """Also of a miner that has just gone: its partners are credited by what it says."""
    member = state.memory.membership.members.get(hotkey)
    if member is None:
        raise refused(RefusalCode.NOT_MEMBER, "not a member: join first")
    if member.is_present:
        heard(state, member)
    take_report(state, member, report, proof)
    return Done()


# --- the outer step ---------------------------------------------------------------------------------------------------


def _uploaded(state: RunState, member: Member, uploaded: Uploaded, proof: Proof | None) -> Done:
    stage = state.stage_of(member)
    uploading = stage.activity
    contribution = uploaded.contribution
    if contribution == late.announced(stage, member.hotkey, uploaded.outer_step):
        _stored(state, uploaded)
        return Done()
    if not isinstance(uploading, Uploading) or uploaded.outer_step != stage.outer_step:
        raise _wrong_phase(stage)
    if member.hotkey not in uploading.awaited:
        raise refused(RefusalCode.WRONG_PHASE, "did not train in this outer step")
    keys = [
        pseudo_gradient_key(stage.outer_step, stage.stage_index, member.hotkey, index)
        for index in range(state.spec.num_partitions)
    ]
    if contribution.voice != (member.hotkey, 0) or [ref.key for ref in contribution.objects] != keys:
        raise refused(RefusalCode.MALFORMED, "a contribution names its miner's own object of every partition, in order")
    for ref in contribution.objects:
        _check_size(ref, state.figures[stage.stage_index].contribution_bytes_max)
    commitment = state.memory.ledger.commitment(stage.outer_step, member.hotkey)
    if commitment is None or not commitment.is_final:
        raise refused(RefusalCode.BUSY, "report the final commitment of this outer step first", _RETRY_SOON_S)
    if contribution.num_microbatches > commitment.num_contributed:
        raise refused(RefusalCode.CONFLICT, f"{commitment.num_contributed} microbatches were committed to, not more")
    earlier = uploading.uploads.get(member.hotkey)
    if earlier != contribution:
        if earlier is not None and all(state.memory.objects.is_durable(ref) for ref in earlier.objects):
            raise refused(RefusalCode.CONFLICT, "another contribution of this outer step is in the store already")
        if uploading.partitions is not None:
            raise refused(RefusalCode.CONFLICT, "contributions are being read: none can be announced or changed")
        uploading.uploads[member.hotkey] = contribution
        state.record(said(member, uploaded, proof))
        state.look_again()
    if uploaded.is_stored and member.hotkey not in uploading.stored:
        uploading.stored.append(member.hotkey)
    _stored(state, uploaded)
    return Done()


def _stored(state: RunState, uploaded: Uploaded) -> None:
    """Has the store asked for what is said to lie there."""
    if uploaded.is_stored:
        for ref in uploaded.contribution.objects:
            state.watch(ref)


def _reduced(state: RunState, member: Member, reduced: Reduced, proof: Proof | None) -> Done:
    stage = state.stage_of(member)
    reducing = stage.activity
    if not isinstance(reducing, Reducing) or reduced.outer_step != stage.outer_step:
        raise _wrong_phase(stage)
    if reduced.partition_index >= len(reducing.partitions):
        raise refused(RefusalCode.MALFORMED, "no such partition")
    partition = reducing.partitions[reduced.partition_index]
    if member.hotkey not in partition.reducers:
        raise refused(RefusalCode.FORBIDDEN, "not a reducer of this partition")
    key = reduced_key(stage.outer_step, stage.stage_index, member.hotkey, partition.partition_index)
    contributors = {contribution.voice for contribution in reducing.contributions}
    excluded = {exclusion.voice for exclusion in reduced.excluded}
    if reduced.object.key != key or not excluded < contributors or len(excluded) != len(reduced.excluded):
        raise refused(
            RefusalCode.MALFORMED, "a mean has its reducer's own key and leaves out some contributors at most"
        )
    _check_size(reduced.object, state.figures[stage.stage_index].mean_bytes_max)
    copy = Copy(reduced.object, reduced.excluded)
    earlier = partition.copies.get(member.hotkey)
    if partition.outcome is not None:
        return Done()
    if earlier != copy:
        if earlier is not None and state.memory.objects.is_durable(earlier.object):
            raise refused(RefusalCode.CONFLICT, "another mean of this partition is in the store already")
        partition.copies[member.hotkey] = copy
        state.record(said(member, reduced, proof))
        state.look_again()
    if reduced.is_stored:
        state.watch(reduced.object)
    return Done()


def _applied(state: RunState, member: Member, applied: Applied) -> Done:
    stage = state.stage_of(member)
    if applied.outer_step < stage.outer_step:
        return Done()  # late; what the miner holds now is in its heartbeats
    applying = stage.activity
    if not isinstance(applying, Applying) or applied.outer_step != stage.outer_step:
        raise _wrong_phase(stage)
    if applying.digests.setdefault(member.hotkey, applied.state_digest) != applied.state_digest:
        raise refused(RefusalCode.CONFLICT, "another digest of this state was reported before")
    state.look_again()
    return Done()


def _checkpoint_uploaded(state: RunState, member: Member, uploaded: CheckpointUploaded) -> Done:
    stage = state.stage_of(member)
    task = stage.task
    if task is None or task.hotkey != member.hotkey or uploaded.outer_step != stage.outer_step:
        raise refused(RefusalCode.WRONG_PHASE, f"was not asked for a checkpoint of outer step {uploaded.outer_step}")
    if uploaded.object.key != checkpoint_key(stage.outer_step, stage.stage_index, member.hotkey):
        raise refused(RefusalCode.MALFORMED, "a checkpoint has its miner's own key")
    _check_size(uploaded.object, state.figures[stage.stage_index].checkpoint_bytes_max)
    if uploaded.state_digest != stage.anchor_digest:
        ask_another(state, stage, task, "has another anchor than agreed")
        return Done()
    task.upload = uploaded
    state.watch(uploaded.object)
    state.changed()
    return Done()


def _wrong_phase(stage: StageProgress) -> Exception:
    return refused(RefusalCode.WRONG_PHASE, f"the stage is in {stage.phase} of outer step {stage.outer_step}")


def _check_size(ref: ObjectRef, size_bytes_max: int) -> None:
    if ref.size_bytes > size_bytes_max:
        raise refused(RefusalCode.TOO_LARGE, f"{ref.key}: {ref.size_bytes} bytes, at most {size_bytes_max}")


# --- validation -------------------------------------------------------------------------------------------------------


def _verdict(state: RunState, hotkey: Hotkey, verdict: Verdict, proof: Proof | None) -> Done:
    memory = state.memory
    _check_permit(state, hotkey)
    if verdict.miner not in memory.membership.members or verdict.outer_step not in memory.ledger.steps:
        raise refused(RefusalCode.NOT_FOUND, "no such miner or outer step")
    taken = state.record(Said(hotkey=hotkey, stage_index=None, message=verdict, proof=proof))
    if taken.is_conflict:
        raise refused(RefusalCode.CONFLICT, "another verdict on this subject was given before")
    if taken.changed and not verdict.passed:
        state.notice(f"outer step {verdict.outer_step}: {verdict.miner} failed a check: {verdict.reason}")
        bar_if_failed(state, verdict.miner)
    return Done()


def _score_sheet(state: RunState, hotkey: Hotkey, sheet: ScoreSheet, proof: Proof | None) -> Done:
    """Kept as it is: whether it follows from the ledger is for anybody to compute, not for the orchestrator to say."""
    memory = state.memory
    _check_permit(state, hotkey)
    if sheet.num_entries > memory.num_entries:
        raise refused(RefusalCode.CONFLICT, f"the ledger has {memory.num_entries} entries, not {sheet.num_entries}")
    earlier = memory.ledger.sheets.get(hotkey)
    if earlier is None or earlier[1] != sheet:
        if memory.ledger.num_sheets(hotkey) >= SHEETS_PER_OUTER_STEP_MAX:
            raise refused(RefusalCode.BUSY, "enough score sheets in this outer step", _RETRY_REGISTRATION_S)
        state.record(Said(hotkey=hotkey, stage_index=None, message=sheet, proof=proof))
    return Done()


def _check_permit(state: RunState, hotkey: Hotkey) -> None:
    if not state.memory.permits.get(hotkey, False):
        raise refused(RefusalCode.FORBIDDEN, "this hotkey has no validator permit on the subnet", _RETRY_REGISTRATION_S)
