"""Tensor bodies written to the socket from the tensors' own memory, over connections that are kept.

Owns the connections to peers that tensors go over, and how such a request looks on the wire (plain HTTP/1.1).
The kernel is handed head and tensors in one call, and takes as much as it has room for each time that it has some: no
bytes are copied or kept by us, and nothing is cut into pieces. The answer is read all the while: one that comes before
the whole body has gone (a refusal, or a tensor that is not needed) ends the sending.

Invariants: one request at a time on a connection; a connection on which anything went wrong, or whose body was not
sent wholly, is closed; connections, kept ones included, are bounded; nothing is sent twice.
"""

import asyncio
import socket
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from ipaddress import ip_address

from orion.common.errors import TransportError
from orion.common.net.answer_parser import Answer, AnswerParser
from orion.common.net.http import KEEPALIVE_S, parse_url
from orion.common.protocol.codec import Body

CONNECTIONS_MAX = 512
"""At work at a time, and kept; who needs another one waits."""
_READ_BYTES = 64 * 1024
_PARTS_MAX = 64
"""Pieces of memory that the kernel is handed at a time; it takes up to 1,024."""


@dataclass(frozen=True, slots=True)
class Address:
    """Where a peer listens."""

    host: str
    port: int

    @property
    def authority(self) -> str:
        """As the request's `Host`."""
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


def address_of(base_url: str) -> Address | None:
    """Where a peer listens whose URL has neither user nor path; None when it is not to be spoken to in plain HTTP.

    Raises TransportError for what is no address.
    """
    url = parse_url(base_url)
    if not url.host or url.port is None:
        raise TransportError(f"{base_url} is no address: it has no host")
    return Address(url.host, url.port) if url.scheme == "http" else None


@dataclass(frozen=True, slots=True)
class _Kept:
    """A connection that waits for its next request."""

    connection: socket.socket
    since_s: float


class TensorSender:
    """A pool of connections. Make it inside a running event loop; close it in the end."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._room = asyncio.Semaphore(CONNECTIONS_MAX)
        self._kept: dict[Address, list[_Kept]] = {}
        """The one used last is the last."""
        self._num_kept = 0
        self._under_way: set[_Exchange] = set()
        self._timer: asyncio.TimerHandle | None = None
        self._is_closed = False

    def close(self) -> None:
        """Closes every connection; what is still under way fails with TransportError."""
        self._is_closed = True
        if self._timer is not None:
            self._timer.cancel()
        for exchange in list(self._under_way):
            exchange.fail(TransportError("the sender was closed"))
        self._drop_kept(float("inf"))

    async def post(
        self, address: Address, target: str, headers: Mapping[str, str], body: Body, *, timeout_s: float
    ) -> Answer:
        """Sends a body and gives the answer, whatever its status. `target` is sent exactly as given.

        `timeout_s` covers everything. Raises TransportError when no whole answer came.
        """
        lines = [f"POST {target} HTTP/1.1", f"Host: {address.authority}", f"Content-Length: {body.size_bytes}"]
        lines += [f"{name}: {value}" for name, value in headers.items()]
        head = "\r\n".join([*lines, "", ""]).encode("latin-1")
        try:
            async with asyncio.timeout(timeout_s), self._room:
                return await self._exchange(address, [memoryview(head), memoryview(body.header), *body.parts])
        except TimeoutError as error:
            raise TransportError(f"no answer within {timeout_s:g} s") from error
        except OSError as error:
            raise TransportError(f"{type(error).__name__}: {error}") from error

    async def _exchange(self, address: Address, pieces: list[memoryview]) -> Answer:
        connection = self._take(address) or await self._connect(address)
        exchange = _Exchange(self._loop, connection, pieces)
        is_reusable = False
        try:
            if self._is_closed:
                raise TransportError("the sender was closed")
            self._under_way.add(exchange)
            exchange.begin()
            answer = await exchange.answer
            is_reusable = answer.keeps_alive and exchange.is_sent and not self._is_closed
            return answer
        finally:
            exchange.end()
            self._under_way.discard(exchange)
            if is_reusable:
                self._keep(address, connection)
            else:
                connection.close()

    async def _connect(self, address: Address) -> socket.socket:
        failure: OSError = ConnectionError(f"{address.host} has no address")
        for family, where in await self._resolve(address):
            connection = socket.socket(family, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
            try:
                connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                await self._loop.sock_connect(connection, where)
            except OSError as error:
                connection.close()
                failure = error
            except BaseException:
                connection.close()
                raise
            else:
                return connection
        raise failure

    async def _resolve(self, address: Address) -> list[tuple[int, tuple[str, int]]]:
        """Families and socket addresses to try in turn. Names are looked up in a thread, numbers need not be."""
        with suppress(ValueError):
            family = socket.AF_INET if ip_address(address.host).version == 4 else socket.AF_INET6
            return [(family, (address.host, address.port))]
        found = await self._loop.getaddrinfo(address.host, address.port, type=socket.SOCK_STREAM)
        return [(family, (str(where[0]), int(where[1]))) for family, _, _, _, where in found]

    # --- connections that are kept ------------------------------------------------------------------------------------

    def _take(self, address: Address) -> socket.socket | None:
        """A kept connection that the peer has not closed. (What it closes from now on fails: to send again could be to
        send twice.)"""
        kept = self._kept.get(address)
        while kept:
            connection = kept.pop().connection
            self._num_kept -= 1
            if not kept:
                del self._kept[address]
            if _is_quiet(connection):
                return connection
            connection.close()
        return None

    def _keep(self, address: Address, connection: socket.socket) -> None:
        if self._num_kept >= CONNECTIONS_MAX:
            connection.close()
            return
        self._kept.setdefault(address, []).append(_Kept(connection, self._loop.time()))
        self._num_kept += 1
        if self._timer is None:
            self._timer = self._loop.call_later(KEEPALIVE_S, self._drop_old)

    def _drop_old(self) -> None:
        self._drop_kept(self._loop.time() - KEEPALIVE_S)
        oldest_s = min((kept[0].since_s for kept in self._kept.values()), default=None)
        self._timer = None if oldest_s is None else self._loop.call_at(oldest_s + KEEPALIVE_S, self._drop_old)

    def _drop_kept(self, until_s: float) -> None:
        """Closes those that have been kept since then or longer."""
        for address, kept in list(self._kept.items()):
            for each in kept:
                if each.since_s <= until_s:
                    each.connection.close()
            left = [each for each in kept if each.since_s > until_s]
            self._num_kept -= len(kept) - len(left)
            if left:
                self._kept[address] = left
            else:
                del self._kept[address]


class _Exchange:
    """One request and its answer on a connection."""

    def __init__(self, loop: asyncio.AbstractEventLoop, connection: socket.socket, pieces: list[memoryview]) -> None:
        self.answer: asyncio.Future[Answer] = loop.create_future()
        self._loop = loop
        self._connection = connection
        self._descriptor = connection.fileno()
        self._unsent = [piece for piece in pieces if len(piece)]
        self._parser = AnswerParser()
        self._is_writing = False
        """The event loop tells when the kernel has room."""

    @property
    def is_sent(self) -> bool:
        """The kernel has taken everything."""
        return not self._unsent

    def begin(self) -> None:
        self._loop.add_reader(self._descriptor, self._read)
        self._write()
        if self._unsent and not self.answer.done():
            self._is_writing = True
            self._loop.add_writer(self._descriptor, self._write)

    def end(self) -> None:
        """The connection is left alone from now on."""
        self._loop.remove_reader(self._descriptor)
        self._stop_writing()
        self.answer.cancel()

    def fail(self, error: Exception) -> None:
        if not self.answer.done():
            self.answer.set_exception(error)

    def _write(self) -> None:
        try:
            self._drop(self._connection.sendmsg(self._unsent[:_PARTS_MAX]))
        except (BlockingIOError, InterruptedError):
            return
        except OSError:
            # Whatever is there to be read says more: an answer that came before, or how the connection ended.
            self._stop_writing()
            return
        if not self._unsent:
            self._stop_writing()

    def _drop(self, num_bytes: int) -> None:
        """Of what is to be sent, the kernel has taken so many."""
        num_whole = 0
        for piece in self._unsent:
            if num_bytes < len(piece):
                break
            num_bytes -= len(piece)
            num_whole += 1
        del self._unsent[:num_whole]
        if num_bytes:
            self._unsent[0] = self._unsent[0][num_bytes:]

    def _stop_writing(self) -> None:
        if self._is_writing:
            self._is_writing = False
            self._loop.remove_writer(self._descriptor)

    def _read(self) -> None:
        try:
            data = self._connection.recv(_READ_BYTES)
            if not data:
                raise ConnectionResetError("the connection was closed before the answer had come")
            answer = self._parser.feed(data)
        except (BlockingIOError, InterruptedError):
            return
        except (OSError, TransportError) as error:
            self._loop.remove_reader(self._descriptor)
            self.fail(error)
            return
        if answer is not None:
            self._loop.remove_reader(self._descriptor)
            if not self.answer.done():
                self.answer.set_result(answer)


def _is_quiet(connection: socket.socket) -> bool:
    """Open, and nothing has come that nobody asked for."""
    with suppress(BlockingIOError):
        connection.recv(1, socket.MSG_PEEK)
        return False
    return True
