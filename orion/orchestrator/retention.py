"""What is forgotten as outer steps go by: objects in the store, manifests, trips, old work.

Invariants: whatever is needed to build the anchor of any of the last `keep_outer_steps` outer steps stays; so do all
contributions that a merge which stays is made of; so does the newest checkpoint of the whole model, unless it has
become very old because stages never came together again.
"""

from orion.common.protocol.entries import RecordsClosed
from orion.common.protocol.keys import outer_step_prefix
from orion.orchestrator.events import DeleteObjects
from orion.orchestrator.state import RunState

WHOLE_KEPT_FACTOR = 4
"""Times `keep_outer_steps` that the newest checkpoint of the whole model outlives the window: a bound on the store."""


def forget_old(state: RunState) -> None:
    """Drops what no anchor, check or score needs any more, and has its objects deleted."""
    memory = state.memory
    keep_from = state.oldest_kept_step
    needed_from = min(stage.rebuildable_from(keep_from) for stage in memory.stages)
    whole = memory.ledger.checkpoint
    if whole is not None:
        oldest = keep_from - WHOLE_KEPT_FACTOR * state.spec.keep_outer_steps
        needed_from = min(needed_from, max(whole.outer_step, oldest))
    objects_from = needed_from - _oldest_age(state, needed_from)
    for outer_step in range(memory.deleted_before, objects_from):
        _delete(state, outer_step)
    memory.deleted_before = max(memory.deleted_before, objects_from)
    for stage in memory.stages:
        stage.checkpoints = [ref for ref in stage.checkpoints if ref.outer_step >= needed_from]
        for outer_step in [step for step in stage.manifests if step < needed_from]:
            del stage.manifests[outer_step]
            del stage.merges[outer_step]
    memory.leases.forget_before(keep_from)
    memory.pathways.forget_before(keep_from)
    scored_from = memory.train.outer_step - state.spec.validation.score_window_outer_steps
    work_before = max(0, min(keep_from, scored_from))
    if keep_from > memory.ledger.trips_from:
        state.record(RecordsClosed(trips_before=keep_from, work_before=work_before))


def _oldest_age(state: RunState, outer_step: int) -> int:
    """How many outer steps before the oldest merge that stays the contributions were trained that it is made of."""
    records = (stage.merges.get(outer_step) for stage in state.memory.stages)
    return max((each.age for record in records if record is not None for each in record.contributions), default=0)


def delete_again(state: RunState) -> None:
    """Repeats the newest deletions, which a crash may have cut off."""
    newest = state.memory.deleted_before
    for outer_step in range(max(0, newest - state.spec.keep_outer_steps), newest):
        _delete(state, outer_step)


def _delete(state: RunState, outer_step: int) -> None:
    prefix = outer_step_prefix(outer_step)
    state.memory.objects.forget(prefix)
    state.outbox.append(DeleteObjects(prefix))
