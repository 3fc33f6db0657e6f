"""The websocket server around the chain: the only part that waits.

Owns connections, subscriptions, the beat of blocks, and that a block is in the file before anybody hears of it. Must
not hold rules of the chain. Invariants: all access to the chain is from the one event loop; a subscriber that doesn't
read is cut off, never waited for; memory for one connection is bounded.
"""

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from secrets import token_bytes
from typing import Any

import structlog
from websockets.asyncio.server import Server, ServerConnection, serve
from websockets.exceptions import ConnectionClosed

from orion.common.clock import Clock
from orion.common.errors import ConfigError
from orion.devnet.chain import DevChain, Sealed
from orion.devnet.config import DevnetConfig
from orion.devnet.persistence import ChainFile
from orion.devnet.rpc import INTERNAL_ERROR, INVALID_REQUEST, PARSE_ERROR, RpcError, answer, hexadecimal, submit

REQUEST_BYTES_MAX = 8 << 20
BATCH_MAX = 10_000
"""Requests in one message."""
QUEUE_MAX = 10_000
"""Messages that wait to be sent to one connection; who lets more wait is cut off."""
SUBSCRIPTIONS_MAX = 1024
"""Of one connection."""

_HEADS = {
    "chain_subscribeNewHeads": "chain_newHead",
    "chain_subscribeNewHead": "chain_newHead",
    "subscribe_newHead": "chain_newHead",
    "chain_subscribeAllHeads": "chain_allHead",
    "chain_subscribeFinalizedHeads": "chain_finalizedHead",
    "chain_subscribeFinalisedHeads": "chain_finalizedHead",
}
"""Subscription to the name of its messages."""
_WATCH = "author_submitAndWatchExtrinsic"
_END = {name.replace("subscribe", "unsubscribe", 1) for name in _HEADS} | {"author_unwatchExtrinsic"}

_log = structlog.get_logger()


@dataclass(eq=False)
class _Peer:
    """One connection and what it listens to."""

    connection: ServerConnection
    outbox: "asyncio.Queue[str]" = field(default_factory=lambda: asyncio.Queue(QUEUE_MAX))
    heads: dict[str, str] = field(default_factory=dict)
    """Subscription to the name of its messages."""
    watched: dict[str, bytes] = field(default_factory=dict)
    """Subscription to the hash of the extrinsic that it follows."""
    greetings: list[tuple[str, str, object]] = field(default_factory=list)
    """First messages of new subscriptions; they follow the answer that names the subscription, before anything else."""
    is_cut_off: bool = False

    def send(self, message: object) -> None:
        """Hands a message over; a peer that doesn't read its messages is marked to be cut off."""
        try:
            self.outbox.put_nowait(json.dumps(message))
        except asyncio.QueueFull:
            self.is_cut_off = True
            self.connection.transport.abort()

    def notify(self, name: str, subscription: str, result: object) -> None:
        self.send({"jsonrpc": "2.0", "method": name, "params": {"subscription": subscription, "result": result}})


class DevnetServer:
    """Serves one chain until it is closed."""

    def __init__(self, chain: DevChain, file: ChainFile | None, clock: Clock) -> None:
        """`file`: where each block is kept; None = nowhere."""
        self.chain = chain
        self._file = file
        self._clock = clock
        self._peers: set[_Peer] = set()
        self._ids = count(1)

    def produce_block(self) -> Sealed:
        """Makes a block now, keeps it, and tells all who listen. The beat calls this; so may tests."""
        sealed = self.chain.produce_block(int(self._clock.now_s() * 1000))
        if self._file is not None:
            self._file.append(sealed, self.chain.state.first)
        for peer in self._peers:
            self._tell(peer, sealed)
        return sealed

    async def beat(self) -> None:
        """Makes a block every block time, for ever."""
        block_s = self.chain.config.block_ms / 1000
        due_s = self._clock.monotonic_s()
        while True:
            due_s += block_s
            await asyncio.sleep(max(0.0, due_s - self._clock.monotonic_s()))
            self.produce_block()
            # A machine that was asleep doesn't make up for the blocks it missed.
            due_s = max(due_s, self._clock.monotonic_s() - block_s)

    async def handle(self, connection: ServerConnection) -> None:
        """Serves one connection."""
        peer = _Peer(connection)
        self._peers.add(peer)
        sender = asyncio.create_task(_send_all(peer))
        try:
            async for message in connection:
                self._receive(peer, message)
        except ConnectionClosed as closed:
            _log.debug("devnet_connection_lost", reason=str(closed))
        finally:
            self._peers.discard(peer)
            sender.cancel()
            # The sender ends with an error of its own when the connection is gone; that is known here already.
            await asyncio.gather(sender, return_exceptions=True)
            if peer.is_cut_off:
                _log.warning("devnet_peer_cut_off", reason=f"{QUEUE_MAX} messages waited for it")

    def _receive(self, peer: _Peer, message: str | bytes) -> None:
        self._reply(peer, message)
        for greeting in peer.greetings:
            peer.notify(*greeting)
        peer.greetings.clear()

    def _reply(self, peer: _Peer, message: str | bytes) -> None:
        try:
            request = json.loads(message)
        except ValueError as error:
            peer.send(_failure(None, RpcError(PARSE_ERROR, f"Parse error: {error}")))
            return
        if not isinstance(request, list):
            peer.send(self._respond(peer, request))
        elif 0 < len(request) <= BATCH_MAX:
            peer.send([self._respond(peer, each) for each in request])
        else:
            peer.send(_failure(None, RpcError(INVALID_REQUEST, f"A batch has 1 to {BATCH_MAX} requests")))

    def _respond(self, peer: _Peer, request: Any) -> dict[str, object]:
        if not isinstance(request, dict) or not isinstance(request.get("method"), str):
            return _failure(None, RpcError(INVALID_REQUEST, "Invalid request: no method"))
        request_id = request.get("id")
        params = request.get("params") or []
        try:
            if not isinstance(params, list):
                raise RpcError(INVALID_REQUEST, "Invalid request: params must be a list")
            return {"jsonrpc": "2.0", "id": request_id, "result": self._answer(peer, request["method"], params)}
        except RpcError as error:
            return _failure(request_id, error)
        except Exception as error:  # noqa: BLE001 - a fault of this chain while it reads: said to both sides
            _log.exception("devnet_request_failed", method=request["method"])
            return _failure(request_id, RpcError(INTERNAL_ERROR, f"Internal error: {type(error).__name__}: {error}"))

    def _answer(self, peer: _Peer, method: str, params: list[Any]) -> object:
        if method in _HEADS:
            subscription = self._subscription(peer)
            peer.heads[subscription] = _HEADS[method]
            peer.greetings.append((_HEADS[method], subscription, self.chain.head.header()))
            return subscription
        if method == _WATCH:
            subscription = self._subscription(peer)
            peer.watched[subscription] = submit(self.chain, *params[:1])
            peer.greetings.append(("author_extrinsicUpdate", subscription, "ready"))
            return subscription
        if method in _END:
            key = str(params[0]) if params else ""
            return peer.heads.pop(key, None) is not None or peer.watched.pop(key, None) is not None
        return answer(self.chain, method, params)

    def _subscription(self, peer: _Peer) -> str:
        if len(peer.heads) + len(peer.watched) >= SUBSCRIPTIONS_MAX:
            raise RpcError(INVALID_REQUEST, f"Too many subscriptions: at most {SUBSCRIPTIONS_MAX} a connection")
        return f"devnet-{next(self._ids)}"

    def _tell(self, peer: _Peer, sealed: Sealed) -> None:
        for subscription, name in peer.heads.items():
            peer.notify(name, subscription, sealed.block.header())
        block_hash = hexadecimal(self.chain.blocks.head_hash)
        included, dropped = set(sealed.included), set(sealed.dropped)
        for subscription, extrinsic in list(peer.watched.items()):
            if extrinsic in included:
                peer.notify("author_extrinsicUpdate", subscription, {"inBlock": block_hash})
                peer.notify("author_extrinsicUpdate", subscription, {"finalized": block_hash})
                del peer.watched[subscription]
            elif extrinsic in dropped:
                peer.notify("author_extrinsicUpdate", subscription, {"invalid": None})
                del peer.watched[subscription]


async def _send_all(peer: _Peer) -> None:
    while True:
        await peer.connection.send(await peer.outbox.get())


def _failure(request_id: object, error: RpcError) -> dict[str, object]:
    return {"jsonrpc": "2.0", "id": request_id, "error": error.as_json()}


@dataclass(frozen=True)
class RunningDevnet:
    """A development chain that serves."""

    url: str
    """ws://HOST:PORT"""
    server: DevnetServer
    beat: "asyncio.Task[None]"
    """Makes the blocks; await it to serve until cancelled, and to hear of its failure."""


@asynccontextmanager
async def serve_devnet(
    host: str,
    port: int,
    config: DevnetConfig,
    clock: Clock,
    *,
    state_file: Path | None = None,
    new_seed: Callable[[int], bytes] = token_bytes,
) -> AsyncIterator[RunningDevnet]:
    """Serves a chain, new or kept in `state_file`, with a block every `config.block_ms`. Port 0 takes a free one.

    `new_seed` gives the bytes that tell a new chain from all others. Raises ConfigError when the port is taken or the
    file is of a chain with another block time, DataError when the file can't be used.
    """
    file = None if state_file is None else ChainFile(state_file)
    try:
        chain = None if file is None else file.load(config)
        if chain is None:
            chain, genesis = DevChain.begin(config, new_seed(32), int(clock.now_s() * 1000))
            if file is not None:
                file.create(config, genesis)
        server = DevnetServer(chain, file, clock)
        listener = await _listen(server, host, port)
        async with listener:
            bound_port = listener.sockets[0].getsockname()[1]
            beat = asyncio.create_task(server.beat())
            try:
                yield RunningDevnet(f"ws://{host}:{bound_port}", server, beat)
            finally:
                beat.cancel()
                await asyncio.wait([beat])
            if not beat.cancelled():
                await beat
    finally:
        if file is not None:
            file.close()


async def _listen(server: DevnetServer, host: str, port: int) -> Server:
    try:
        return await serve(server.handle, host, port, max_size=REQUEST_BYTES_MAX, compression=None)
    except OSError as error:
        raise ConfigError(f"can't listen on {host}:{port}: {error}; choose another --port") from error
