"""The train phase of the whole run: when it opens, what it shares out, when it ends.

TRAIN(k) opens when every stage has entered it and has somebody to train; until then nothing is leased, because no
microbatch could travel. It ends for all stages together: when every trip of its share has ended, or at its deadline.

In an overlapped run it opens sooner, when all stages have ended the train phase before; then they merge beside it, and
it ends no sooner than all have reached its anchor. Merging is bounded by deadlines, so this is too.

Invariants: who trains in an outer step held its anchor before it opened (or its stage had nobody left); the share is
fixed at the opening; an open train phase has a deadline.
"""

from orion.common.ids import MemberState
from orion.common.protocol.entries import OuterStepOpened
from orion.orchestrator.checkpoints import begin_finishing
from orion.orchestrator.merging import begin_upload
from orion.orchestrator.stages import MERGING, StageProgress, Training
from orion.orchestrator.state import RunState, TrainRound

START_MEMBER_TIMES = 4.0
"""Times `time_limits.member_s` that the run waits for all replicas after the first join; then one a stage is enough."""


def advance_training(state: RunState) -> bool:
    """Opens or ends the train phase if it is time; whether it was."""
    if state.memory.train.is_open:
        return _replace_the_lost(state) or _end_if_due(state)
    return _open_if_due(state)


# --- open -------------------------------------------------------------------------------------------------------------


def _open_if_due(state: RunState) -> bool:
    memory = state.memory
    outer_step = memory.train.outer_step
    if not all(_may_train(state, stage, outer_step) for stage in memory.stages):
        return False
    are_merged = all(_is_in_training(stage, outer_step) for stage in memory.stages)
    if not are_merged and outer_step >= memory.final_outer_step:
        return False
    if are_merged and _time_is_up(state):
        memory.final_outer_step = outer_step
        for stage in memory.stages:
            begin_finishing(state, stage)
        return True
    if memory.started_s is not None:
        _activate_ready(state)
    elif not _may_start(state):
        return False
    lacking = [
        stage.stage_index for stage in memory.stages if not _num_trainers(state, stage, memory.started_s is None)
    ]
    if lacking:
        if memory.train.lacking != lacking:
            memory.train.lacking = lacking
            state.notice(f"outer step {outer_step} waits: nobody is ready in stages {lacking}")
        return False
    _open(state)
    return True


def _may_start(state: RunState) -> bool:
    memory = state.memory
    if memory.membership.first_join_s is None:
        return False
    ready = [memory.membership.count(stage_index, MemberState.READY) for stage_index in range(memory.num_stages)]
    if min(ready) >= state.spec.replicas:
        return True
    waited_s = memory.now_s - memory.membership.first_join_s
    return waited_s >= START_MEMBER_TIMES * state.spec.time_limits.member_s


def _num_trainers(state: RunState, stage: StageProgress, at_start: bool) -> int:
    wanted = MemberState.READY if at_start else MemberState.ACTIVE
    return state.memory.membership.count(stage.stage_index, wanted)


def _open(state: RunState) -> None:
    memory = state.memory
    train = memory.train
    _activate_ready(state)
    if memory.started_s is None:
        memory.started_s = memory.now_s
    least = min(len(memory.membership.heard(index, MemberState.ACTIVE)) for index in range(memory.num_stages))
    share = state.spec.inner_steps * state.spec.microbatches_per_step * least
    memory.leases.open(train.outer_step, share)
    train.is_open = True
    _set_deadline(state, memory.now_s + state.spec.time_limits.train_s)
    state.changed()


def _activate_ready(state: RunState) -> None:
    """Who is ready trains. In a stage that is still merging they are not ready for this outer step: they apply what is
    merged with the others, and train from then on."""
    for stage in state.memory.stages:
        if isinstance(stage.activity, Training):
            _activate(state, stage)


def _set_deadline(state: RunState, deadline_s: float) -> None:
    state.memory.train.deadline_s = deadline_s
    for stage in state.memory.stages:
        if isinstance(stage.activity, Training):
            stage.deadline_s = deadline_s


def _activate(state: RunState, stage: StageProgress) -> None:
    """Whoever holds the anchor of the outer step trains in it."""
    for member in state.memory.membership.of_stage(stage.stage_index, MemberState.READY):
        state.set_state(member, MemberState.ACTIVE)


# --- while it is open -------------------------------------------------------------------------------------------------


def _replace_the_lost(state: RunState) -> bool:
    """A stage that has lost everybody who trained takes whoever is ready: nothing could travel otherwise."""
    moved = False
    for stage in state.memory.stages:
        if not state.memory.membership.count(stage.stage_index, MemberState.ACTIVE) and state.memory.membership.count(
            stage.stage_index, MemberState.READY
        ):
            state.notice(f"outer step {stage.outer_step}: newcomers take over stage {stage.stage_index}")
            _activate(state, stage)
            moved = True
    return moved


# --- end --------------------------------------------------------------------------------------------------------------


def _end_if_due(state: RunState) -> bool:
    memory = state.memory
    train = memory.train
    if memory.now_s < train.deadline_s and not memory.leases.all_ended:
        return False
    merging = [stage for stage in memory.stages if not _is_in_training(stage, train.outer_step)]
    if merging:
        return _wait_for(state, merging)
    if not memory.leases.all_ended:
        unfinished = len(memory.leases.live) + memory.leases.num_fresh + len(memory.leases.retries)
        state.notice(f"outer step {train.outer_step}: training cut short with {unfinished} microbatches unfinished")
    memory.leases.close()
    if _time_is_up(state):
        memory.final_outer_step = min(memory.final_outer_step, train.outer_step + 1)
    memory.train = TrainRound(train.outer_step + 1)
    state.record(OuterStepOpened(outer_step=train.outer_step + 1))
    for stage in memory.stages:
        begin_upload(state, stage)
    return True


def _wait_for(state: RunState, merging: list[StageProgress]) -> bool:
    """Training has nothing more to do, or no more time, but stages still merge: it waits as long as they may take.
    Whether the deadline has moved."""
    train = state.memory.train
    latest_s = max(stage.deadline_s for stage in merging)
    if state.memory.now_s < train.deadline_s or latest_s <= train.deadline_s:
        return False
    _set_deadline(state, latest_s)
    state.changed()
    return True


def _may_train(state: RunState, stage: StageProgress, outer_step: int) -> bool:
    """Whether the stage could train that outer step now."""
    merges_before = isinstance(stage.activity, MERGING) and stage.outer_step == outer_step - 1
    return _is_in_training(stage, outer_step) or (state.spec.sync == "overlapped" and merges_before)


def _is_in_training(stage: StageProgress, outer_step: int) -> bool:
    return isinstance(stage.activity, Training) and stage.outer_step == outer_step


def _time_is_up(state: RunState) -> bool:
    run_s, started_s = state.spec.time_limits.run_s, state.memory.started_s
    return run_s is not None and started_s is not None and state.memory.now_s >= started_s + run_s
