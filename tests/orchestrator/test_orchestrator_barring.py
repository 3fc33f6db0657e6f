"""A miner with a failed check gets no more work, and nobody waits for it, until the check no longer counts."""

from orchestrator_world import VALIDATOR, World, hotkey_of, make_spec

from orion.common.ids import Hotkey, MemberState, Phase
from orion.common.protocol.messages import Joined, RefusalCode
from orion.common.protocol.records import Verdict

LIAR, HONEST = hotkey_of(0, 0), hotkey_of(0, 1)


def fail(world: World, miner: Hotkey, outer_step: int) -> None:
    world.accept(VALIDATOR, Verdict(miner=miner, outer_step=outer_step, passed=False, num_operations=3, reason="noise"))


def step_in_which_they_fail(world: World, *miners: Hotkey) -> None:
    """Verdicts on the outer step before arrive once training has ended."""
    num_applied = world.train()
    for miner in miners:
        fail(world, miner, 0)
    for hotkey, num_microbatches in num_applied.items():
        if hotkey in world.active(0) + world.active(1):
            world.upload(hotkey, num_microbatches)
    for stage_index in range(world.spec.num_stages):
        world.merge(stage_index)


def state_of(world: World, hotkey: Hotkey) -> MemberState:
    assignment = world.feed(hotkey).assignment
    assert assignment is not None, "a barred miner stays a member, so that others can still check it"
    return assignment.state


def started() -> World:
    world = World(make_spec(outer_steps=8, keep_outer_steps=2, validation={"score_window_outer_steps": 4}))
    world.start()
    world.outer_step()
    return world


def test_a_miner_that_failed_a_check_gets_no_more_work_whatever_it_says() -> None:
    world = started()
    fail(world, LIAR, 0)
    assert state_of(world, LIAR) is MemberState.JOINING
    world.beat(LIAR)
    assert state_of(world, LIAR) is MemberState.JOINING
    assert world.active(0) == [HONEST]
    joined = world.join(LIAR)
    assert isinstance(joined, Joined)
    assert joined.state is MemberState.JOINING


def test_its_contribution_is_not_merged_even_if_it_is_there_already() -> None:
    world = started()
    num_applied = world.train()
    world.upload(LIAR, max(1, num_applied.get(LIAR, 1)))
    fail(world, LIAR, 0)
    world.upload(HONEST, max(1, num_applied.get(HONEST, 1)))
    world.tick()
    plan = world.plan(0)
    assert plan is not None
    assert [contribution.hotkey for contribution in plan.contributions] == [HONEST]
    assert all(LIAR not in partition.reducers for partition in plan.partitions)


def test_it_may_work_again_when_the_check_has_left_the_window() -> None:
    world = started()
    step_in_which_they_fail(world, LIAR)
    states = []
    for _ in range(5):
        world.outer_step()
        world.beat(LIAR)
        states.append(state_of(world, LIAR))
    assert states[0] is MemberState.JOINING
    assert states[-1] is MemberState.ACTIVE


def test_leaving_and_joining_again_helps_nobody() -> None:
    world = started()
    fail(world, LIAR, 0)
    world.wait(world.spec.time_limits.member_s + 1.0, HONEST, hotkey_of(1, 0), hotkey_of(1, 1))
    world.join(LIAR, 0)
    world.beat(LIAR)
    assert state_of(world, LIAR) is MemberState.JOINING


def test_the_last_miner_of_a_stage_works_on() -> None:
    world = started()
    step_in_which_they_fail(world, LIAR, HONEST)
    assert world.active(0) == [HONEST]
    world.outer_step()
    assert world.phases[0] == (Phase.TRAIN, 3)


def test_a_verdict_of_nobody_in_particular_bars_nobody() -> None:
    world = started()
    verdict = Verdict(miner=LIAR, outer_step=0, passed=False, num_operations=3, reason="noise")
    assert world.refusal(HONEST, verdict) is RefusalCode.FORBIDDEN
    assert state_of(world, LIAR) is MemberState.ACTIVE
