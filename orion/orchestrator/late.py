"""Contributions that came too late for their outer step's merge: they go into the next one.

A contribution that its miner announced while that could still bind it, and that does not lie whole in the store when
the upload phase closes, is late. Its miner goes on writing it, through the merge, the next train phase and the next
upload phase; if it is durable when that closes it is part of that merge, at a discount (`protocol.age`). So no finished
upload is thrown away, and nobody waits for a slow link beyond what the usual one takes. What does not get there in a
whole outer step is too old.

In overlapped runs a late miner takes in the merge that it was not part of, because the next outer step has begun where
its upload leads, which anybody can see once that is in the store. So there its next contribution counts only when that
is.

Invariants: a miner has one late contribution at most; one that is merged is of the outer step just before.
"""

from collections.abc import Iterable, Mapping

from orion.common.ids import Hotkey
from orion.common.protocol.keys import outer_step_prefix
from orion.common.protocol.messages import Contribution
from orion.orchestrator.stages import Late, StageProgress
from orion.orchestrator.state import RunState


def is_durable(state: RunState, contribution: Contribution) -> bool:
    """Whether the whole of it is in the store."""
    return all(state.memory.objects.is_durable(ref) for ref in contribution.objects)


def look_for(state: RunState, stage: StageProgress) -> None:
    """Has the store asked for all that is late: who wrote it may have died before it could say so."""
    for late in stage.late.values():
        for ref in late.contribution.objects:
            state.watch(ref)


def those_there(state: RunState, stage: StageProgress) -> list[Contribution]:
    """What is late and has come, as it counts in the merge of this outer step."""
    barred = {hotkey for hotkey, member in state.memory.membership.members.items() if member.is_barred}
    return [each for each in stage.aged() if each.hotkey not in barred and is_durable(state, each)]


def comes_before(state: RunState, stage: StageProgress, hotkey: Hotkey) -> bool:
    """Whether a miner's contribution does not count yet, because it follows from a late one that is still to come."""
    late = stage.late.get(hotkey)
    if state.spec.sync != "overlapped" or late is None or late.is_left:
        return False
    return not is_durable(state, late.contribution)


def close(
    state: RunState, stage: StageProgress, merged: Iterable[Contribution], rest: Mapping[Hotkey, Contribution]
) -> None:
    """The upload phase ends: what was late is merged now or is too old; the rest of what was announced is late now."""
    too_old = set(stage.late) - {each.hotkey for each in merged}
    if too_old:
        names = ", ".join(sorted(too_old))
        state.notice(f"stage {stage.stage_index}: too old for outer step {stage.outer_step}: late uploads of {names}")
    follows_nothing = {hotkey for hotkey in rest if comes_before(state, stage, hotkey)}
    stage.late = {
        hotkey: Late(stage.outer_step, rest[hotkey]) for hotkey in sorted(rest) if hotkey not in follows_nothing
    }


def keep(stage: StageProgress, contributions: Iterable[Contribution]) -> None:
    """Nothing came of this outer step's merge: what was in time for it goes into the next."""
    for contribution in contributions:
        if not contribution.age:
            stage.late[contribution.hotkey] = Late(stage.outer_step, contribution)


def leave(stage: StageProgress, hotkey: Hotkey) -> None:
    """A miner's process has begun anew: what it has not written it never will."""
    late = stage.late.get(hotkey)
    if late is not None:
        late.is_left = True


def announced(stage: StageProgress, hotkey: Hotkey, outer_step: int) -> Contribution | None:
    """What a miner may still write of an outer step that the stage has left, or whose upload phase is over."""
    late = stage.late.get(hotkey)
    return late.contribution if late is not None and late.outer_step == outer_step else None


def stop_looking(state: RunState, stage: StageProgress) -> None:
    """The store is no longer asked for pseudo-gradients of outer steps that are over, but for what is late."""
    awaited = {ref.key for late in stage.late.values() for ref in late.contribution.objects}
    for outer_step in (stage.outer_step - 2, stage.outer_step - 1):
        prefix = f"{outer_step_prefix(outer_step)}stage/{stage.stage_index}/pseudo-gradient/"
        state.memory.objects.stop_watching(prefix, awaited)
