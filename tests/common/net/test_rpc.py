"""Signed JSON requests over loopback: aiohttp and Starlette take and refuse the very same ones."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import AbstractAsyncContextManager, asynccontextmanager

import pytest
from aiohttp import web
from net_loopback import CLIENT, CLIENT_KEY, RUN, SERVER, serve_starlette
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import PlainTextResponse, RedirectResponse, Response
from starlette.routing import Route

from orion.common.clock import SystemClock
from orion.common.errors import TransportError
from orion.common.ids import Digest
from orion.common.net import aiohttp_server, starlette_server
from orion.common.net.gate import Gate
from orion.common.net.http import HttpClient
from orion.common.net.rpc import RpcClient
from orion.common.protocol.messages import (
    Cancel,
    Done,
    Leave,
    RefusalCode,
)
from orion.common.protocol.records import LossQuery
from orion.common.protocol.refusals import RefusedError, refused
from orion.common.protocol.signing import Verifier, sign_request

Serve = Callable[[Gate], AbstractAsyncContextManager[str]]

MESSAGE = Leave(reason="done")
SIZE_BYTES_MAX = 1000


@asynccontextmanager
async def aiohttp_echo(gate: Gate) -> AsyncIterator[str]:
    async def echo(request: web.Request) -> web.Response:
        sender, message = await aiohttp_server.signed_json(request, Leave, SIZE_BYTES_MAX)
        return aiohttp_server.json_answer(Leave(reason=f"{sender} {message.reason}"))

    async def busy(request: web.Request) -> web.Response:
        raise refused(RefusalCode.BUSY, "full", retry_after_s=0.5)

    async def text(request: web.Request) -> web.Response:
        return web.Response(text="hello")

    async def moved(request: web.Request) -> web.Response:
        return web.Response(status=307, headers={"Location": "/echo"})

    async def broken(request: web.Request) -> web.Response:
        return web.Response(status=502)

    app = aiohttp_server.build_app(gate)
    for name, handler in (("echo", echo), ("busy", busy), ("text", text), ("moved", moved), ("broken", broken)):
        app.router.add_post(f"/{name}", handler)
    async with aiohttp_server.serve(app, "127.0.0.1", 0) as port:
        yield f"http://127.0.0.1:{port}"


@asynccontextmanager
async def starlette_echo(gate: Gate) -> AsyncIterator[str]:
    async def echo(request: Request) -> Response:
        sender, message = await starlette_server.signed_json(request, Leave, SIZE_BYTES_MAX)
        return starlette_server.json_answer(Leave(reason=f"{sender} {message.reason}"))

    async def busy(request: Request) -> Response:
        raise refused(RefusalCode.BUSY, "full", retry_after_s=0.5)

    async def text(request: Request) -> Response:
        return PlainTextResponse("hello")

    async def moved(request: Request) -> Response:
        return RedirectResponse("/echo", 307)

    async def broken(request: Request) -> Response:
        return Response(status_code=502)

    handlers: Mapping[str, Callable[[Request], Awaitable[Response]]] = {
        "echo": echo,
        "busy": busy,
        "text": text,
        "moved": moved,
        "broken": broken,
    }
    app = Starlette(routes=[Route(f"/{name}", handler, methods=["POST"]) for name, handler in handlers.items()])
    starlette_server.install(app, gate)
    async with serve_starlette(app) as base_url:
        yield base_url


@pytest.fixture(params=[aiohttp_echo, starlette_echo], ids=["aiohttp", "starlette"])
async def base_url(request: pytest.FixtureRequest, gate: Gate) -> AsyncIterator[str]:
    async with request.param(gate) as url:
        yield url


async def refusal(awaitable: Awaitable[object]) -> RefusedError:
    with pytest.raises(RefusedError) as caught:
        await awaitable
    return caught.value


async def test_a_message_arrives_with_its_sender(base_url: str, rpc: RpcClient) -> None:
    answers = await asyncio.gather(
        *(rpc.call(base_url, SERVER, "/echo", Leave(reason=str(i)), Leave, timeout_s=5) for i in range(20))
    )
    assert [answer.reason for answer in answers] == [f"{CLIENT} {i}" for i in range(20)]


async def test_another_run_is_told_both_digests(base_url: str) -> None:
    other = Digest("cd" * 32)
    async with RpcClient(CLIENT_KEY, other) as stranger:
        error = await refusal(stranger.call(base_url, SERVER, "/echo", MESSAGE, Leave, timeout_s=5))
    assert error.code is RefusalCode.RUN_MISMATCH
    assert RUN in error.refusal.message
    assert other in error.refusal.message


async def test_another_protocol_version_is_told_both(
    base_url: str, rpc: RpcClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("orion.common.net.rpc.PROTOCOL_VERSION", 99)
    error = await refusal(rpc.call(base_url, SERVER, "/echo", MESSAGE, Leave, timeout_s=5))
    assert error.code is RefusalCode.PROTOCOL_MISMATCH
    assert "99" in error.refusal.message


async def test_a_request_for_another_receiver_is_refused(base_url: str, rpc: RpcClient) -> None:
    error = await refusal(rpc.call(base_url, CLIENT, "/echo", MESSAGE, Leave, timeout_s=5))
    assert error.code is RefusalCode.BAD_SIGNATURE


async def test_an_unsigned_request_is_refused(base_url: str) -> None:
    async with HttpClient() as http:
        url = f"{base_url}/echo?protocol=1&run={RUN}"
        error = await refusal(http.read("POST", url, data=b'{"kind":"leave","reason":""}', timeout_s=5))
    assert error.code is RefusalCode.BAD_SIGNATURE


async def test_a_recorded_request_is_refused_the_second_time(base_url: str) -> None:
    target = f"/echo?protocol=1&run={RUN}"
    body = MESSAGE.model_dump_json().encode()
    nonce_ns = int(SystemClock().now_s() * 1e9)
    headers = sign_request(CLIENT_KEY, "POST", target, body, SERVER, nonce_ns=nonce_ns)

    async def send(http: HttpClient) -> bytes:
        async with http.open("POST", base_url + target, headers=headers, data=body, timeout_s=5) as answer:
            return await answer.read()

    async with HttpClient() as http:
        assert b"done" in await send(http)
        error = await refusal(send(http))
    assert error.code is RefusalCode.BAD_SIGNATURE
    assert error.retry_after_s == 0


async def test_a_message_of_another_kind_is_malformed(base_url: str, rpc: RpcClient) -> None:
    for message in (LossQuery(), Cancel(microbatch_id=1, outer_step=0, reason="")):
        error = await refusal(rpc.call(base_url, SERVER, "/echo", message, Leave, timeout_s=5))
        assert error.code is RefusalCode.MALFORMED


async def test_a_body_beyond_the_bound_is_refused(base_url: str, rpc: RpcClient) -> None:
    message = Cancel(microbatch_id=1, outer_step=0, reason="x" * 500)
    large = message.model_copy(update={"reason": "x" * 2 * SIZE_BYTES_MAX})
    error = await refusal(rpc.call(base_url, SERVER, "/echo", large, Leave, timeout_s=5))
    assert error.code is RefusalCode.TOO_LARGE


async def test_a_refusal_travels_whole(base_url: str, rpc: RpcClient) -> None:
    error = await refusal(rpc.call(base_url, SERVER, "/busy", MESSAGE, Done, timeout_s=5))
    assert (error.code, error.refusal.message, error.retry_after_s) == (RefusalCode.BUSY, "full", 0.5)


async def test_a_route_that_does_not_exist_is_refused(base_url: str, rpc: RpcClient) -> None:
    error = await refusal(rpc.call(base_url, SERVER, "/nowhere", MESSAGE, Done, timeout_s=5))
    assert error.code is RefusalCode.NOT_FOUND


async def test_a_wrong_method_is_refused(base_url: str, rpc: RpcClient) -> None:
    error = await refusal(rpc.get(base_url, SERVER, "/echo", Done, query={}, timeout_s=5))
    assert error.code is RefusalCode.MALFORMED


@pytest.mark.parametrize("route", ["/text", "/moved", "/broken"])
async def test_an_answer_that_makes_no_sense_is_a_transport_error(base_url: str, rpc: RpcClient, route: str) -> None:
    with pytest.raises(TransportError, match=route):
        await rpc.call(base_url, SERVER, route, MESSAGE, Done, timeout_s=5)


async def test_nobody_there_is_a_transport_error(rpc: RpcClient, unused_tcp_port: int) -> None:
    for base_url in (f"http://127.0.0.1:{unused_tcp_port}", "http://host.invalid:80"):
        with pytest.raises(TransportError):
            await rpc.call(base_url, SERVER, "/echo", MESSAGE, Done, timeout_s=5)


@pytest.mark.parametrize(
    "host",
    [
        "a:99999999",
        "[",
        "[::1",
        "user@:x",
        ":80",
        "a:b:c",
        "@",
        "a..invalid",
        "..",
        "x" * 250,
        "a\\b",
        "\u2100.invalid",
        "1.2.3.4.5",
        "%zz",
    ],
)
async def test_an_address_that_is_none_is_a_transport_error(rpc: RpcClient, host: str) -> None:
    with pytest.raises(TransportError):
        await rpc.call(f"http://{host}", SERVER, "/echo", MESSAGE, Done, timeout_s=5)


async def test_silence_is_a_transport_error_after_the_time_limit(rpc: RpcClient) -> None:
    async def silent(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read()
        writer.close()

    server = await asyncio.start_server(silent, "127.0.0.1", 0)
    async with server:
        port = server.sockets[0].getsockname()[1]
        with pytest.raises(TransportError, match=r"within 0\.05 s"):
            await rpc.call(f"http://127.0.0.1:{port}", SERVER, "/echo", MESSAGE, Done, timeout_s=0.05)


async def test_an_endless_answer_is_cut_off(rpc: RpcClient) -> None:
    async def endless(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 200 OK\r\nConnection: close\r\n\r\n")
        try:
            while True:
                writer.write(b"x" * 65536)
                await writer.drain()
        except ConnectionError:
            writer.close()

    server = await asyncio.start_server(endless, "127.0.0.1", 0)
    async with server:
        url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/"
        error = await refusal(rpc.http.read("GET", url, timeout_s=5, size_bytes_max=100_000))
    assert error.code is RefusalCode.TOO_LARGE


def test_a_gate_without_a_run_takes_requests_without_one() -> None:
    gate = Gate(Verifier(SERVER), None, SystemClock())
    nonce_ns = int(SystemClock().now_s() * 1e9)
    headers = sign_request(CLIENT_KEY, "GET", "/x?protocol=1", b"", SERVER, nonce_ns=nonce_ns)
    assert gate.check("GET", "/x?protocol=1", {"protocol": "1"}, headers, b"") == CLIENT
