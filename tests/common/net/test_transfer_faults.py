"""Transfers that are killed, stalled, cut off or begun anew in the middle: they finish, and send nothing twice without
need. Over a directory and over S3, through a proxy that does the harm; each test sees that the harm was done."""

import asyncio
import contextlib
import signal
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from object_worlds import World, directory_world, s3_world
from upload_process import body_of

from orion.common.net.store import StoredObject
from orion.common.protocol.codec import Body
from orion.common.protocol.messages import ObjectRef, RefusalCode, UploadRequest
from orion.common.protocol.refusals import RefusedError

pytestmark = [pytest.mark.xdist_group("s3"), pytest.mark.timeout(300)]

KEY = "outer/3/stage/0/reduced/abc/1.safetensors"
NUM_PARTS = 7
WAIT_S = 150.0


@pytest.fixture(params=["directory", "s3"])
async def world(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[World]:
    if request.param == "directory":
        async with directory_world(tmp_path / "store", 256 * 1024) as world:
            yield world
        return
    async with s3_world(request.getfixturevalue("s3"), "&part_mib=5") as world:
        yield world


def num_bytes(world: World) -> int:
    return NUM_PARTS * world.part_bytes - 1000


def large_body(world: World) -> Body:
    return body_of(num_bytes(world), 1)


def ref_of(body: Body) -> ObjectRef:
    return ObjectRef(key=KEY, digest=body.digest, size_bytes=body.size_bytes)


def num_sent(world: World) -> list[int]:
    """How often each part was sent."""
    return [world.proxy.num_requests(world.part_needle(index)) for index in range(NUM_PARTS)]


def range_needle(world: World, index: int) -> bytes:
    return f"Range: bytes={index * world.part_bytes}-".encode()


def num_read(world: World) -> list[int]:
    return [world.proxy.num_requests(range_needle(world, index)) for index in range(NUM_PARTS)]


def added(before: list[int], after: list[int]) -> list[int]:
    return [later - earlier for earlier, later in zip(before, after, strict=True)]


async def missing_parts(world: World, body: Body) -> list[int]:
    (grant,) = (await world.api.uploads(UploadRequest(objects=(ref_of(body),)))).grants
    return [part.index for part in grant.parts]


async def until_missing(world: World, body: Body, parts: list[int]) -> None:
    async with asyncio.timeout(WAIT_S):
        while True:
            if await missing_parts(world, body) == parts:
                return
            await asyncio.sleep(0.05)


async def test_an_upload_of_a_killed_process_goes_on_in_the_next_one(world: World) -> None:
    body = large_body(world)
    harm = world.proxy.harm(world.part_needle(5), "stall", times=2)  # its second try too
    script = str(Path(__file__).with_name("upload_process.py"))
    process = await asyncio.create_subprocess_exec(sys.executable, script, world.url, KEY, str(num_bytes(world)), "1")
    try:
        async with asyncio.timeout(WAIT_S):
            await harm.fired.wait()
        await until_missing(world, body, [5])
    finally:
        process.kill()
        await process.wait()
    assert harm.num_fired >= 1 and process.returncode == -signal.SIGKILL
    harm.times, before = 0, num_sent(world)
    assert await world.store.stat(KEY) is None
    world.server.restart()  # and neither side remembers anything
    await world.client().put(KEY, body)
    assert added(before, num_sent(world)) == [0, 0, 0, 0, 0, 1, 0], "what was there is not sent again"
    assert await world.store.stat(KEY) == StoredObject(body.size_bytes, body.digest)


async def test_an_upload_outlives_the_orchestrator(world: World) -> None:
    body = large_body(world)
    harm = world.proxy.harm(world.part_needle(5), "stall")
    client = world.client()
    uploading = asyncio.create_task(client.put(KEY, body))
    async with asyncio.timeout(WAIT_S):
        await harm.fired.wait()
        world.server.restart()
        # Its slow part is tried a second time, by itself.
        assert await uploading == ref_of(body)
    assert harm.num_fired == 1 and client.num_hedged >= 1
    assert await world.store.stat(KEY) == StoredObject(body.size_bytes, body.digest)


async def test_a_slow_part_of_a_download_is_fetched_a_second_time(world: World) -> None:
    body, client = large_body(world), world.client(part_bytes=world.part_bytes)
    ref = await client.put(KEY, body)
    harm = world.proxy.harm(range_needle(world, 2), "stall")
    async with asyncio.timeout(WAIT_S):
        assert bytes(await client.get(ref)) == body.tobytes()
    assert harm.num_fired == 1 and client.num_hedged >= 1
    assert num_read(world)[2] == 2 and min(num_read(world)) == 1
    assert client.download_meter.bytes_per_s, "the stall made it last long enough to be measured"


async def test_what_is_cut_off_is_tried_again(world: World) -> None:
    body, client = large_body(world), world.client(part_bytes=world.part_bytes)
    writes = world.proxy.harm(world.part_needle(3), "cut", times=2)
    ref = await client.put(KEY, body)
    reads = world.proxy.harm(range_needle(world, 3), "cut", times=2)
    assert bytes(await client.get(ref)) == body.tobytes()
    assert (writes.num_fired, reads.num_fired) == (2, 2)
    assert num_sent(world)[3] >= 3 and num_read(world)[3] >= 3


async def test_a_download_goes_on_in_the_next_process(world: World, tmp_path: Path) -> None:
    body, folder = large_body(world), tmp_path / "downloads"
    ref = await world.client().put(KEY, body)
    harm = world.proxy.harm(range_needle(world, 5), "stall", times=2)  # its second try too
    reading = asyncio.create_task(world.client(part_bytes=world.part_bytes, folder=folder).get(ref))

    def noted() -> set[str]:
        return {line for path in folder.glob("*.parts") for line in path.read_text().split()}

    async def until_noted() -> None:
        while True:
            if len(noted()) == NUM_PARTS - 1:
                return
            await asyncio.sleep(0.05)

    async with asyncio.timeout(WAIT_S):
        await harm.fired.wait()
        await until_noted()
    reading.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await reading
    assert harm.num_fired >= 1
    harm.times, before = 0, num_read(world)
    client = world.client(part_bytes=world.part_bytes, folder=folder)
    assert bytes(await client.get(ref)) == body.tobytes()
    assert added(before, num_read(world)) == [0, 0, 0, 0, 0, 1, 0], "what is here is not fetched again"
    assert list(folder.iterdir()) == []


async def test_a_spoiled_download_is_fetched_anew(world: World, tmp_path: Path) -> None:
    body, folder = large_body(world), tmp_path / "downloads"
    ref = await world.client().put(KEY, body)
    folder.mkdir()
    name = f"{ref.digest}-{ref.size_bytes}-{world.part_bytes}"
    (folder / f"{name}.bytes").write_bytes(bytes(ref.size_bytes))
    (folder / f"{name}.parts").write_text("\n0\n\n3\n\n99\n\n4")
    client = world.client(part_bytes=world.part_bytes, folder=folder)
    with pytest.raises(RefusedError) as caught:
        await client.get(ref)
    assert caught.value.code is RefusalCode.DIGEST_MISMATCH
    assert [count > 0 for count in num_read(world)] == [False, True, True, False, True, True, True]
    assert list(folder.iterdir()) == []
    assert bytes(await client.get(ref)) == body.tobytes()


async def test_urls_that_have_expired_are_asked_for_anew(tmp_path: Path) -> None:
    async with directory_world(tmp_path / "store", 256 * 1024) as world:
        body, client = large_body(world), world.client(part_bytes=world.part_bytes)
        world.server.num_expired = 2
        ref = await client.put(KEY, body)
        world.server.num_expired = 2
        assert bytes(await client.get(ref)) == body.tobytes()
        world.server.num_expired = 3
        with pytest.raises(RefusedError) as caught:
            await client.get(ref)
        assert caught.value.code is RefusalCode.FORBIDDEN, "not for ever"
        assert world.server.num_expired == 0


class HurryingClock:
    """Half a minute passes whenever somebody looks."""

    def __init__(self) -> None:
        self.time_s = 1000.0

    def now_s(self) -> float:
        self.time_s += 30.0
        return self.time_s

    monotonic_s = now_s


async def test_transfers_that_outlast_their_urls_get_there_all_the_same(tmp_path: Path) -> None:
    async with directory_world(tmp_path / "store", 256 * 1024, HurryingClock()) as world:
        body, client = large_body(world), world.client(part_bytes=world.part_bytes, transfers_max=1)
        ref = await client.put(KEY, body)
        assert world.proxy.num_requests(b"POST /v1/uploads") > 3, "the first URLs were not enough"
        assert bytes(await client.get(ref)) == body.tobytes()
        assert world.proxy.num_requests(b"POST /v1/grants") > 1
