"""The receiving end for the miner's peers: aiohttp, and for tensors `tensor_connection`, on the same port.

Owns how requests are read and answered. Every body is bounded before it is read, and every read has a time limit, so
that neither a large nor a slow sender holds memory.
"""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from functools import partial
from typing import TypeVar

from aiohttp import ClientPayloadError, web

from orion.common.ids import Digest, Hotkey
from orion.common.net.gate import REQUEST_BYTES_MAX, Gate, check_request_size, parse_request
from orion.common.net.http import SERVER_KEEPALIVE_S, receive_exact
from orion.common.net.tensor_connection import HEAD_BYTES_MAX, LINGER_S, OpenConnections, TensorConnection
from orion.common.net.tensor_request import TensorHandler, TensorRequest
from orion.common.protocol.messages import (
    Message,
    Refusal,
    RefusalCode,
    Transfer,
)
from orion.common.protocol.refusals import RefusedError, refusal_from_answer, refused, status_of

MessageT = TypeVar("MessageT", bound=Message)
Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]

GATE = web.AppKey("gate", Gate)
TENSORS: web.AppKey[dict[str, TensorHandler]] = web.AppKey("tensors")

READ_TIMEOUT_S = 30.0
"""For a JSON body to arrive."""
_READ_BUFFER_BYTES = 1 << 20
"""What may lie received and unread per connection before the sender is slowed down."""
_SHUTDOWN_S = 1.0
"""What requests under way are given when a server closes."""


def build_app(gate: Gate) -> web.Application:
    """An application whose handlers may raise RefusedError and use the functions below."""
    app = web.Application(middlewares=[_answer_refusals])
    app[GATE] = gate
    app[TENSORS] = {}
    return app


def add_tensor_route(app: web.Application, route: str, handler: TensorHandler) -> None:
    """Has a handler answer POSTs of tensors."""
    app[TENSORS][route] = handler

    async def over_framework(request: web.Request) -> web.StreamResponse:
        """What came in another way than `TensorConnection` takes."""
        return json_answer(await handler(_FrameworkRequest(request)))

    app.router.add_post(route, over_framework)


@asynccontextmanager
async def serve(app: web.Application, host: str, port: int) -> AsyncIterator[int]:
    """Serves until the block is left; gives the port (useful with port 0). Raises OSError when it cannot be bound."""
    runner = web.AppRunner(
        app,
        access_log=None,
        keepalive_timeout=SERVER_KEEPALIVE_S,
        max_line_size=HEAD_BYTES_MAX,
        read_bufsize=_READ_BUFFER_BYTES,
        lingering_time=LINGER_S,
        shutdown_timeout=_SHUTDOWN_S,
    )
    await runner.setup()
    connections = OpenConnections()
    try:
        assert runner.server is not None
        tensors: dict[str, TensorHandler] = app.get(TENSORS, {})
        connect = partial(TensorConnection, tensors, runner.server, connections)
        server = await asyncio.get_running_loop().create_server(connect, host, port)
        try:
            yield server.sockets[0].getsockname()[1]
        finally:
            server.close()
            await connections.close(_SHUTDOWN_S)
    finally:
        await runner.cleanup()


async def signed_json(
    request: web.Request, message_type: type[MessageT], size_bytes_max: int = REQUEST_BYTES_MAX
) -> tuple[Hotkey, MessageT]:
    """Sender and message of a signed JSON request. Raises RefusedError."""
    body = await _read(request, size_bytes_max)
    return _check(request, body), parse_request(message_type, body)


def signed_transfer(gate: Gate, request: TensorRequest) -> tuple[Hotkey, Transfer]:
    """Sender and description of a tensor request, before anything of its body is read. Raises RefusedError."""
    query = request.query
    sender = gate.check(request.method, request.target, query, request.headers, b"")
    described = query.get("transfer")
    if described is None:
        raise refused(RefusalCode.MALFORMED, "the query has no transfer")
    return sender, parse_request(Transfer, described)


@asynccontextmanager
async def arrival(timeout_s: float) -> AsyncIterator[None]:
    """Around the reading of a body: bounds its time, and makes a sender's breaking off a refusal. (Nobody will read
    that one, but the handler ends as after any other.)"""
    try:
        async with asyncio.timeout(timeout_s):
            yield
    except TimeoutError as error:
        raise refused(RefusalCode.MALFORMED, f"the body did not arrive within {timeout_s:g} s") from error
    except (ConnectionError, ClientPayloadError) as error:
        raise refused(RefusalCode.MALFORMED, "the body broke off") from error


def json_answer(message: Message, status: int = 200) -> web.Response:
    """A message as an answer."""
    return web.Response(body=message.model_dump_json().encode(), status=status, content_type="application/json")


class _FrameworkRequest:
    """A tensor request that the framework reads (`TensorRequest`)."""

    def __init__(self, request: web.Request) -> None:
        self._request = request
        self.method = request.method
        self.target = request.raw_path
        self.query = request.query
        self.headers = request.headers
        self.content_length = request.content_length

    async def receive(self, size_bytes: int, digest: Digest) -> memoryview:
        return memoryview(await receive_exact(self._request.content, size_bytes, digest))


def _check(request: web.Request, body: bytes) -> Hotkey:
    # raw_path is the target as it was signed; anything that had been decoded would not verify.
    return request.app[GATE].check(request.method, request.raw_path, request.query, request.headers, body)


async def _read(request: web.Request, size_bytes_max: int) -> bytes:
    check_request_size(request.content_length or 0, size_bytes_max)
    parts: list[bytes] = []
    size_bytes = 0
    async with arrival(READ_TIMEOUT_S):
        async for part in request.content.iter_any():
            size_bytes += len(part)
            check_request_size(size_bytes, size_bytes_max)
            parts.append(part)
    return b"".join(parts)


@web.middleware
async def _answer_refusals(request: web.Request, handler: Handler) -> web.StreamResponse:
    try:
        return await handler(request)
    except RefusedError as error:
        return _refusal_answer(error.refusal)
    except web.HTTPClientError as error:
        # The framework's own refusals: no such route, wrong method. Their text may be HTML.
        return _refusal_answer(refusal_from_answer(error.status, b""))


def _refusal_answer(refusal: Refusal) -> web.Response:
    return json_answer(refusal, status_of(refusal.code))
