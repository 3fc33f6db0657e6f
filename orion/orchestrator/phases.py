"""The rules that move phases, applied until none is due.

Level-triggered: each rule looks at the state and acts if something is due, so it does not matter which event came
before, or whether one was lost. Rules are in `training` (of the whole run), `merging` and `checkpoints` (of a stage).

Invariant: after `advance` no phase is past its deadline.
"""

from orion.orchestrator.checkpoints import advance_checkpoint
from orion.orchestrator.events import CheckObject
from orion.orchestrator.merging import advance_merge
from orion.orchestrator.state import RunState
from orion.orchestrator.suspicion import suspect_the_lost
from orion.orchestrator.training import advance_training

_ROUNDS_MAX = 64
"""Rounds in which every stage may move once. A stage without members passes its whole outer step in four."""


def pass_time(state: RunState) -> None:
    """What has become due by time alone: silent and lost members, overdue leases, unanswered looks at objects."""
    memory = state.memory
    memory.ticked_s = memory.now_s
    if not state.is_finished:
        for member in memory.membership.silent(memory.now_s - state.spec.time_limits.member_s):
            state.remove(member, f"silent for {state.spec.time_limits.member_s:g} s")
    suspect_the_lost(state)
    state.end_trips(memory.leases.overdue(memory.now_s), "not reported in time")
    state.outbox.extend(CheckObject(ref) for ref in memory.objects.due(memory.now_s))


def advance(state: RunState) -> None:
    """Applies every rule that is due, until none is."""
    state.memory.advanced_s = state.memory.now_s
    for _ in range(_ROUNDS_MAX):
        moved = advance_training(state)
        for stage in state.memory.stages:
            moved = advance_merge(state, stage) or moved
            moved = advance_checkpoint(state, stage) or moved
        if not moved:
            return
    raise AssertionError("the rules of the phases do not settle")
