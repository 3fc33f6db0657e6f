"""Whole anchors in the store: who is asked to write one, when, and what happens when it does not come.

Every `checkpoint_every` outer steps, and at the end of the run, one member of each stage uploads the anchor of the
outer step under way, beside its training. Nobody waits for it but the end of the run.

Invariants: a published checkpoint is durable and its state is the one that its stage's replicas agreed on; one of the
whole model has all stages at the same outer step; at most `_ATTEMPTS_MAX` members are asked for the same one.
"""

from orion.common.ids import Hotkey, MemberState
from orion.common.protocol.entries import CheckpointKept
from orion.common.protocol.messages import CheckpointRef, RunCheckpoint
from orion.orchestrator.retention import forget_old
from orion.orchestrator.stages import NEVER_S, CheckpointTask, Ended, Finishing, StageProgress
from orion.orchestrator.state import RunState

_ATTEMPTS_MAX = 3


def leave_anchor(state: RunState, stage: StageProgress) -> None:
    """The stage has just reached an outer step: asks for its anchor if one is due. An unfinished older one lapses."""
    if stage.task is not None:
        state.notice(f"stage {stage.stage_index}: no checkpoint of outer step {stage.outer_step - 1}")
        stage.task = None
    if stage.outer_step % state.spec.checkpoint_every == 0:
        _ask(state, stage, [])


def begin_finishing(state: RunState, stage: StageProgress) -> None:
    """The stage has reached the run's last anchor: it ends once that is in the store."""
    stage.activity = Finishing()
    stage.deadline_s = NEVER_S
    if stage.task is None and not _has_checkpoint(stage):
        _ask(state, stage, [])
    if stage.task is not None:
        stage.deadline_s = stage.task.due_s
    state.changed()


def advance_checkpoint(state: RunState, stage: StageProgress) -> bool:
    """Takes a checkpoint that has come, asks another member for a late one, ends a finishing stage; whether it did."""
    task = stage.task
    if task is not None:
        upload = task.upload
        if upload is not None and state.memory.objects.is_durable(upload.object):
            stage.task = None
            checkpoint = CheckpointRef(
                stage_index=stage.stage_index,
                outer_step=stage.outer_step,
                object=upload.object,
                state_digest=upload.state_digest,
            )
            stage.checkpoints.append(checkpoint)
            _note_if_whole(state, stage.outer_step)
            forget_old(state)
            state.changed()
            return True
        member = state.memory.membership.get(task.hotkey)
        is_lost = upload is None and (member is None or member.state is MemberState.JOINING or member.is_suspect)
        if is_lost or state.memory.now_s >= task.due_s:
            ask_another(state, stage, task, "has gone" if is_lost else "is late")
            return True
        return False
    if not isinstance(stage.activity, Finishing):
        return False
    if not _has_checkpoint(stage):
        state.notice(f"stage {stage.stage_index} ends without a checkpoint of its last anchor")
    stage.activity = Ended()
    stage.deadline_s = NEVER_S
    if state.is_finished:
        is_whole = state.memory.final_outer_step == state.spec.outer_steps
        state.memory.finish_reason = "all outer steps are done" if is_whole else "the time limit has passed"
    state.changed()
    return True


def _note_if_whole(state: RunState, outer_step: int) -> None:
    """Once every stage's anchor of an outer step is durable, the public ledger says so, and what they are."""
    memory = state.memory
    refs = [ref for stage in memory.stages for ref in stage.checkpoints if ref.outer_step == outer_step]
    newest = memory.ledger.checkpoint
    if len(refs) < memory.num_stages or (newest is not None and newest.outer_step >= outer_step):
        return
    checkpoint = RunCheckpoint(
        outer_step=outer_step, next_data_id=memory.leases.first_data_ids[outer_step], stages=tuple(refs)
    )
    state.record(CheckpointKept(checkpoint=checkpoint))


def ask_another(state: RunState, stage: StageProgress, task: CheckpointTask, reason: str) -> None:
    """Gives a checkpoint to another member, or up when too many have failed or nobody is left."""
    state.notice(
        f"stage {stage.stage_index}: {task.hotkey} {reason} with the checkpoint of outer step {stage.outer_step}"
    )
    stage.task = None
    if len(task.tried) < _ATTEMPTS_MAX:
        _ask(state, stage, task.tried)
    state.changed()


def _ask(state: RunState, stage: StageProgress, tried: list[Hotkey]) -> None:
    active = state.memory.membership.heard(stage.stage_index, MemberState.ACTIVE)
    able = [member.hotkey for member in active if member.hotkey not in tried]
    if not able or stage.anchor_digest is None:
        return
    hotkey = min(able, key=lambda hotkey: state.draw(f"checkpoint {stage.outer_step} {hotkey}"))
    due_s = state.memory.now_s + state.figures[stage.stage_index].checkpoint_s
    stage.task = CheckpointTask(hotkey, due_s, [*tried, hotkey])
    if isinstance(stage.activity, Finishing):
        stage.deadline_s = due_s
    state.changed()


def _has_checkpoint(stage: StageProgress) -> bool:
    newest = stage.newest_checkpoint
    return newest is not None and newest.outer_step == stage.outer_step
