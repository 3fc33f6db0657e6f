"""Who is asked for a stage's whole anchor, and what happens when it does not come."""

from orchestrator_world import World, digest_of, hotkey_of, make_spec

from orion.common.ids import Hotkey, Phase
from orion.common.protocol.keys import checkpoint_key
from orion.common.protocol.messages import (
    CheckpointUploaded,
    Leave,
    ObjectRef,
    RefusalCode,
)

A0, A1, A2 = (hotkey_of(0, replica) for replica in range(3))


def everyone(world: World) -> list[Hotkey]:
    return world.members(0, "active", "ready", "joining")


def asked_for_one() -> World:
    """A run of one stage whose members stand at the anchor of outer step 1."""
    world = World(make_spec(num_stages=1, replicas=3))
    world.start()
    world.upload_all(world.train())
    world.reduce_all(0)
    world.apply_all(0)
    assert world.stage(0).checkpoint_by is not None
    return world


def test_it_is_published_once_durable() -> None:
    world = asked_for_one()
    world.loses = lambda ref: "checkpoint" in ref.key
    world.checkpoint(0)
    assert world.stage(0).checkpoint is None and world.stage(0).checkpoint_by is None
    world.loses = lambda ref: False
    world.wait(3.0, *everyone(world))
    checkpoint = world.stage(0).checkpoint
    assert checkpoint is not None and checkpoint.outer_step == 1
    assert checkpoint.state_digest == digest_of("anchor", 0, 1, "")


def test_a_wrong_state_is_given_to_somebody_else() -> None:
    world = asked_for_one()
    liar = world.stage(0).checkpoint_by
    world.checkpoint(0, "lie")
    assert world.notices("has another anchor than agreed")
    assert world.stage(0).checkpoint_by not in (None, liar)
    world.checkpoint(0)
    assert world.stage(0).checkpoint is not None


def test_a_late_or_lost_one_is_given_to_somebody_else_three_times_at_most() -> None:
    world = asked_for_one()
    asked = [world.stage(0).checkpoint_by]
    assert asked[0] is not None
    world.accept(asked[0], Leave(reason="x"))
    asked.append(world.stage(0).checkpoint_by)
    world.wait(11.0, *everyone(world))
    asked.append(world.stage(0).checkpoint_by)
    assert set(asked) == {A0, A1, A2}
    world.wait(11.0, *everyone(world))
    assert world.stage(0).checkpoint_by is None and world.stage(0).checkpoint is None
    assert world.phases == [(Phase.TRAIN, 1)], "nobody waits for a checkpoint"


def test_only_who_was_asked_uploads_it() -> None:
    world = asked_for_one()
    asked = world.stage(0).checkpoint_by
    other = next(member for member in (A0, A1, A2) if member != asked)
    ref = ObjectRef(key=checkpoint_key(1, 0, other), digest=digest_of(1), size_bytes=1)
    uploaded = CheckpointUploaded(outer_step=1, object=ref, state_digest=digest_of("anchor", 0, 1, ""))
    assert world.refusal(other, uploaded) is RefusalCode.WRONG_PHASE
    assert asked is not None and world.refusal(asked, uploaded) is RefusalCode.MALFORMED
    assert world.stage(0).checkpoint_by == asked


def test_the_end_of_the_run_waits_for_it_and_not_for_ever() -> None:
    world = World(make_spec(num_stages=1, outer_steps=1))
    world.start()
    world.upload_all(world.train())
    world.reduce_all(0)
    world.apply_all(0)
    assert world.phases == [(Phase.MERGE, 1)] and not world.status.finished
    assert world.stage(0).checkpoint_by is not None
    world.wait(25.0, A0, A1)
    assert world.phases == [(Phase.DONE, 1)] and world.status.finished
    assert world.notices("ends without a checkpoint")
