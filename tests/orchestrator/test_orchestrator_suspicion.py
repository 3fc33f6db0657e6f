"""A member whose connection broke off: what no longer waits for it, and that nothing is lost when it lives."""

import random

from orchestrator_world import World, hotkey_of, make_spec

from orion.common.ids import MemberState, Phase
from orion.common.protocol.messages import Leave
from orion.orchestrator.core import OrchestratorCore
from orion.orchestrator.events import ConnectionLost, ConnectionSeen, Resumed, event_from_json, event_to_json
from orion.orchestrator.suspicion import GRACE_MAX_S, GRACE_MIN_S, GRACE_TIMES

A0, A1, A2 = (hotkey_of(0, replica) for replica in range(3))
B0, B1, B2 = (hotkey_of(1, replica) for replica in range(3))
EVERYBODY = (A0, A1, B0, B1)


def started() -> World:
    world = World()
    world.start()
    return world


def lose(world: World, *hotkeys: str, usual_s: float = 0.0) -> None:
    for hotkey in hotkeys:
        world.handle(ConnectionLost(hotkey=hotkey, usual_s=usual_s))


def is_suspected(world: World, hotkey: str) -> bool:
    """By what was said last."""
    said = [notice for notice in world.status.notices if hotkey in notice]
    return bool(said) and "is not waited for" in said[-1]


def test_what_a_lost_member_had_leased_goes_back_after_a_moment() -> None:
    world = started()
    world.lease(A0, 2)
    lose(world, A0)
    world.tick(GRACE_MIN_S / 2)
    assert world.status.microbatches_cancelled == 0, "it may ask again"
    world.tick(GRACE_MIN_S)
    assert world.status.microbatches_cancelled == 2
    assert world.status.microbatches_repaired.released == 0
    world.train()
    assert world.status.microbatches_repaired.released == 2
    assert A0 in world.active(0), "it is still a member"


def test_who_asks_for_the_feed_again_in_time_was_never_lost() -> None:
    world = started()
    world.lease(A0, 2)
    lose(world, A0)
    world.tick(GRACE_MIN_S / 2)
    world.handle(ConnectionSeen(hotkey=A0))
    world.wait(5.0)
    assert world.status.microbatches_cancelled == 0
    assert not is_suspected(world, A0)


def test_a_request_that_was_on_its_way_only_renews_the_grace() -> None:
    world = started()
    world.lease(A0)
    lose(world, A0)
    world.tick(GRACE_MIN_S * 0.8)
    world.beat(A0)
    world.tick(GRACE_MIN_S * 0.8)
    assert not is_suspected(world, A0)
    world.tick(GRACE_MIN_S)
    assert is_suspected(world, A0), "a process that had died would be waited for otherwise"


def test_the_grace_follows_what_the_member_usually_takes() -> None:
    for usual_s, grace_s in [(0.0, GRACE_MIN_S), (0.3, GRACE_TIMES * 0.3), (50.0, GRACE_MAX_S)]:
        world = started()
        lose(world, A0, usual_s=usual_s)
        world.tick(grace_s - 0.01)
        assert not is_suspected(world, A0)
        world.tick(0.02)
        assert is_suspected(world, A0)


def test_upload_does_not_wait_for_a_suspect() -> None:
    world = started()
    num_applied = world.train()
    lose(world, B1)
    for hotkey in (A0, A1, B0):
        world.upload(hotkey, num_applied[hotkey])
    assert world.phases == [(Phase.MERGE, 0), (Phase.UPLOAD, 0)]
    world.tick(GRACE_MIN_S)
    assert world.phases == [(Phase.MERGE, 0), (Phase.MERGE, 0)]
    plan = world.plan(1)
    assert plan is not None and [each.hotkey for each in plan.contributions] == [B0]


def test_the_contribution_of_a_suspect_that_lives_counts_like_any_other() -> None:
    world = started()
    num_applied = world.train()
    lose(world, B1)
    world.tick(GRACE_MIN_S)
    assert is_suspected(world, B1)
    world.upload(B1, num_applied[B1])
    world.upload(B0, num_applied[B0])
    plan = world.plan(1)
    assert plan is not None and [each.hotkey for each in plan.contributions] == [B0, B1]
    world.handle(ConnectionSeen(hotkey=B1))
    world.merge(1)
    assert B1 in world.active(1), "it goes on with the others"


def test_a_reducer_that_is_suspected_is_replaced_at_once() -> None:
    world = World(make_spec(replicas=3))
    world.start()
    world.upload_all(world.train())
    plan = world.plan(0)
    assert plan is not None
    victim = plan.partitions[0].reducers[0]
    lose(world, victim)
    world.tick(GRACE_MIN_S)
    plan = world.plan(0)
    assert plan is not None
    for partition in plan.partitions:
        live = [hotkey for hotkey in partition.reducers if hotkey != victim]
        assert len(live) == 2, partition
        for hotkey in live:
            world.reduce(hotkey, partition.partition_index)
    assert world.stage(0).phase is Phase.MERGE and world.plan(0) is None, "every partition has its two copies"


def test_the_next_outer_step_does_not_wait_for_a_suspect_to_apply() -> None:
    world = started()
    world.upload_all(world.train())
    for stage_index in (0, 1):
        world.reduce_all(stage_index)
    for hotkey in (A0, A1, B0):
        world.apply(hotkey)
    assert world.phases == [(Phase.TRAIN, 1), (Phase.MERGE, 0)]
    lose(world, B1)
    world.tick(GRACE_MIN_S)
    assert world.phases == [(Phase.TRAIN, 1), (Phase.TRAIN, 1)]
    assert world.members(1, MemberState.JOINING) == [B1]


def test_a_suspect_that_applies_in_time_trains_on() -> None:
    world = started()
    world.upload_all(world.train())
    world.reduce_all(1)
    lose(world, B1)
    world.tick(GRACE_MIN_S)
    world.apply(B1)
    world.handle(ConnectionSeen(hotkey=B1))
    world.apply(B0)
    assert world.active(1) == [B0, B1]


def test_the_share_of_an_outer_step_does_not_count_on_suspects() -> None:
    world = started()
    world.upload_all(world.train())
    for stage_index in (0, 1):
        world.reduce_all(stage_index)
    world.apply_all(0)
    world.apply(B1)
    lose(world, B1)
    world.tick(GRACE_MIN_S)
    world.apply(B0)
    assert world.phases == [(Phase.TRAIN, 1), (Phase.TRAIN, 1)]
    before = world.status.microbatches_started
    world.lease(A0, 16)
    spec = world.spec
    assert world.status.microbatches_started - before == spec.inner_steps * spec.microbatches_per_step


def test_a_checkpoint_is_asked_of_another_at_once() -> None:
    world = started()
    world.upload_all(world.train())
    for stage_index in (0, 1):
        world.reduce_all(stage_index)
        world.apply_all(stage_index)
    asked = world.stage(0).checkpoint_by
    assert asked in (A0, A1)
    lose(world, asked)
    world.tick(GRACE_MIN_S)
    assert world.stage(0).checkpoint_by in {A0, A1} - {asked}


def test_a_newcomer_takes_the_place_of_a_suspect() -> None:
    world = started()
    lose(world, B0)
    world.tick(GRACE_MIN_S)
    world.join(A2)
    assert set(world.members(1)) == {A2, B0, B1}


def test_the_last_of_a_stage_is_waited_for() -> None:
    world = started()
    num_applied = world.train()
    lose(world, B0)
    world.tick(GRACE_MIN_S)
    lose(world, B1)
    world.tick(GRACE_MIN_S)
    assert is_suspected(world, B0) and not is_suspected(world, B1)
    world.upload(B1, num_applied[B1])
    plan = world.plan(1)
    assert plan is not None and [each.hotkey for each in plan.contributions] == [B1]


def test_a_suspect_that_has_become_the_last_of_its_stage_is_waited_for_again() -> None:
    world = started()
    world.train()
    lose(world, B0)
    world.tick(GRACE_MIN_S)
    world.accept(B1, Leave(reason="enough"))
    world.tick(0.25)
    assert world.stage(1).phase is Phase.UPLOAD
    world.handle(ConnectionSeen(hotkey=B0))
    world.upload(B0, 2)
    assert world.stage(1).phase is Phase.MERGE


def test_when_most_connections_break_off_nobody_is_suspected() -> None:
    world = started()
    world.lease(A0, 2)
    lose(world, A0, A1, B0)
    world.wait(5.0)
    assert world.notices("none is suspected")
    assert not any(is_suspected(world, hotkey) for hotkey in EVERYBODY)
    assert world.status.microbatches_cancelled == 0
    world.wait(6.0, B1)
    assert world.status.microbatches_cancelled == 2, "silence still tells"


def test_who_comes_back_from_suspicion_gets_more_time_from_then_on() -> None:
    world = started()
    lose(world, A0)
    world.tick(2.0)
    assert is_suspected(world, A0)
    world.handle(ConnectionSeen(hotkey=A0))
    assert world.notices("is heard again")
    lose(world, A0)
    world.tick(3.5)
    assert not is_suspected(world, A0)
    world.tick(1.0)
    assert is_suspected(world, A0)


def test_what_is_said_of_hotkeys_that_are_no_members_changes_nothing() -> None:
    world = started()
    before = world.core.digest()
    lose(world, A2, B2)
    world.handle(ConnectionSeen(hotkey=A2))
    assert world.core.digest() == before


def test_an_orchestrator_that_was_away_suspects_nobody() -> None:
    world = started()
    lose(world, A0)
    world.tick(GRACE_MIN_S)
    lose(world, B0)
    world.handle(Resumed())
    world.tick(GRACE_MAX_S)
    assert not is_suspected(world, B0)
    num_applied = world.train()
    world.upload(A1, num_applied[A1])
    world.tick()
    assert world.stage(0).phase is Phase.UPLOAD, "it is waited for again"


def test_a_replay_suspects_the_same_members_at_the_same_moments() -> None:
    world = started()
    world.lease(A0, 2)
    lose(world, A0, usual_s=0.1)
    world.tick(1.0)
    world.train()
    world.handle(ConnectionSeen(hotkey=A0))
    twin = OrchestratorCore(world.spec, random.Random(7))
    for now_s, event in world.events:
        twin.handle(event_from_json(event_to_json(event)), now_s)
    assert twin.digest() == world.core.digest()
