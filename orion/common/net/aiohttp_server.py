"""The receiving end on aiohttp, for the miner's peers; tensors are `tensor_server`'s part.

Owns how requests are read and answered. Every body is bounded before it is read, and every read has a time limit, so
that neither a large nor a slow sender holds memory.
"""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import TypeVar

from aiohttp import ClientPayloadError, web

from orion.common.ids import Hotkey
from orion.common.net.gate import REQUEST_BYTES_MAX, Gate, check_request_size, parse_request
from orion.common.net.http import SERVER_KEEPALIVE_S
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

READ_TIMEOUT_S = 30.0
"""For a JSON body to arrive."""
_LINE_BYTES_MAX = 64 * 1024
"""A tensor's query names the path so far: 512 stages take 30 KB."""
_READ_BUFFER_BYTES = 1 << 20
"""What may lie received and unread per connection before the sender is slowed down."""
_LINGER_S = 1.0
"""How long the rest of a refused body is read and thrown away, so that the refusal reaches its sender."""
_SHUTDOWN_S = 1.0
"""What requests under way are given when a server closes."""


def build_app(gate: Gate) -> web.Application:
    """An application whose handlers may raise RefusedError and use the functions below."""
    app = web.Application(middlewares=[_answer_refusals])
    app[GATE] = gate
    return app


@asynccontextmanager
async def serve(app: web.Application, host: str, port: int) -> AsyncIterator[int]:
    """Serves until the block is left; gives the port (useful with port 0). Raises OSError when it cannot be bound."""
    runner = web.AppRunner(
        app,
        access_log=None,
        keepalive_timeout=SERVER_KEEPALIVE_S,
        max_line_size=_LINE_BYTES_MAX,
        read_bufsize=_READ_BUFFER_BYTES,
        lingering_time=_LINGER_S,
        shutdown_timeout=_SHUTDOWN_S,
    )
    await runner.setup()
    try:
        site = web.TCPSite(runner, host, port)
        await site.start()
        yield runner.addresses[0][1]
    finally:
        await runner.cleanup()


async def signed_json(
    request: web.Request, message_type: type[MessageT], size_bytes_max: int = REQUEST_BYTES_MAX
) -> tuple[Hotkey, MessageT]:
    """Sender and message of a signed JSON request. Raises RefusedError."""
    body = await _read(request, size_bytes_max)
    return _check(request, body), parse_request(message_type, body)


async def signed_transfer(request: web.Request) -> tuple[Hotkey, Transfer]:
    """Sender and description of a tensor request, before anything of its body is read. Raises RefusedError."""
    sender = _check(request, b"")
    described = request.query.get("transfer")
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
