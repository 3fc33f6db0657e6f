"""The dashboard's routes: what is served, with which headers, and what becomes of listeners that do not behave."""

import asyncio
import json
from collections.abc import AsyncIterator
from pathlib import Path

import aiohttp
import pytest
from dashboard_kit import Player, playing
from dashboard_story import Recording, tell_story
from orchestrator_http import make_chain, make_config, orchestrator
from orchestrator_world import make_spec
from starlette.types import Message

from orion.common.protocol.messages import RefusalCode
from orion.common.protocol.refusals import RefusedError
from orion.orchestrator.dashboard.live import LISTENERS_MAX, SECTIONS, LiveStream


@pytest.fixture(scope="module")
def story() -> Recording:
    return tell_story(num_stages=2, replicas=2, outer_steps=3)


@pytest.fixture
async def served(story: Recording, tmp_path: Path) -> AsyncIterator[tuple[Player, str, aiohttp.ClientSession]]:
    async with playing(story, tmp_path, story.marks["step 0"]) as (player, url), aiohttp.ClientSession() as http:
        yield player, url, http


async def events(answer: aiohttp.ClientResponse, num: int) -> list[tuple[str, object]]:
    """The next server-sent events."""
    found: list[tuple[str, object]] = []
    name = ""
    while len(found) < num:
        line = (await answer.content.readline()).decode().rstrip("\n")
        assert line or not answer.content.at_eof(), "the stream has ended"
        if line.startswith("event: "):
            name = line.removeprefix("event: ")
        elif line.startswith("data: "):
            found.append((name, json.loads(line.removeprefix("data: "))))
    return found


async def test_the_page_and_all_that_it_needs_come_from_here(
    served: tuple[Player, str, aiohttp.ClientSession],
) -> None:
    _, url, http = served
    async with http.get(url) as answer:
        assert answer.url.path == "/dashboard/" and answer.content_type == "text/html"
        html = await answer.text()
        assert "default-src 'none'" in answer.headers["content-security-policy"]
        assert "unsafe" not in answer.headers["content-security-policy"]
    assert "http:" not in html and "https:" not in html, "nothing is fetched from elsewhere"
    static = Path(__file__).parents[2] / "orion/orchestrator/dashboard/static"
    names = [str(path.relative_to(static)) for path in static.rglob("*") if path.is_file()]
    assert len(names) > 15
    for name in names:
        async with http.get(f"{url}/dashboard/assets/{name}") as answer:
            assert answer.status == 200 and await answer.read() == (static / name).read_bytes(), name
            etag = answer.headers["etag"]
        async with http.get(f"{url}/dashboard/assets/{name}", headers={"If-None-Match": etag}) as answer:
            assert answer.status == 304 and not await answer.read()


@pytest.mark.parametrize("name", ["../serve.py", "%2e%2e/serve.py", "nothing.js", "", "vendor/"])
async def test_nothing_else_is_served(served: tuple[Player, str, aiohttp.ClientSession], name: str) -> None:
    _, url, http = served
    async with http.get(f"{url}/dashboard/assets/{name}") as answer:
        assert answer.status == 404


async def test_nothing_can_be_written(served: tuple[Player, str, aiohttp.ClientSession]) -> None:
    _, url, http = served
    for path in ("", "page", "live", "assets/app.js"):
        async with http.post(f"{url}/dashboard/{path}", data=b"{}") as answer:
            assert answer.status == 400, path


async def test_a_listener_gets_everything_and_then_what_changes(
    served: tuple[Player, str, aiohttp.ClientSession],
) -> None:
    player, url, http = served
    async with http.get(f"{url}/dashboard/live") as answer:
        assert answer.content_type == "text/event-stream"
        first = await events(answer, 1 + len(SECTIONS))
        assert [name for name, _ in first] == ["now", *SECTIONS]
        async with http.get(f"{url}/dashboard/page") as whole:
            page = await whole.json()
        assert {name: section for name, section in first if name != "now"} == {name: page[name] for name in SECTIONS}
        await player.play(player.recording.marks["step 1"])
        outer_step = 1
        async with asyncio.timeout(10.0):
            while outer_step < 2:
                ((name, section),) = await events(answer, 1)
                if name == "head" and isinstance(section, dict):
                    outer_step = section["outer_step"]
        assert player.page.num_listeners == 1
    async with asyncio.timeout(10.0):
        while player.page.num_listeners:
            await player.page.pause()


async def test_listeners_are_bounded_and_the_others_can_still_ask(
    served: tuple[Player, str, aiohttp.ClientSession],
) -> None:
    player, url, http = served
    places = [player.page.listening() for _ in range(LISTENERS_MAX)]
    for place in places:
        place.__enter__()
    with pytest.raises(RefusedError) as refusal, player.page.listening():
        pass
    assert refusal.value.refusal.code is RefusalCode.BUSY
    async with http.get(f"{url}/dashboard/live") as answer:
        assert answer.status == 429
    async with http.get(f"{url}/dashboard/page") as answer:
        assert (await answer.json())["head"]["run_id"] == "test"
    places[0].__exit__(None, None, None)
    async with http.get(f"{url}/dashboard/live") as answer:
        assert answer.status == 200


async def test_who_does_not_read_is_cut_off(served: tuple[Player, str, aiohttp.ClientSession]) -> None:
    player, _, _ = served
    is_stuck = asyncio.Event()

    async def send(message: Message) -> None:
        if message["type"] == "http.response.body":
            is_stuck.set()
            await asyncio.Event().wait()

    async def receive() -> Message:
        await asyncio.Event().wait()
        raise AssertionError

    stream = LiveStream(player.page, [], player.dropped.append, send_s_max=0.05)
    await stream({"type": "http", "client": ("10.0.0.9", 4711)}, receive, send)
    assert is_stuck.is_set() and player.dropped == [("10.0.0.9", 4711)]
    assert player.page.num_listeners == 0


async def test_a_slow_reader_gets_the_newest_and_no_backlog(served: tuple[Player, str, aiohttp.ClientSession]) -> None:
    player, _, _ = served
    bodies: list[bytes] = []
    reads, wrote = asyncio.Semaphore(2), asyncio.Semaphore(0)

    async def send(message: Message) -> None:
        if message["type"] == "http.response.body":
            await reads.acquire()
            bodies.append(message["body"])
            wrote.release()

    async def receive() -> Message:
        await asyncio.Event().wait()
        raise AssertionError

    listening = asyncio.create_task(
        LiveStream(player.page, [], player.dropped.append)({"type": "http", "client": None}, receive, send)
    )
    await wrote.acquire()
    await wrote.acquire()  # it has the first state; now it reads no more
    await player.play(player.recording.marks["step 0"] + 40)
    await asyncio.sleep(0.1)  # what is sent next is made, and waits for the reader
    await player.play(player.recording.marks["step 1"])
    reads.release()
    reads.release()
    await wrote.acquire()
    await wrote.acquire()
    player.page.close()
    reads.release()
    await listening
    assert len(bodies) == 5  # the retry hint, the first state, one that was made before, the newest, the end
    assert b'"outer_step":2' in bodies[3]


async def test_an_orchestrator_ends_although_somebody_listens(tmp_path: Path) -> None:
    spec = make_spec(num_stages=1, replicas=1)
    async with aiohttp.ClientSession() as http:
        async with orchestrator(make_config(tmp_path), spec, make_chain()) as url:
            answer = await http.get(f"{url}/dashboard/live")
            assert [name for name, _ in await events(answer, 2)] == ["now", "head"]
            async with http.get(f"{url}/metrics") as metrics:
                assert "orion_dashboard_listeners 1.0" in await metrics.text()
        async with asyncio.timeout(5.0):
            await answer.read()  # to its proper end
