"""Three ways to bring activations to the receiving process: as a miner does it, over bare HTTP, over a bare socket.

Each sends a number of bodies, some at a time, each on its way until it is acknowledged, and says how long each took.
"""

import asyncio
import io
import itertools
import socket
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Protocol

import aiohttp

from orion.bench.transport.cargo import Cargo, sender_key
from orion.bench.transport.receiver import UPLOAD_ROUTE
from orion.common.clock import Clock
from orion.common.net.rpc import RpcClient
from orion.common.protocol.codec import encode
from orion.miner.cache import Parcel, Slot, TensorCache
from orion.miner.effects import SendTensor
from orion.miner.events import SendOutcome
from orion.miner.peer_client import PeerClient

_HOST = "127.0.0.1"


class Sender(Protocol):
    """One way. Close it in the end."""

    def send(self, count: int, in_flight: int) -> list[float]:
        """Seconds that each of `count` bodies took, `in_flight` at a time."""
        ...

    def close(self) -> None: ...


class SocketSender:
    """The bytes alone, on a connection for each that is on its way."""

    def __init__(self, cargo: Cargo, port: int, clock: Clock) -> None:
        self._bodies = [encode(tensors).tobytes() for tensors in cargo.activations]
        self._port = port
        self._clock = clock
        self._connections: list[socket.socket] = []

    def send(self, count: int, in_flight: int) -> list[float]:
        while len(self._connections) < in_flight:
            connection = socket.create_connection((_HOST, self._port))
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            self._connections.append(connection)
        if in_flight == 1:
            return self._send_on(self._connections[0], count)
        with ThreadPoolExecutor(in_flight) as threads:
            shares = threads.map(
                self._send_on, self._connections[:in_flight], itertools.repeat(count // in_flight, in_flight)
            )
            return list(itertools.chain.from_iterable(shares))

    def close(self) -> None:
        for connection in self._connections:
            connection.close()

    def _send_on(self, connection: socket.socket, count: int) -> list[float]:
        taken_s = []
        for number in range(count):
            began_s = self._clock.monotonic_s()
            connection.sendall(self._bodies[number % len(self._bodies)])
            if connection.recv(1) != b"+":
                raise ConnectionError("the receiver has gone")
            taken_s.append(self._clock.monotonic_s() - began_s)
        return taken_s


class _AsyncSender:
    """A way that has an event loop of its own."""

    def __init__(self, clock: Clock) -> None:
        self._runner = asyncio.Runner()
        self._clock = clock

    def send(self, count: int, in_flight: int) -> list[float]:
        return self._runner.run(self._send_all(count, in_flight))

    async def _send_all(self, count: int, in_flight: int) -> list[float]:
        taken_s: list[float] = []

        async def share() -> None:
            for _ in range(count // in_flight):
                began_s = self._clock.monotonic_s()
                await self._send_one()
                taken_s.append(self._clock.monotonic_s() - began_s)

        async with asyncio.TaskGroup() as tasks:
            for _ in range(in_flight):
                tasks.create_task(share())
        return taken_s

    async def _send_one(self) -> None:
        raise NotImplementedError

    def _close(self, close: Callable[[], Awaitable[None]]) -> None:
        async def closing() -> None:
            await close()

        self._runner.run(closing())
        self._runner.close()


class HttpSender(_AsyncSender):
    """The bytes in a POST that nobody signs or checks, by the same library at both ends."""

    def __init__(self, cargo: Cargo, port: int, clock: Clock) -> None:
        super().__init__(clock)
        self._bodies = itertools.cycle([encode(tensors).tobytes() for tensors in cargo.activations])
        self._url = f"http://{_HOST}:{port}{UPLOAD_ROUTE}"
        self._size = str(cargo.size_bytes)

        async def opened() -> aiohttp.ClientSession:
            return aiohttp.ClientSession()

        self._session = self._runner.run(opened())

    def close(self) -> None:
        self._close(self._session.close)

    async def _send_one(self) -> None:
        async with self._session.post(self._url, data=io.BytesIO(next(self._bodies))) as answer:
            if await answer.text() != self._size:
                raise ConnectionError(f"the receiver answered {answer.status}")


class OrionSender(_AsyncSender):
    """What a miner does with each of its device's outputs: encode, hash, describe, sign, send, read the answer."""

    def __init__(self, cargo: Cargo, port: int, clock: Clock) -> None:
        super().__init__(clock)
        self._cargo = cargo
        self._url = f"http://{_HOST}:{port}"
        self._numbers = itertools.count()
        self._cache = TensorCache(cargo.spec.flow.in_flight_max)

        async def opened() -> RpcClient:
            return RpcClient(sender_key(), cargo.spec.digest, clock)

        self._rpc = self._runner.run(opened())
        self._peers = PeerClient(cargo.spec, self._rpc, self._cache, clock)

    def close(self) -> None:
        self._close(self._rpc.close)

    async def _send_one(self) -> None:
        number = next(self._numbers)
        tensors = self._cargo.activations[number % len(self._cargo.activations)]
        body = encode(tensors)
        transfer = self._cargo.transfer(number, body, self._clock.now_s())
        self._cache.put(transfer.microbatch_id, Slot.ACTIVATION_OUT, Parcel(tensors, body))
        ended = await self._peers.send(SendTensor(self._cargo.receiver, self._url, transfer))
        self._cache.free(transfer.microbatch_id)
        if ended.outcome is not SendOutcome.ACCEPTED:
            raise ConnectionError(f"the receiver did not accept: {ended.outcome} {ended.code}")
