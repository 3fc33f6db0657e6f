"""Who may write or read which object, and when."""

import pytest
from orchestrator_world import STRANGER, VALIDATOR, World, hotkey_of, make_spec

from orion.common.ids import Digest, Hotkey
from orion.common.protocol.keys import checkpoint_key, pseudo_gradient_key, reduced_key
from orion.common.protocol.messages import (
    CompleteUpload,
    GrantRequest,
    ObjectRef,
    RefusalCode,
    UploadRequest,
)
from orion.common.protocol.refusals import RefusedError

A0, A1, A2 = (hotkey_of(0, replica) for replica in range(3))


@pytest.fixture
def world() -> World:
    world = World(make_spec(num_stages=1))
    world.start()
    return world


def verdict(world: World, hotkey: Hotkey, method: str, *keys: str, size_bytes_max: int = 100) -> RefusalCode | None:
    refs = tuple(ObjectRef(key=key, digest=Digest("0" * 64), size_bytes=size_bytes_max) for key in keys)
    request = GrantRequest(keys=keys) if method == "GET" else UploadRequest(objects=refs)
    try:
        world.core.check_grant(hotkey, request)
    except RefusedError as error:
        return error.code
    return None


def test_pseudo_gradients_are_written_in_the_upload_phase_and_read_after_it(world: World) -> None:
    key = pseudo_gradient_key(0, 0, A0, 1)
    assert verdict(world, A0, "PUT", key) is RefusalCode.WRONG_PHASE
    num_applied = world.train()
    assert verdict(world, A0, "PUT", key) is None
    assert verdict(world, A0, "PUT", key, pseudo_gradient_key(0, 0, A1, 1)) is RefusalCode.FORBIDDEN
    assert verdict(world, A1, "PUT", key) is RefusalCode.FORBIDDEN
    assert verdict(world, A0, "PUT", key, size_bytes_max=1 << 40) is RefusalCode.TOO_LARGE
    assert verdict(world, A0, "PUT", pseudo_gradient_key(1, 0, A0, 1)) is RefusalCode.WRONG_PHASE
    assert verdict(world, A1, "GET", key) is RefusalCode.WRONG_PHASE
    assert verdict(world, A2, "PUT", pseudo_gradient_key(0, 0, A2, 1)) is RefusalCode.WRONG_PHASE
    world.upload_all(num_applied)
    assert verdict(world, A1, "GET", key) is None
    assert verdict(world, A0, "PUT", key) is RefusalCode.WRONG_PHASE


def test_means_are_written_by_their_reducers(world: World) -> None:
    world.join(A2)
    world.upload_all(world.train())
    assert verdict(world, A0, "PUT", reduced_key(0, 0, A0, 0)) is None
    assert verdict(world, A2, "PUT", reduced_key(0, 0, A2, 0)) is RefusalCode.WRONG_PHASE
    assert verdict(world, A0, "PUT", reduced_key(0, 0, A0, 9)) is RefusalCode.WRONG_PHASE
    assert verdict(world, A0, "PUT", reduced_key(0, 0, A0, 0), size_bytes_max=1 << 40) is RefusalCode.TOO_LARGE


def test_a_checkpoint_is_written_by_who_was_asked(world: World) -> None:
    world.upload_all(world.train())
    world.reduce_all(0)
    world.apply_all(0)
    asked = world.stage(0).checkpoint_by
    assert asked is not None
    other = A1 if asked == A0 else A0
    assert verdict(world, asked, "PUT", checkpoint_key(1, 0, asked)) is None
    assert verdict(world, asked, "PUT", checkpoint_key(1, 0, asked), size_bytes_max=1 << 40) is RefusalCode.TOO_LARGE
    assert verdict(world, other, "PUT", checkpoint_key(1, 0, other)) is RefusalCode.WRONG_PHASE


def test_who_is_registered_reads_and_others_do_not(world: World) -> None:
    key = checkpoint_key(1, 0, A0)
    assert verdict(world, VALIDATOR, "GET", key) is None
    assert verdict(world, STRANGER, "GET", key) is RefusalCode.FORBIDDEN


@pytest.mark.parametrize(
    "key", ["secret", "outer/0/stage/0/other/x.safetensors", f"outer/0/stage/7/checkpoint/{A0}.safetensors"]
)
def test_there_are_no_other_objects(world: World, key: str) -> None:
    assert verdict(world, A0, "GET", key) is RefusalCode.NOT_FOUND
    assert verdict(world, A0, "PUT", key) is RefusalCode.NOT_FOUND


def test_an_upload_is_completed_by_its_owner_at_any_time(world: World) -> None:
    ref = ObjectRef(key=pseudo_gradient_key(0, 0, A0, 1), digest=Digest("0" * 64), size_bytes=100)
    world.core.check_grant(A0, CompleteUpload(object=ref))
    with pytest.raises(RefusedError) as caught:
        world.core.check_grant(A1, CompleteUpload(object=ref))
    assert caught.value.code is RefusalCode.FORBIDDEN
