"""Who is assigned where, who trains, and what happens when somebody goes."""

from hypothesis import given
from hypothesis import strategies as st
from orchestrator_world import STRANGER, VALIDATOR, World, hotkey_of

from orion.common.ids import MemberState, Phase
from orion.common.protocol.messages import (
    Join,
    Joined,
    Leave,
    ManifestQuery,
    RefusalCode,
)
from orion.orchestrator.assignment import choose_stage
from orion.orchestrator.events import MetagraphUpdated, Neuron

A0, A1, A2 = (hotkey_of(0, replica) for replica in range(3))
B0, B1, B2 = (hotkey_of(1, replica) for replica in range(3))


@given(
    supply=st.lists(st.integers(0, 5), min_size=1, max_size=8),
    replicas=st.integers(1, 4),
    wish=st.none() | st.integers(0, 9),
)
def test_a_newcomer_goes_where_miners_lack(supply: list[int], replicas: int, wish: int | None) -> None:
    chosen = choose_stage(supply, replicas, wish)
    if wish is not None and wish < len(supply) and supply[wish] < replicas:
        assert chosen == wish
    else:
        assert supply[chosen] == min(supply) and min(supply) not in supply[:chosen]


def test_joining_again_changes_nothing_but_the_address() -> None:
    world = World()
    first = world.join(A0)
    version = world.core.version
    assert world.join(A0) == first == Joined(stage_index=0, state=MemberState.JOINING)
    assert world.core.version == version
    world.accept(A0, Join(url="http://10.9.9.9:1", device="cpu", memory_bytes=1))
    assert world.core.version == version + 1
    assert [peer.url for peer in world.feed(A1).peers] == ["http://10.9.9.9:1"]


def test_who_is_not_registered_cannot_join() -> None:
    world = World()
    join = Join(url="http://10.0.0.1:1", device="cpu", memory_bytes=1)
    assert world.refusal(STRANGER, join) is RefusalCode.FORBIDDEN
    assert world.refusal(STRANGER, Leave(reason="x")) is RefusalCode.NOT_MEMBER
    world.register([STRANGER])
    world.accept(STRANGER, join)


def test_the_run_starts_when_every_stage_has_its_replicas() -> None:
    world = World()
    for hotkey in (A0, A1, B0):
        world.join(hotkey, int(hotkey == B0))
        world.beat(hotkey)
    world.wait(20.0, A0, A1, B0)
    assert world.status.started_s is None and world.active(0) == []
    world.join(B1)
    world.beat(B1, ready=None)
    assert world.status.started_s is None
    world.beat(B1)
    assert world.active(0) == [A0, A1] and world.active(1) == [B0, B1]


def test_the_run_starts_with_fewer_when_it_has_waited_long_enough() -> None:
    world = World()
    world.join(A0, 0)
    world.join(B0, 1)
    world.wait(39.0, A0, B0)
    assert world.status.started_s is None
    world.wait(2.0, A0, B0)
    assert world.active(0) == [A0] and world.active(1) == [B0]
    assert len(world.train()) == 2
    assert world.status.microbatches_applied == 4, "the share follows the active members"


def test_without_anybody_in_a_stage_the_start_waits_and_says_so() -> None:
    world = World()
    world.join(A0, 0)
    world.join(A1, 0)
    world.wait(60.0, A0, A1)
    assert world.status.started_s is None
    assert world.notices("waits: nobody is ready in stages [1]")
    world.join(B0)
    world.beat(B0)
    assert world.active(1) == [B0]


def test_a_newcomer_is_ready_in_this_outer_step_and_active_in_the_next() -> None:
    world = World()
    world.start()
    assert world.join(A2) == Joined(stage_index=0, state=MemberState.JOINING)
    assert world.refusal(A2, world.lease_request()) is RefusalCode.WRONG_PHASE
    world.beat(A2, ready=None)
    assert world.members(0, "joining") == [A2]
    world.beat(A2)
    assert world.members(0, "ready") == [A2]
    world.outer_step()
    assert world.active(0) == [A0, A1, A2]
    assert world.train().keys() >= {A2}


def test_a_newcomer_that_is_behind_waits_for_its_anchor() -> None:
    world = World()
    world.start()
    world.join(A2)
    world.outer_step()
    world.beat(A2, ready=0)
    assert world.members(0, "joining") == [A2]
    world.beat(A2, ready=1)
    assert world.members(0, "ready") == [A2]


def test_a_silent_member_is_gone_and_may_come_again() -> None:
    world = World()
    world.start()
    world.wait(9.0, A0, B0, B1)
    assert world.active(0) == [A0, A1]
    world.wait(2.0, A0, B0, B1)
    assert world.active(0) == [A0] and world.members(0, "gone") == [A1]
    assert A1 not in {peer.hotkey for peer in world.feed(A0).peers}
    assert world.notices(f"{A1} of stage 0 is gone: silent for 10 s")
    assert world.refusal(A1, Leave(reason="x")) is RefusalCode.NOT_MEMBER
    assert world.join(A1) == Joined(stage_index=0, state=MemberState.JOINING)
    world.beat(A1)
    assert world.members(0, "ready") == [A1]


def test_any_message_renews_a_membership() -> None:
    world = World()
    world.start()
    for _ in range(5):
        world.wait(5.0, A0, B0, B1)
        world.report(A1)
    assert world.active(0) == [A0, A1]


def test_who_leaves_is_gone_at_once_and_its_leases_end() -> None:
    world = World()
    world.start()
    world.lease(A1, 3)
    world.accept(A1, Leave(reason="spot machine is taken back"))
    assert world.active(0) == [A0]
    assert world.status.microbatches_cancelled == 3
    assert world.notices("left: spot machine")
    assert [leased.data_id for leased in world.lease(A0, 4)] == [0, 1, 2, 3]


def test_a_miner_that_was_restarted_joins_anew_and_its_leases_end() -> None:
    world = World()
    world.start()
    world.lease(A0, 2)
    assert world.join(A0) == Joined(stage_index=0, state=MemberState.ACTIVE)
    world.beat(A0, ready=None)
    assert world.members(0, "joining") == [A0]
    assert world.status.microbatches_cancelled == 2


def test_while_it_applies_a_manifest_a_miner_may_hold_no_anchor() -> None:
    world = World()
    world.start()
    world.upload_all(world.train())
    world.reduce_all(0)
    assert world.phases[0] == (Phase.MERGE, 0)
    world.beat(A0, ready=None)
    assert world.active(0) == [A0, A1]


def test_a_stage_that_lost_everybody_is_taken_over_by_newcomers() -> None:
    world = World()
    world.start()
    (leased,) = world.lease(A0)
    world.wait(11.0, A0, A1)
    assert world.active(1) == []
    assert world.refusal(A0, world.lease_request()) is RefusalCode.NO_WORK
    world.join(B2)
    world.beat(B2)
    assert world.active(1) == [B2]
    assert world.notices("newcomers take over stage 1")
    world.travel(leased.microbatch_id, (A0, B2))
    world.train(num_left=3)
    assert world.status.microbatches_applied == 2


def test_an_outer_step_waits_for_a_stage_without_members_and_goes_on_with_a_newcomer() -> None:
    world = World()
    world.start()
    world.upload_all(world.train())
    world.merge(0)
    world.merge(1)
    for hotkey in (B0, B1):
        world.accept(hotkey, Leave(reason="enough"))
    world.commit(A0, 0)
    world.wait(101.0, A0, A1)  # training is cut short at its deadline
    world.wait(40.0, A0, A1)
    world.apply_all(0)
    assert world.phases == [(Phase.TRAIN, 2), (Phase.TRAIN, 2)]
    world.wait(500.0, A0, A1)
    assert world.phases == [(Phase.TRAIN, 2), (Phase.TRAIN, 2)]
    assert world.notices("outer step 2 waits: nobody is ready in stages [1]")
    (kept,) = world.core.manifests(ManifestQuery(stage_index=1, from_outer_step=1)).manifests
    assert [partition.object for partition in kept.partitions] == [None, None]
    world.join(B2)
    world.beat(B2)
    assert world.active(1) == [B2]
    world.outer_step()
    assert world.status.finished


def test_onlookers_see_members_but_are_none() -> None:
    world = World()
    world.start()
    assert world.beat(VALIDATOR) != world.beat(A0)
    assert len(world.feed(VALIDATOR).peers) == 4


def test_the_run_takes_no_more_newcomers_once_it_has_ended() -> None:
    world = World()
    world.run()
    join = Join(url="http://10.0.0.1:1", device="cpu", memory_bytes=1)
    assert world.refusal(A2, join) is RefusalCode.WRONG_PHASE
    world.tick(100.0)
    assert len(world.active(0)) == 2, "nobody is missed after the end"


def test_everybody_is_told_who_validates() -> None:
    world = World()
    world.start()
    before = world.feed(A0)
    assert before.validators == (VALIDATOR,)
    neurons = tuple(Neuron(hotkey=hotkey, validator_permit=hotkey == A0) for hotkey in (VALIDATOR, A0, B0))
    world.handle(MetagraphUpdated(neurons=neurons))
    after = world.feed(A0)
    assert after.validators == (A0,)
    assert after.version > before.version, "who waits for news hears of it"
    world.handle(MetagraphUpdated(neurons=neurons))
    assert world.feed(A0).version == after.version
