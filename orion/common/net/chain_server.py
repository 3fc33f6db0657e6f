"""The chain stand-in for several processes: a small HTTP server over a `ChainLedger`, and its client.

Blocks pass with the clock. Requests are signed as all others; the signer is who acts. An answer that carries a fault
is the chain's word on an extrinsic that it received, not an error of the request, as with a real chain's results.
"""

from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from typing import Annotated, Final

from aiohttp import web
from pydantic import Field

from orion.common.clock import Clock
from orion.common.errors import TransportError
from orion.common.ids import SPEC_VERSION, Hotkey
from orion.common.net.aiohttp_server import build_app, json_answer, serve, signed_json
from orion.common.net.chain import (
    ChainError,
    ChainFault,
    Hyperparameters,
    Metagraph,
    WeightsCommit,
    WeightsReceipt,
    axon_of,
    check_weights,
    shares_of,
)
from orion.common.net.gate import Gate
from orion.common.net.memory_chain import ChainLedger
from orion.common.net.rpc import RpcClient
from orion.common.protocol import routes
from orion.common.protocol.fields import Count, Ss58, Text
from orion.common.protocol.messages import (
    Done,
    Message,
)
from orion.common.protocol.signing import Verifier

CHAIN_HOTKEY: Final = Hotkey("5GLFMhHBR5r16mnX45kJF4YLDnP7SDFpA4bq3FfE2toSCzvv")
"""Whom requests to the stand-in are signed for (`//orion/chain`). Nothing is signed with it: it need not be secret."""

REQUEST_TIMEOUT_S = 10.0
WEIGHTS_MAX = 65_536

_METAGRAPH = "/v1/chain/metagraph"
_HYPERPARAMETERS = "/v1/chain/hyperparameters"
_REGISTER = "/v1/chain/register"
_WEIGHTS = "/v1/chain/weights"
_WEIGHTS_OF = "/v1/chain/weights-of"
_AXON = "/v1/chain/axon"


class _Read(Message):
    """Asks for what the route says."""

    kind: str = "read"


class _Register(Message):
    hotkey: Ss58


class _WeightsQuery(Message):
    hotkey: Ss58


class _Weight(Message):
    uid: int
    weight: Annotated[float, Field(allow_inf_nan=False)]


class _SetWeights(Message):
    weights: Annotated[tuple[_Weight, ...], Field(max_length=WEIGHTS_MAX)]
    version_key: Count


class _WeightShares(Message):
    """Shares of 1, or why there are none."""

    fault: ChainFault | None
    weights: Annotated[tuple[_Weight, ...], Field(max_length=WEIGHTS_MAX)] = ()


class _ServeAxon(Message):
    url: Text


class _Result(Message):
    """What became of an extrinsic."""

    fault: ChainFault | None
    uid: Count | None = None
    """Of whom it registered."""


class ChainServer:
    """The handlers, and the clock that lets blocks pass."""

    def __init__(self, ledger: ChainLedger, clock: Clock) -> None:
        self._ledger = ledger
        self._clock = clock
        self._started_s = clock.monotonic_s()
        self._first_block = ledger.block

    def app(self) -> web.Application:
        """The application to serve."""
        app = build_app(Gate(Verifier(CHAIN_HOTKEY), None, self._clock))
        app.router.add_post(_METAGRAPH, self._metagraph)
        app.router.add_post(_HYPERPARAMETERS, self._hyperparameters)
        app.router.add_post(_REGISTER, self._register)
        app.router.add_post(_WEIGHTS, self._set_weights)
        app.router.add_post(_WEIGHTS_OF, self._weights_of)
        app.router.add_post(_AXON, self._serve_axon)
        app.router.add_get(routes.HEALTH, self._health)
        return app

    def _now(self) -> ChainLedger:
        """The ledger at the present block."""
        elapsed_s = self._clock.monotonic_s() - self._started_s
        self._ledger.advance_to(self._first_block + int(elapsed_s / self._ledger.hyperparameters.block_s))
        return self._ledger

    async def _health(self, _: web.Request) -> web.Response:
        return json_answer(Done())

    async def _metagraph(self, request: web.Request) -> web.Response:
        await signed_json(request, _Read)
        return json_answer(self._now().metagraph())

    async def _hyperparameters(self, request: web.Request) -> web.Response:
        await signed_json(request, _Read)
        return json_answer(self._now().hyperparameters)

    async def _register(self, request: web.Request) -> web.Response:
        _, message = await signed_json(request, _Register)
        try:
            return json_answer(_Result(fault=None, uid=self._now().register(message.hotkey)))
        except ChainError as error:
            return json_answer(_Result(fault=error.fault))

    async def _set_weights(self, request: web.Request) -> web.Response:
        hotkey, message = await signed_json(request, _SetWeights)
        weights = {item.uid: item.weight for item in message.weights}
        try:
            self._now().set_weights(hotkey, weights, message.version_key)
        except ChainError as error:
            return json_answer(_Result(fault=error.fault))
        return json_answer(_Result(fault=None))

    async def _weights_of(self, request: web.Request) -> web.Response:
        _, query = await signed_json(request, _WeightsQuery)
        try:
            shares = shares_of(self._now().weights_of(query.hotkey))
        except ChainError as error:
            return json_answer(_WeightShares(fault=error.fault))
        weights = tuple(_Weight(uid=uid, weight=share) for uid, share in shares.items())
        return json_answer(_WeightShares(fault=None, weights=weights))

    async def _serve_axon(self, request: web.Request) -> web.Response:
        hotkey, message = await signed_json(request, _ServeAxon)
        try:
            self._now().serve_axon(hotkey, message.url)
        except ChainError as error:
            return json_answer(_Result(fault=error.fault))
        return json_answer(_Result(fault=None))


@asynccontextmanager
async def serve_chain(host: str, port: int, ledger: ChainLedger, clock: Clock) -> AsyncIterator[int]:
    """Runs the stand-in until the block is left; gives its port. A block takes the ledger's `block_s`."""
    async with serve(ChainServer(ledger, clock).app(), host, port) as bound_port:
        yield bound_port


class HttpChain:
    """The stand-in, from another process. Acts as the client's own hotkey only."""

    def __init__(self, rpc: RpcClient, base_url: str) -> None:
        """`rpc` without a run digest."""
        self._rpc = rpc
        self._base_url = base_url

    async def block(self) -> int:
        return (await self.metagraph()).block

    async def metagraph(self) -> Metagraph:
        return await self._rpc.call(
            self._base_url, CHAIN_HOTKEY, _METAGRAPH, _Read(), Metagraph, timeout_s=REQUEST_TIMEOUT_S
        )

    async def hyperparameters(self) -> Hyperparameters:
        return await self._rpc.call(
            self._base_url, CHAIN_HOTKEY, _HYPERPARAMETERS, _Read(), Hyperparameters, timeout_s=REQUEST_TIMEOUT_S
        )

    async def register(self, hotkey: Hotkey) -> int:
        result = await self._submit(_REGISTER, _Register(hotkey=hotkey))
        if result.uid is None:
            raise TransportError(f"{_REGISTER}: the answer names no uid")
        return result.uid

    async def blocks_to_epoch(self) -> int | None:
        tempo = (await self.hyperparameters()).tempo
        return tempo - await self.block() % tempo

    async def commits_of(self, hotkey: Hotkey) -> tuple[WeightsCommit, ...]:
        return ()

    async def set_weights(self, weights: Mapping[int, float]) -> WeightsReceipt:
        check_weights(weights)
        entries = tuple(_Weight(uid=uid, weight=weight) for uid, weight in weights.items())
        await self._submit(_WEIGHTS, _SetWeights(weights=entries, version_key=SPEC_VERSION))
        return WeightsReceipt(block=await self.block(), is_timelocked=False)

    async def weights_of(self, hotkey: Hotkey) -> dict[int, float]:
        answer = await self._rpc.call(
            self._base_url,
            CHAIN_HOTKEY,
            _WEIGHTS_OF,
            _WeightsQuery(hotkey=hotkey),
            _WeightShares,
            timeout_s=REQUEST_TIMEOUT_S,
        )
        if answer.fault is not None:
            raise ChainError(answer.fault.code, answer.fault.message, answer.fault.retry_after_blocks)
        return {item.uid: item.weight for item in answer.weights}

    async def serve_axon(self, url: str) -> None:
        axon_of(url)
        await self._submit(_AXON, _ServeAxon(url=url))

    async def _submit(self, route: str, message: Message) -> _Result:
        result = await self._rpc.call(
            self._base_url, CHAIN_HOTKEY, route, message, _Result, timeout_s=REQUEST_TIMEOUT_S
        )
        if result.fault is not None:
            raise ChainError(result.fault.code, result.fault.message, result.fault.retry_after_blocks)
        return result
