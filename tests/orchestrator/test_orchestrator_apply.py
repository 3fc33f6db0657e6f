"""From the manifest to the next anchor: who has applied it, who has another anchor, who is late."""

from orchestrator_world import World, digest_of, hotkey_of, make_spec

from orion.common.ids import Phase
from orion.common.protocol.messages import (
    Applied,
    Refusal,
    RefusalCode,
)

A0, A1, A2 = (hotkey_of(0, replica) for replica in range(3))


def applying(replicas: int) -> World:
    """A run of one stage whose first manifest is out."""
    world = World(make_spec(num_stages=1, replicas=replicas))
    world.start()
    world.upload_all(world.train())
    world.reduce_all(0)
    assert world.feed(A0).manifest is not None
    return world


def test_all_have_applied() -> None:
    world = applying(2)
    world.apply(A0)
    assert world.phases == [(Phase.MERGE, 0)]
    world.apply(A1)
    assert world.phases == [(Phase.TRAIN, 1)]
    assert world.active(0) == [A0, A1] and world.status.anchors_equal


def test_a_replica_with_another_anchor_joins_again_and_is_not_believed_at_once() -> None:
    world = applying(3)
    world.apply(A0)
    world.apply(A1, "broken")
    world.apply(A2)
    assert world.active(0) == [A0, A2] and world.members(0, "joining") == [A1]
    assert not world.status.anchors_equal
    assert world.notices(f"anchors differ; {A1} must build theirs anew")
    world.beat(A1, ready=1)
    assert world.members(0, "joining") == [A1]
    world.beat(A1, ready=None)
    world.beat(A1, ready=1)
    assert world.members(0, "ready") == [A1]


def test_of_two_that_differ_one_stands() -> None:
    world = applying(2)
    world.apply(A0, "one")
    world.apply(A1, "other")
    assert world.active(0) == [A0] and world.members(0, "joining") == [A1]
    assert world.phases == [(Phase.TRAIN, 1)]


def test_who_has_not_applied_at_the_deadline_is_joining_again() -> None:
    world = applying(3)
    world.apply(A0)
    world.apply(A1)
    for _ in range(13):
        for hotkey in (A0, A1, A2):
            world.beat(hotkey, ready=0)
        world.tick(1.0)
    assert world.phases == [(Phase.TRAIN, 1)]
    assert world.active(0) == [A0, A1] and world.members(0, "joining") == [A2]
    assert world.notices(f"{A2} of stage 0 is joining again: it did not apply the outer step in time")
    world.accept(A2, Applied(outer_step=0, state_digest=digest_of("x")))
    assert world.members(0, "joining") == [A2], "late: changes nothing"


def test_who_says_in_its_heartbeat_that_it_stands_there_stays() -> None:
    world = applying(2)
    world.apply(A0)
    for _ in range(13):
        world.beat(A0, ready=1)
        world.beat(A1, ready=1)
        world.tick(1.0)
    assert world.phases == [(Phase.TRAIN, 1)] and world.active(0) == [A0, A1]


def test_another_digest_of_the_same_state_is_refused() -> None:
    world = applying(2)
    world.apply(A0)
    refusal = world.apply(A0, "second thoughts")
    assert isinstance(refusal, Refusal) and refusal.code is RefusalCode.CONFLICT
    world.apply(A0)
    assert world.refusal(A1, Applied(outer_step=1, state_digest=digest_of(1))) is RefusalCode.WRONG_PHASE


def test_a_newcomer_does_not_hold_the_others_up() -> None:
    world = applying(2)
    world.join(A2)
    world.beat(A2, ready=0)
    assert world.members(0, "ready") == [A2]
    world.apply(A0)
    world.apply(A1)
    assert world.phases == [(Phase.TRAIN, 1)]
    assert world.active(0) == [A0, A1] and world.members(0, "joining") == [A2]
