"""Tensor requests read straight from the socket into their place: one copy, hashed while it arrives.

Owns one peer's connection as long as it carries tensor requests in plain HTTP/1.1. Whatever else comes (another route,
another method, a body of unknown length, a head that is broken or too long) is handed over to the web framework, which
keeps the connection from then on: so only the common case is handled here, and heads are parsed by llhttp either way.

Invariants: nothing of a body is read (beyond what came along with its head, 64 KiB at most) before the handler asks for
it; one request at a time; every wait has a bound: the handler's own for bodies, `SERVER_KEEPALIVE_S` for heads,
`LINGER_S` for the rest of a refused body.
"""

import asyncio
import socket
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from http import HTTPStatus
from typing import cast
from urllib.parse import parse_qsl

import httptools
from blake3 import blake3

from orion.common.ids import Digest
from orion.common.net.buffer_pool import BufferPool
from orion.common.net.http import SERVER_KEEPALIVE_S
from orion.common.net.tensor_request import TensorHandler
from orion.common.protocol.messages import Message, RefusalCode
from orion.common.protocol.refusals import RefusedError, refused, status_of

HEAD_BYTES_MAX = 64 * 1024
"""A tensor's query names the path so far: 512 stages take 30 KB."""
LINGER_S = 1.0
"""How long the rest of a refused body is read and thrown away, so that the refusal reaches its sender."""
_READ_BYTES = 512 * 1024
"""Of a body, the kernel wakes us once so much has come (or the rest, or nothing more will), and so much is taken at a
time: few wakes, and each part is hashed while it still lies in the processor's cache and the next one is coming."""
_LENGTH_DIGITS_MAX = 15
_HEAD_END = b"\r\n\r\n"


@dataclass(slots=True)
class _Head:
    """The head of a request, as llhttp reports it."""

    target: bytes = b""
    headers: list[tuple[bytes, bytes]] = field(default_factory=list)

    def on_url(self, url: bytes) -> None:
        self.target += url

    def on_header(self, name: bytes, value: bytes) -> None:
        self.headers.append((name, value))


@dataclass(slots=True)
class _Arrival:
    """A body that is being read."""

    view: memoryview
    hasher: blake3
    ended: asyncio.Future[None]
    position: int = 0

    def took(self, size_bytes: int) -> bool:
        """Counts and hashes what came; whether it was the last."""
        end = self.position + size_bytes
        self.hasher.update(self.view[self.position : end])
        self.position = end
        return end == len(self.view)


class DirectRequest:
    """A tensor request on its own connection (`TensorRequest`)."""

    def __init__(self, connection: "TensorConnection", target: str, headers: dict[str, str], size_bytes: int) -> None:
        self.method = "POST"
        self.target = target
        self.headers = headers
        self.content_length = size_bytes
        self._connection = connection

    @property
    def query(self) -> Mapping[str, str]:
        return dict(parse_qsl(self.target.partition("?")[2], keep_blank_values=True))

    async def receive(self, size_bytes: int, digest: Digest) -> memoryview:
        assert size_bytes == self.content_length, "the caller compares what is announced with what is due"
        return await self._connection.receive(size_bytes, digest)


@dataclass(slots=True)
class OpenConnections:
    """Connections of one server that carry tensor requests."""

    open: "set[TensorConnection]" = field(default_factory=set)
    buffers: BufferPool = field(default_factory=BufferPool)
    """For the bodies of all of them."""
    is_closed: bool = False
    """The server stops: who was accepted in the last moment is broken off."""

    async def close(self, grace_s: float) -> None:
        """Gives handlers at work some time, then closes every connection."""
        self.is_closed = True
        tasks = [connection.task for connection in self.open if connection.task is not None]
        if tasks:
            await asyncio.wait(tasks, timeout=grace_s)
        for connection in list(self.open):
            if connection.task is not None:
                connection.task.cancel()
            connection.abort()


class TensorConnection(asyncio.BufferedProtocol):
    """One connection, from its first byte until it is closed or handed over."""

    def __init__(
        self,
        handlers: Mapping[str, TensorHandler],
        hand_over: Callable[[], asyncio.Protocol],
        connections: OpenConnections,
    ) -> None:
        """`handlers` by path; `hand_over` makes the framework's protocol; `connections` holds those that are open."""
        self._handlers = handlers
        self._hand_over = hand_over
        self._connections = connections
        self._loop = asyncio.get_running_loop()
        self._transport: asyncio.Transport
        self._head = bytearray(HEAD_BYTES_MAX)
        self._head_view = memoryview(self._head)
        self._num_held = 0
        """Bytes in the head's buffer."""
        self._num_came_along = 0
        """The first of them that belong to the body at hand; the others to requests to come."""
        self._num_searched = 0
        self._num_unread = 0
        """Of the body at hand, those that are still to come from the socket."""
        self._num_to_wake = 1
        self._arrival: _Arrival | None = None
        self._is_discarding = False
        self._keeps_alive = True
        self._timer: asyncio.TimerHandle | None = None
        self.task: asyncio.Task[Message] | None = None
        """The handler at work."""

    # --- what the transport tells -------------------------------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)
        self._connections.open.add(self)
        self._close_after(SERVER_KEEPALIVE_S)
        if self._connections.is_closed:
            self.abort()

    def connection_lost(self, exc: Exception | None) -> None:
        self._connections.open.discard(self)
        self._close_after(None)
        if self._arrival is not None and not self._arrival.ended.done():
            self._arrival.ended.set_exception(ConnectionResetError("the sender broke off"))

    def get_buffer(self, sizehint: int) -> memoryview:
        if self._arrival is not None:
            return self._arrival.view[self._arrival.position :][:_READ_BYTES]
        if self._is_discarding:
            return self._head_view[: self._num_unread]  # nothing is held: all that came along was the body's
        return self._head_view[self._num_held :]

    def buffer_updated(self, nbytes: int) -> None:
        if self._arrival is not None:
            self._num_unread -= nbytes
            if self._arrival.took(nbytes):
                self._transport.pause_reading()
                self._arrival.ended.set_result(None)
                self._arrival = None
            else:
                self._wake_at(min(self._num_unread, _READ_BYTES))
        elif self._is_discarding:
            self._num_unread -= nbytes
            if self._num_unread == 0:
                self._next_request()
        else:
            self._num_held += nbytes
            self._look_for_head()

    # --- requests -----------------------------------------------------------------------------------------------------

    def _look_for_head(self) -> None:
        end = self._head.find(_HEAD_END, max(0, self._num_searched - len(_HEAD_END)), self._num_held)
        self._num_searched = self._num_held
        if end < 0:
            if self._num_held == HEAD_BYTES_MAX:
                self._leave_to_framework()
            return
        end += len(_HEAD_END)
        found = self._parse(bytes(self._head_view[:end]))
        if found is None:
            self._leave_to_framework()
            return
        handler, request = found
        self._close_after(None)
        self._transport.pause_reading()
        self._drop_held(end)
        self._num_came_along = min(self._num_held, request.content_length)
        self._num_unread = request.content_length - self._num_came_along
        self.task = self._loop.create_task(_awaited(handler(request)))
        self.task.add_done_callback(self._answer)

    def _parse(self, data: bytes) -> tuple[TensorHandler, DirectRequest] | None:
        """Who handles the request, and the request; None when it is not one of ours."""
        head = _Head()
        parser = httptools.HttpRequestParser(head)
        try:
            parser.feed_data(data)
            target = head.target.decode("ascii")
            headers = {name.decode("ascii").lower(): value.decode("latin-1") for name, value in head.headers}
        except (httptools.HttpParserError, httptools.HttpParserUpgrade, UnicodeDecodeError):
            return None
        handler = self._handlers.get(target.partition("?")[0])
        length = headers.get("content-length", "")
        is_plain = (
            parser.get_method() == b"POST"
            and parser.get_http_version() == "1.1"
            and len(headers) == len(head.headers)
            and length.isascii()
            and length.isdecimal()
            and len(length) <= _LENGTH_DIGITS_MAX
            and int(length) > 0
            and headers.keys().isdisjoint({"transfer-encoding", "content-encoding", "expect", "upgrade"})
        )
        if handler is None or not is_plain:
            return None
        self._keeps_alive = parser.should_keep_alive()
        return handler, DirectRequest(self, target, headers, int(length))

    async def receive(self, size_bytes: int, digest: Digest) -> memoryview:
        """The body of the request at hand, in memory of its own. Raises RefusedError, or ConnectionError when the
        sender breaks off."""
        arrival = _Arrival(self._connections.buffers.take(size_bytes), blake3(), self._loop.create_future())
        num_came_along, self._num_came_along = self._num_came_along, 0
        arrival.view[:num_came_along] = self._head_view[:num_came_along]
        self._drop_held(num_came_along)
        if not arrival.took(num_came_along):
            if self._transport.is_closing():
                raise ConnectionResetError("the sender broke off")
            self._arrival = arrival
            self._wake_at(min(self._num_unread, _READ_BYTES))
            self._transport.resume_reading()
            try:
                await arrival.ended
            finally:
                self._wake_at(1)
                if self._arrival is not None:
                    self._arrival = None
                    self._transport.pause_reading()
        if arrival.hasher.hexdigest() != digest:
            raise refused(RefusalCode.DIGEST_MISMATCH, "body is not what its digest says")
        return arrival.view

    def _wake_at(self, num_bytes: int) -> None:
        """From now on the kernel tells of what has come once it is so much, or once nothing more will come."""
        if num_bytes != self._num_to_wake and not self._transport.is_closing():
            self._num_to_wake = num_bytes
            connection = self._transport.get_extra_info("socket")
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVLOWAT, num_bytes)

    def _drop_held(self, num_bytes: int) -> None:
        self._head[: self._num_held - num_bytes] = self._head[num_bytes : self._num_held]
        self._num_held -= num_bytes

    # --- answers ------------------------------------------------------------------------------------------------------

    def _answer(self, task: asyncio.Task[Message]) -> None:
        """The handler has ended: tells the sender how, and goes on to the next request."""
        self.task = None
        if task.cancelled():
            self.abort()
            return
        error = task.exception()
        if error is not None and not isinstance(error, RefusedError):
            # A mistake of ours: it is reported as any callback's would be, and the sender sees a broken connection.
            self.abort()
            raise error
        if self._transport.is_closing():
            return
        if error is None:
            self._write(200, task.result())
        else:
            self._write(status_of(error.refusal.code), error.refusal)
        self._drop_held(self._num_came_along)
        self._num_came_along = 0
        if not self._keeps_alive:
            self._transport.close()
        elif self._num_unread:
            self._is_discarding = True
            self._close_after(LINGER_S)
            self._transport.resume_reading()
        else:
            self._next_request()

    def _write(self, status: int, message: Message) -> None:
        body = message.model_dump_json().encode()
        lines = [f"HTTP/1.1 {status} {HTTPStatus(status).phrase}", "Content-Type: application/json"]
        lines.append(f"Content-Length: {len(body)}")
        if not self._keeps_alive:
            lines.append("Connection: close")
        self._transport.write("\r\n".join([*lines, "", ""]).encode() + body)

    def _next_request(self) -> None:
        self._is_discarding = False
        self._num_searched = 0
        self._close_after(SERVER_KEEPALIVE_S)
        self._transport.resume_reading()
        if self._num_held:
            self._look_for_head()

    def _leave_to_framework(self) -> None:
        """For good: what was read of the request goes along."""
        self._close_after(None)
        self._connections.open.discard(self)
        protocol = self._hand_over()
        self._transport.set_protocol(protocol)
        protocol.connection_made(self._transport)
        protocol.data_received(bytes(self._head_view[: self._num_held]))

    def _close_after(self, seconds: float | None) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._timer = None if seconds is None else self._loop.call_later(seconds, self.abort)

    def abort(self) -> None:
        """Closes at once; a body that is being read ends as one that broke off."""
        self._transport.abort()


async def _awaited(answer: Awaitable[Message]) -> Message:
    return await answer
