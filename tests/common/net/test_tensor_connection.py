"""Connections that carry tensors: what is read where, and who reads it."""

import asyncio
from collections.abc import AsyncIterator

import numpy as np
import pytest
import torch
from aiohttp import web
from blake3 import blake3

from orion.common.ids import Digest
from orion.common.net.aiohttp_server import add_tensor_route, build_app, serve
from orion.common.net.gate import Gate
from orion.common.net.tensor_connection import HEAD_BYTES_MAX, OpenConnections, TensorConnection
from orion.common.net.tensor_request import TensorRequest
from orion.common.protocol.codec import decode, encode, received_body
from orion.common.protocol.messages import Accepted, RefusalCode
from orion.common.protocol.refusals import refused
from orion.common.train.compress import TensorSpec


class Taker:
    """Takes any body whose digest is in the query; refuses those that are to be refused."""

    def __init__(self) -> None:
        self.port = 0
        self.taken: list[memoryview] = []
        self.by_framework = 0

    async def take(self, request: TensorRequest) -> Accepted:
        assert request.content_length is not None
        self.taken.append(await request.receive(request.content_length, Digest(request.query["digest"])))
        return Accepted(credits=len(self.taken), queued=0)

    async def refuse(self, request: TensorRequest) -> Accepted:
        raise refused(RefusalCode.BUSY, "full", retry_after_s=0.1)

    async def hello(self, request: web.Request) -> web.Response:
        self.by_framework += 1
        return web.Response(text="hello")


@pytest.fixture
async def taker(gate: Gate) -> AsyncIterator[Taker]:
    taker = Taker()
    app = build_app(gate)
    add_tensor_route(app, "/take", taker.take)
    add_tensor_route(app, "/refuse", taker.refuse)
    app.router.add_get("/hello", taker.hello)
    async with serve(app, "127.0.0.1", 0) as taker.port:
        yield taker


class Caller:
    """One connection, written to byte by byte if need be."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader, self.writer = reader, writer

    async def answer(self) -> tuple[int, bytes]:
        async with asyncio.timeout(5):
            head = await self.reader.readuntil(b"\r\n\r\n")
            fields = dict(line.split(b": ", 1) for line in head.split(b"\r\n")[1:-2])
            return int(head.split()[1]), await self.reader.readexactly(int(fields[b"Content-Length"]))


@pytest.fixture
async def caller(taker: Taker) -> AsyncIterator[Caller]:
    caller = Caller(*await asyncio.open_connection("127.0.0.1", taker.port))
    yield caller
    caller.writer.close()


def request(body: bytes, route: str = "/take", *lines: str) -> bytes:
    head = [f"POST {route}?digest={blake3(body).hexdigest()} HTTP/1.1", "Host: x", f"Content-Length: {len(body)}"]
    return "\r\n".join([*head, *lines, "", ""]).encode() + body


BODIES = [bytes([number]) * size for number, size in enumerate((1, 1000, HEAD_BYTES_MAX, 3 * HEAD_BYTES_MAX + 7))]


async def test_requests_that_come_in_one_piece_are_answered_in_order(taker: Taker, caller: Caller) -> None:
    caller.writer.write(b"".join(map(request, BODIES)))
    assert [(await caller.answer())[0] for _ in BODIES] == [200] * len(BODIES)
    assert [bytes(body) for body in taker.taken] == BODIES


async def test_a_head_that_comes_in_pieces_is_one_head(taker: Taker, caller: Caller) -> None:
    data = request(BODIES[1])
    for start in range(0, len(data), 40):
        caller.writer.write(data[start : start + 40])
        await caller.writer.drain()
        await asyncio.sleep(0)
    assert (await caller.answer())[0] == 200
    assert bytes(taker.taken[0]) == BODIES[1]


async def test_a_body_that_trickles_in_is_taken_with_its_last_byte_and_the_next_head_at_once(
    taker: Taker, caller: Caller
) -> None:
    body = bytes(range(256)) * 3000
    data = request(body)
    for start in range(0, len(data), 50_000):
        caller.writer.write(data[start : start + 50_000])
        await caller.writer.drain()
        await asyncio.sleep(0)
    assert (await caller.answer())[0] == 200
    caller.writer.write(request(BODIES[0]))
    assert (await caller.answer())[0] == 200
    assert [bytes(taken) for taken in taker.taken] == [body, BODIES[0]]


@pytest.mark.parametrize("body", BODIES, ids=len)
async def test_after_a_refused_body_the_connection_goes_on(taker: Taker, caller: Caller, body: bytes) -> None:
    caller.writer.write(request(body, "/refuse") + request(BODIES[1]))
    assert (await caller.answer())[0] == 429
    assert (await caller.answer())[0] == 200
    assert [bytes(taken) for taken in taker.taken] == [BODIES[1]]


async def test_what_is_no_tensor_goes_to_the_framework_and_tensors_after_it_still_arrive(
    taker: Taker, caller: Caller
) -> None:
    caller.writer.write(request(BODIES[1]) + b"GET /hello HTTP/1.1\r\nHost: x\r\n\r\n")
    assert (await caller.answer())[0] == 200
    assert await caller.answer() == (200, b"hello")
    caller.writer.write(request(BODIES[3]))
    assert (await caller.answer())[0] == 200
    assert taker.by_framework == 1
    assert [bytes(body) for body in taker.taken] == [BODIES[1], BODIES[3]]


@pytest.mark.parametrize("line", ["Transfer-Encoding: chunked", "Content-Length: 5", "Host: y", "Bad Header: 1"])
async def test_an_unusual_head_is_the_framework_s_to_answer(taker: Taker, caller: Caller, line: str) -> None:
    caller.writer.write(request(BODIES[1], "/take", line))
    status, _ = await caller.answer()
    assert status in (200, 400)
    assert len(taker.taken) == (status == 200)


async def test_a_head_that_never_ends_is_refused(taker: Taker, caller: Caller) -> None:
    caller.writer.write(b"POST /take?x=" + b"x" * 2 * HEAD_BYTES_MAX)
    assert (await caller.answer())[0] == 400
    assert taker.taken == []


async def test_a_body_of_another_digest_is_refused_and_the_connection_goes_on(taker: Taker, caller: Caller) -> None:
    data = bytearray(request(BODIES[3]))
    data[-1] ^= 1
    caller.writer.write(bytes(data) + request(BODIES[1]))
    status, answer = await caller.answer()
    assert (status, b"digest_mismatch" in answer.lower()) == (422, True)
    assert (await caller.answer())[0] == 200
    assert [bytes(body) for body in taker.taken] == [BODIES[1]]


async def test_nothing_is_copied_between_the_socket_s_reads_and_the_tensors(taker: Taker, caller: Caller) -> None:
    sent = torch.arange(100_000, dtype=torch.float32)
    body = encode({"x": sent})
    assert _address(body.parts[0]) == sent.data_ptr(), "the sender writes from the tensor's own memory"
    caller.writer.write(request(body.tobytes()))
    assert (await caller.answer())[0] == 200
    (view,) = taker.taken
    expected = {"x": TensorSpec(torch.float32, (100_000,))}
    received = decode(view, expected, len(view))
    kept = received_body(view, expected, body.digest)
    assert torch.equal(received["x"], sent)
    assert received["x"].data_ptr() == _address(view) + len(body.header) == _address(kept.parts[0])


def _address(view: memoryview) -> int:
    return int(np.frombuffer(view, np.uint8).ctypes.data)


async def test_who_is_accepted_while_the_server_stops_is_broken_off() -> None:
    connections = OpenConnections()
    await connections.close(grace_s=0.0)
    framework = web.Server(Taker().hello)
    loop = asyncio.get_running_loop()
    server = await loop.create_server(lambda: TensorConnection({}, framework, connections), "127.0.0.1", 0)
    async with server, asyncio.timeout(5):
        reader, writer = await asyncio.open_connection(*server.sockets[0].getsockname())
        assert await reader.read() == b""
        writer.close()
    assert connections.open == set()
