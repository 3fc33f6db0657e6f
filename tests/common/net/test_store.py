"""How the directory takes objects in and hands them out; and the URLs that allow access to it. What it promises as a
store is in `test_object_stores`."""

import asyncio
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest
from blake3 import blake3
from hypothesis import given
from hypothesis import strategies as st

from orion.common.net.directory_store import DirectoryStore
from orion.common.net.store import StoredObject
from orion.common.net.url_signer import UrlSigner
from orion.common.protocol.messages import RefusalCode
from orion.common.protocol.refusals import RefusedError

KEY = "outer/3/stage/0/reduced/abc/1.safetensors"
MakeStore = Callable[[], DirectoryStore]


@pytest.fixture
def make_store(tmp_path: Path) -> MakeStore:
    """Opens the same store anew at each call, as a restarted process would."""
    return lambda: DirectoryStore(tmp_path / "store")


async def arriving(*chunks: bytes) -> AsyncIterator[bytes]:
    for chunk in chunks:
        yield chunk


async def content(store: DirectoryStore, key: str) -> bytes:
    return b"".join([part async for part in store.get(key)])


def stored(data: bytes) -> StoredObject:
    return StoredObject(len(data), blake3(data).hexdigest())


def files_under(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file()]


async def refusal_code(store: DirectoryStore, key: str, data: bytes, size_bytes_max: int = 100) -> RefusalCode:
    with pytest.raises(RefusedError) as caught:
        await store.put(key, arriving(data), size_bytes_max)
    return caught.value.code


async def test_an_object_is_there_once_it_is_put_and_stays(make_store: MakeStore) -> None:
    store = make_store()
    assert await store.stat(KEY) is None
    assert await store.put(KEY, arriving(b"ab", b"", b"cde"), 5) == stored(b"abcde")
    for opened in (store, make_store()):
        assert await opened.stat(KEY) == stored(b"abcde")
        assert await content(opened, KEY) == b"abcde"


async def test_large_objects_go_through_in_pieces(make_store: MakeStore) -> None:
    store = make_store()
    pieces = [bytes([index % 251]) * 300_000 for index in range(40)]
    whole = b"".join(pieces)
    assert await store.put(KEY, arriving(*pieces), len(whole)) == stored(whole)
    parts = [part async for part in store.get(KEY)]
    assert b"".join(parts) == whole
    assert max(map(len, parts)) <= 1 << 20


async def test_an_empty_object_is_an_object(make_store: MakeStore) -> None:
    store = make_store()
    assert await store.put(KEY, arriving(), 0) == stored(b"")
    assert await content(store, KEY) == b""


async def test_writing_the_same_again_changes_nothing_and_other_bytes_are_refused(make_store: MakeStore) -> None:
    store = make_store()
    for _ in range(2):
        assert await store.put(KEY, arriving(b"first"), 10) == stored(b"first")
    assert await refusal_code(store, KEY, b"other") is RefusalCode.CONFLICT
    assert await content(store, KEY) == b"first"


async def test_of_many_writers_one_wins_and_its_digest_is_told(make_store: MakeStore) -> None:
    store = make_store()
    contents = [bytes([index]) * (index + 1) for index in range(8)]
    outcomes = await asyncio.gather(*(store.put(KEY, arriving(data), 100) for data in contents), return_exceptions=True)
    won = [data for data, outcome in zip(contents, outcomes, strict=True) if isinstance(outcome, StoredObject)]
    assert len(won) == 1
    assert await store.stat(KEY) == stored(won[0])
    assert await content(store, KEY) == won[0]


async def test_an_object_beyond_its_bound_leaves_nothing(make_store: MakeStore) -> None:
    store = make_store()
    assert await refusal_code(store, KEY, b"abcdef", size_bytes_max=5) is RefusalCode.TOO_LARGE
    assert await store.stat(KEY) is None
    assert await store.put(KEY, arriving(b"abcde"), 5) == stored(b"abcde")


async def test_a_write_that_breaks_off_leaves_nothing(make_store: MakeStore, tmp_path: Path) -> None:
    store = make_store()

    async def broken() -> AsyncIterator[bytes]:
        yield b"x" * 100
        raise ConnectionResetError

    started = asyncio.Event()

    async def endless() -> AsyncIterator[bytes]:
        started.set()
        await asyncio.Event().wait()
        yield b""

    with pytest.raises(ConnectionResetError):
        await store.put(KEY, broken(), 1000)
    task = asyncio.create_task(store.put(KEY, endless(), 1000))
    await started.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert await store.stat(KEY) is None
    assert files_under(tmp_path) == []


async def test_reading_what_is_not_there_is_refused(make_store: MakeStore) -> None:
    store = make_store()
    await store.put(KEY, arriving(b"x"), 1)
    for key in ("nothing", "outer/3/stage", KEY + "/more"):
        with pytest.raises(RefusedError) as caught:
            await content(store, key)
        assert caught.value.code is RefusalCode.NOT_FOUND
        assert await store.stat(key) is None


async def test_a_key_that_goes_on_from_another_is_refused(make_store: MakeStore) -> None:
    store = make_store()
    await store.put("a/b", arriving(b"x"), 1)
    for key in ("a", "a/b/c", "a/b/c/d"):
        assert await refusal_code(store, key, b"x") is RefusalCode.CONFLICT
    assert await content(store, "a/b") == b"x"


async def test_a_prefix_is_deleted_with_all_below_it_and_nothing_else(make_store: MakeStore) -> None:
    store = make_store()
    keys = ["outer/1/a", "outer/1/b/c", "outer/10/a", "outer/2/a"]
    for key in keys:
        await store.put(key, arriving(key.encode()), 100)
    for _ in range(2):
        await store.delete_prefix("outer/1/")
    assert [key for key in keys if await store.stat(key)] == ["outer/10/a", "outer/2/a"]
    assert await store.put("outer/1/a", arriving(b"new"), 100) == stored(b"new")


@pytest.mark.parametrize(
    "key",
    [
        "",
        "/etc/passwd",
        "../up",
        "a/../b",
        "a//b",
        "a/",
        ".hidden",
        "a/.b",
        "a\x00b",
        "a\nb",
        "ä",
        "a" * 300,
        "a/" * 20 + "a",
        "a\\b",
    ],
)
async def test_a_key_that_is_none_is_refused(make_store: MakeStore, key: str) -> None:
    store = make_store()
    assert await refusal_code(store, key, b"x") is RefusalCode.MALFORMED
    for wrong in (store.stat(key), content(store, key)):
        with pytest.raises(RefusedError):
            await wrong


async def test_what_an_interrupted_process_left_is_removed(tmp_path: Path) -> None:
    await DirectoryStore(tmp_path).put(KEY, arriving(b"x"), 1)
    left = tmp_path / "partial" / "half"
    left.write_bytes(b"half")
    store = DirectoryStore(tmp_path)
    assert not left.exists()
    assert await content(store, KEY) == b"x"


# --- signed URLs ------------------------------------------------------------------------------------------------------

SIGNER = UrlSigner(b"s" * 32)


def parts_of(url: str) -> tuple[str, dict[str, str]]:
    path, _, query = url.partition("?")
    assert path.startswith("/v1/objects/")
    return path.removeprefix("/v1/objects/"), dict(field.split("=") for field in query.split("&"))


@given(st.sampled_from(["GET", "PUT"]), st.integers(0, 2**53), st.floats(0, 1e10))
def test_a_url_allows_what_it_was_made_for_until_it_expires(method: str, size_bytes_max: int, expires_s: float) -> None:
    key, query = parts_of(SIGNER.sign(method, KEY, expires_s, size_bytes_max))
    assert key == KEY
    assert SIGNER.verify(method, key, query, int(expires_s)) == size_bytes_max
    with pytest.raises(RefusedError) as caught:
        SIGNER.verify(method, key, query, expires_s + 1)
    assert caught.value.code is RefusalCode.FORBIDDEN


@pytest.mark.parametrize(
    ("method", "key", "changed"),
    [
        ("GET", KEY, {}),
        ("PUT", KEY.replace("1", "2"), {}),
        ("PUT", KEY, {"max": "1000000"}),
        ("PUT", KEY, {"expires": "99999999999"}),
        ("GET", KEY, {"method": "GET"}),
        ("PUT", KEY, {"sig": ""}),
        ("PUT", KEY, {"sig": "ü"}),
        ("PUT", KEY, {"sig": None}),
        ("PUT", KEY, {"max": None}),
    ],
)
def test_a_url_allows_nothing_else(method: str, key: str, changed: dict[str, str | None]) -> None:
    _, query = parts_of(SIGNER.sign("PUT", KEY, 100.0, 10))
    query = {name: value for name, value in {**query, **changed}.items() if value is not None}
    with pytest.raises(RefusedError) as caught:
        SIGNER.verify(method, key, query, 50.0)
    assert caught.value.code is RefusalCode.FORBIDDEN


def test_another_secret_makes_other_urls() -> None:
    key, query = parts_of(SIGNER.sign("GET", KEY, 100.0))
    with pytest.raises(RefusedError):
        UrlSigner(b"t" * 32).verify("GET", key, query, 50.0)
    with pytest.raises(ValueError, match="too short"):
        UrlSigner(b"short")
