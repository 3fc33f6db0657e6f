"""Overlapped runs: the next outer step trains while stages upload and merge, and ends no sooner than that is done."""

from orchestrator_world import World, hotkey_of, make_spec

from orion.common.ids import MemberState, Phase
from orion.common.protocol.messages import RefusalCode

A0 = hotkey_of(0, 0)


def overlapped(**changes: object) -> World:
    world = World(make_spec(sync="overlapped", **changes))
    world.start()
    return world


def ahead(**changes: object) -> tuple[World, dict[str, int]]:
    """A run that has just ended training outer step 0; who has applied how many."""
    world = overlapped(**changes)
    return world, dict(world.train())


def test_the_next_outer_step_trains_at_once() -> None:
    world, num_applied = ahead()
    assert world.phases == [(Phase.UPLOAD, 0)] * 2
    assert [stage.training_step for stage in world.feed(A0).stages] == [1, 1]
    (leased,) = world.lease(A0)
    assert leased.microbatch_id == world.status.microbatches_started - 1
    world.upload_all(num_applied)
    assert world.phases == [(Phase.MERGE, 0)] * 2
    world.lease(A0)
    world.merge(0)
    assert world.phases == [(Phase.TRAIN, 1), (Phase.MERGE, 0)]
    assert [stage.training_step for stage in world.feed(A0).stages] == [1, 1]
    world.lease(A0)


def test_a_blocking_run_leases_nothing_meanwhile() -> None:
    world = World(make_spec())
    world.start()
    world.train()
    assert [stage.training_step for stage in world.feed(A0).stages] == [None, None]
    assert world.refusal(A0, world.lease_request()) is RefusalCode.WRONG_PHASE


def test_it_ends_no_sooner_than_the_last_one_is_applied_everywhere() -> None:
    world, num_applied = ahead()
    next_applied = world.train()
    assert world.refusal(A0, world.lease_request()) is RefusalCode.NO_WORK
    world.tick()
    world.upload_all(num_applied)
    world.merge(0)
    assert world.phases == [(Phase.TRAIN, 1), (Phase.MERGE, 0)]
    world.reduce_all(1)
    world.apply_all(1)
    assert world.phases == [(Phase.UPLOAD, 1)] * 2
    assert [stage.training_step for stage in world.feed(A0).stages] == [2, 2]
    world.upload_all(next_applied)
    assert world.phases == [(Phase.MERGE, 1)] * 2


def test_commitments_to_both_outer_steps_are_taken() -> None:
    world, num_applied = ahead()
    world.commit(A0, num_applied[A0])
    assert not world.notices("wrong or late")
    for stage_index in range(2):
        for hotkey in world.active(stage_index):
            if hotkey != A0:
                world.upload(hotkey, num_applied[hotkey])


def test_training_waits_for_stages_that_merge_beyond_its_deadline_and_they_have_deadlines() -> None:
    world, _ = ahead(time_limits={"transfer_grace_s": 30.0, "train_s": 20.0, "microbatch_s": 10.0, "member_s": 10.0})
    everybody = [*world.active(0), *world.active(1)]
    world.wait(25.0, *everybody)
    assert world.phases == [(Phase.UPLOAD, 0)] * 2, "nobody has uploaded anything, and the train phase is past its time"
    assert [stage.training_step for stage in world.feed(A0).stages] == [1, 1]
    world.wait(300.0, *everybody)
    assert min(outer_step for _, outer_step in world.phases) >= 1
    assert any("training cut short" in notice for notice in world.status.notices)


def test_after_the_last_outer_step_nothing_trains() -> None:
    world, num_applied = ahead(outer_steps=2)
    next_applied = world.train()
    world.upload_all(num_applied)
    for stage_index in range(2):
        world.merge(stage_index)
    assert world.phases == [(Phase.UPLOAD, 1)] * 2
    assert [stage.training_step for stage in world.feed(A0).stages] == [None, None]
    world.upload_all(next_applied)
    for stage_index in range(2):
        world.merge(stage_index)
    assert world.finished


def test_a_newcomer_trains_from_the_next_anchor_on() -> None:
    world, num_applied = ahead()
    newcomer = hotkey_of(0, 2)
    world.join(newcomer, 0)
    world.beat(newcomer)
    assert newcomer in world.members(0, MemberState.READY)
    world.train()
    world.upload_all(num_applied)
    world.merge(0)
    assert newcomer in world.members(0, MemberState.ACTIVE)
    world.merge(1)
    assert world.phases == [(Phase.UPLOAD, 1)] * 2


def test_who_does_not_apply_in_time_loses_its_leases_and_joins_again() -> None:
    world, num_applied = ahead()
    world.lease(A0)
    world.upload_all(num_applied)
    world.reduce_all(0)
    for hotkey in world.active(0):
        if hotkey != A0:
            world.apply(hotkey)
    for _ in range(200):
        for hotkey in [*world.active(0), *world.active(1)]:
            world.beat(hotkey, ready=0)
        world.tick(1.0)
        if A0 not in world.active(0):
            break
    assert A0 not in world.active(0)
    assert any("did not apply" in notice for notice in world.notices(A0))
