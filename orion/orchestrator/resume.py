"""What happens to times when the orchestrator was away: nobody is blamed for not having reached it."""

from orion.orchestrator.retention import delete_again
from orion.orchestrator.stages import NEVER_S, Reducing, StageProgress, Uploading
from orion.orchestrator.state import RunState
from orion.orchestrator.suspicion import forget


def resume(state: RunState, away_s: float) -> None:
    """Counts silence from now, moves deadlines by the time away, and has lost effects done again."""
    memory = state.memory
    for member in memory.membership.members.values():
        if member.is_present:
            member.last_seen_s = memory.now_s
        member.distrusted_until_s += away_s
    forget(state)
    if memory.membership.first_join_s is not None:
        memory.membership.first_join_s += away_s
    for trip in memory.leases.live.values():
        trip.deadline_s += away_s
    memory.train.deadline_s = _moved(memory.train.deadline_s, away_s)
    for stage in memory.stages:
        _move_stage(stage, away_s)
    for watch in memory.objects.watched.values():
        watch.asked_s = 0.0
    delete_again(state)
    if memory.started_s is not None:
        state.notice(f"the orchestrator was away for {away_s:.1f} s")
    state.changed()


def _move_stage(stage: StageProgress, away_s: float) -> None:
    stage.deadline_s = _moved(stage.deadline_s, away_s)
    if stage.task is not None:
        stage.task.due_s += away_s
    if isinstance(stage.activity, Uploading):
        stage.activity.began_s += away_s
        stage.activity.due_s = {hotkey: due_s + away_s for hotkey, due_s in stage.activity.due_s.items()}
    if isinstance(stage.activity, Reducing):
        for partition in stage.activity.partitions:
            for asked in (partition.asked_s, partition.writers):
                asked.update({hotkey: asked_s + away_s for hotkey, asked_s in asked.items()})


def _moved(deadline_s: float, away_s: float) -> float:
    return min(NEVER_S, deadline_s + away_s)
