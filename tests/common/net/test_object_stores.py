"""What every object store promises to those who write and read through it: one suite, over a directory and over S3."""

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import torch
from blake3 import blake3
from object_worlds import World, directory_world, s3_world
from seaweed import S3Server

from orion.common.net.store import StoredObject
from orion.common.protocol.codec import Body, encode
from orion.common.protocol.messages import CompleteUpload, GrantRequest, ObjectRef, RefusalCode, UploadRequest
from orion.common.protocol.refusals import RefusedError

pytestmark = pytest.mark.xdist_group("s3")

KEY = "outer/3/stage/0/reduced/abc/1.safetensors"
PART_BYTES = 5 * 1024 * 1024
"""The least that S3 takes."""


@pytest.fixture(params=["directory", "s3", "s3 by size"])
async def world(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[World]:
    if request.param == "directory":
        async with directory_world(tmp_path / "store", PART_BYTES) as world:
            yield world
        return
    server: S3Server = request.getfixturevalue("s3")
    by_size = "&verify=size" if request.param == "s3 by size" else ""
    async with s3_world(server, f"&part_mib=5{by_size}") as world:
        yield world


def body_of(value: float, num_values: int = 1000) -> Body:
    return encode({"mean": torch.full((num_values,), value)})


def large_body(num_bytes: int = 3 * PART_BYTES + 12345, seed: int = 1) -> Body:
    values = torch.randint(-128, 128, (num_bytes,), dtype=torch.int8, generator=torch.Generator().manual_seed(seed))
    return encode({"values": values})


def ref_of(key: str, body: Body) -> ObjectRef:
    return ObjectRef(key=key, digest=body.digest, size_bytes=body.size_bytes)


def stored(body: Body) -> StoredObject:
    return StoredObject(body.size_bytes, body.digest)


async def refusal_of(awaitable: object) -> RefusalCode:
    with pytest.raises(RefusedError) as caught:
        await awaitable  # type: ignore[misc]
    return caught.value.code


async def test_an_object_is_there_once_it_is_put_and_stays(world: World) -> None:
    client, body = world.client(), body_of(1.0)
    assert await world.store.stat(KEY) is None
    assert await refusal_of(client.get(ref_of(KEY, body))) is RefusalCode.NOT_FOUND
    assert await client.put(KEY, body) == ref_of(KEY, body)
    assert await world.store.stat(KEY) == stored(body)
    world.server.restart()
    assert await world.store.stat(KEY) == stored(body)
    assert bytes(await client.get(ref_of(KEY, body))) == body.tobytes()


async def test_whoever_waits_for_an_object_hears_when_it_is_there_if_the_store_can_tell(tmp_path: Path) -> None:
    async with directory_world(tmp_path / "store", PART_BYTES) as world:
        small, large = body_of(1.0), large_body()
        refs = [ref_of(KEY, small), ref_of("a/large", large)]
        waiting = [asyncio.create_task(world.client().get_many([ref], wait_s=10.0)) for ref in refs for _ in range(2)]
        await world.client().put_many({ref.key: body for ref, body in zip(refs, (small, large), strict=True)})
        for task, body in zip(waiting, (small, small, large, large), strict=True):
            (found,) = await task
            assert bytes(found) == body.tobytes()
        await world.store.wait_until_there([KEY, "a/nothing"], 0.01)


async def test_a_store_that_cannot_tell_lets_nobody_wait(world: World) -> None:
    assert await refusal_of(world.client().get_many([ref_of(KEY, body_of(1.0))], wait_s=0.01)) is RefusalCode.NOT_FOUND


async def test_large_objects_go_in_parts_both_ways(world: World) -> None:
    client, body = world.client(part_bytes=PART_BYTES), large_body()
    ref = await client.put(KEY, body)
    assert world.proxy.num_requests(world.part_needle(3)) >= 1
    assert await world.store.stat(KEY) == stored(body)
    assert bytes(await client.get(ref)) == body.tobytes()
    assert world.proxy.num_requests(b"Range: bytes=") >= 4
    # Whatever size the reader's parts have.
    assert bytes(await world.client().get(ref)) == body.tobytes()


async def test_writing_the_same_again_changes_nothing_and_other_bytes_are_refused(world: World) -> None:
    client = world.client()
    for make in (body_of, lambda value: large_body(seed=int(value))):
        key = f"a/{make(1.0).size_bytes}"
        await client.put(key, make(1.0))
        num_puts = world.proxy.num_requests(b"PUT ")
        assert await client.put(key, make(1.0)) == ref_of(key, make(1.0))
        assert await refusal_of(client.put(key, make(2.0))) is RefusalCode.CONFLICT
        assert world.proxy.num_requests(b"PUT ") == num_puts, "nothing was sent for that"
        assert await world.store.stat(key) == stored(make(1.0))


async def test_of_many_writers_one_wins(world: World) -> None:
    bodies = [body_of(float(index)) for index in range(6)]
    client = world.client()
    outcomes = await asyncio.gather(*(client.put(KEY, body) for body in bodies), return_exceptions=True)
    won = [body for body, outcome in zip(bodies, outcomes, strict=True) if isinstance(outcome, ObjectRef)]
    lost = [outcome.code for outcome in outcomes if isinstance(outcome, RefusedError)]
    assert len(won) == 1 and lost == [RefusalCode.CONFLICT] * 5, outcomes
    assert await world.store.stat(KEY) == stored(won[0])


async def test_nobody_writes_more_than_was_granted_or_what_others_wrote(world: World) -> None:
    small = ObjectRef(key=KEY, digest=blake3(b"12345").hexdigest(), size_bytes=5)
    (grant,) = (await world.api.uploads(UploadRequest(objects=(small,)))).grants
    url = grant.parts[0].url
    url = world.url + url if url.startswith("/") else url
    http, headers = world.rpc.http, dict(grant.headers)

    async def put(data: bytes) -> None:
        async with http.open("PUT", url, data=data, headers=headers, timeout_s=10.0):
            return

    assert await refusal_of(put(b"123456")) in (RefusalCode.TOO_LARGE, RefusalCode.FORBIDDEN)
    assert await world.store.stat(KEY) is None
    await put(b"12345")
    assert await world.store.stat(KEY) == StoredObject(5, small.digest)
    assert await refusal_of(put(b"54321")) is RefusalCode.CONFLICT
    assert await world.store.stat(KEY) == StoredObject(5, small.digest)


async def test_a_url_is_good_for_one_object_and_one_method(world: World) -> None:
    client, body = world.client(), body_of(1.0)
    await client.put(KEY, body)
    await client.put("other", body)
    (url,) = (await world.api.grants(GrantRequest(keys=(KEY,)))).urls
    url = world.url + url if url.startswith("/") else url
    read = world.rpc.http.read
    assert await read("GET", url, timeout_s=10.0) == body.tobytes()
    for method, changed in (("GET", url.replace(KEY, "other")), ("PUT", url), ("GET", url.partition("?")[0])):
        assert await refusal_of(read(method, changed, timeout_s=10.0, data=b"x" if method == "PUT" else None)) in (
            RefusalCode.FORBIDDEN,
            RefusalCode.BAD_SIGNATURE,
        )


async def test_an_upload_is_complete_only_with_all_parts(world: World) -> None:
    body = large_body()
    ref = ref_of(KEY, body)
    assert await refusal_of(world.api.complete(CompleteUpload(object=ref))) is RefusalCode.NOT_FOUND
    (grant,) = (await world.api.uploads(UploadRequest(objects=(ref,)))).grants
    assert grant.in_parts and [part.index for part in grant.parts] == [0, 1, 2, 3]
    assert await refusal_of(world.api.complete(CompleteUpload(object=ref))) is RefusalCode.NOT_FOUND
    assert await world.store.stat(KEY) is None
    await world.client().put(KEY, body)
    await world.api.complete(CompleteUpload(object=ref))  # again
    other = ref.model_copy(update={"digest": body_of(1.0).digest})
    assert await refusal_of(world.api.complete(CompleteUpload(object=other))) is RefusalCode.CONFLICT


async def test_a_prefix_is_deleted_with_all_below_it_and_nothing_else(world: World) -> None:
    client = world.client()
    keys = ["outer/1/a", "outer/1/b/c", "outer/10/a", "outer/2/a"]
    await client.put_many({key: body_of(1.0) for key in keys})
    begun = ref_of("outer/1/large", large_body())
    await world.api.uploads(UploadRequest(objects=(begun,)))
    for _ in range(2):
        await world.store.delete_prefix("outer/1/")
    assert [key for key in keys if await world.store.stat(key)] == ["outer/10/a", "outer/2/a"]
    await client.put("outer/1/a", body_of(2.0))
    assert await world.store.stat("outer/1/a") == stored(body_of(2.0))
    await client.put("outer/1/large", large_body())
    assert await world.store.stat("outer/1/large") == stored(large_body())


async def test_a_file_becomes_an_object(world: World, tmp_path: Path) -> None:
    path, body = tmp_path / "file", large_body()
    await asyncio.to_thread(path.write_bytes, body.tobytes())
    for _ in range(2):
        await world.store.put_file(path, ref_of(KEY, body))
    assert bytes(await world.client().get(ref_of(KEY, body))) == body.tobytes()
    assert await refusal_of(world.store.put_file(path, ref_of(KEY, large_body(seed=2)))) is RefusalCode.CONFLICT


async def test_an_empty_object_is_an_object(world: World) -> None:
    ref = ObjectRef(key=KEY, digest=blake3(b"").hexdigest(), size_bytes=0)
    empty = Body(b"", (), 0, ref.digest)
    assert await world.client().put(KEY, empty) == ref
    assert await world.store.stat(KEY) == StoredObject(0, ref.digest)
    assert await world.client().get(ref) == b""


async def test_a_key_that_is_none_is_refused(world: World) -> None:
    for key in ("", "/etc/passwd", "../up", "a//b", "a/", ".hidden", "ä", "a" * 300, "a\\b"):
        ref = ObjectRef.model_construct(key=key, digest="0" * 64, size_bytes=1)
        for asked in (world.store.stat(key), world.store.grant_read(key, 0.0), world.store.grant_write(ref, 0.0)):
            assert await refusal_of(asked) is RefusalCode.MALFORMED


async def test_what_is_not_what_its_writer_said_is_found_out(world: World) -> None:
    """At the latest by the reader; where contents are verified, it never becomes durable."""
    client, body = world.client(part_bytes=PART_BYTES), large_body()
    told = ObjectRef(key=KEY, digest=large_body(seed=2).digest, size_bytes=body.size_bytes)
    lying = Body(body.header, body.parts, body.size_bytes, told.digest)
    by_size = await _put_lying(client, lying)
    if by_size:
        assert await refusal_of(client.get(told)) is RefusalCode.DIGEST_MISMATCH
    else:
        assert await world.store.stat(KEY) is None
        await client.put(KEY, body)  # it may still be written


async def _put_lying(client: object, lying: Body) -> bool:
    try:
        await client.put(KEY, lying)  # type: ignore[attr-defined]
    except RefusedError as error:
        assert error.code is RefusalCode.DIGEST_MISMATCH
        return False
    return True
