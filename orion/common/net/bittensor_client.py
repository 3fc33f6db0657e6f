"""One connection to a chain through the Bittensor SDK: deadlines, typed errors, reconnection.

Owns the SDK's client and nothing of what is asked. The SDK itself moves on to a fallback endpoint when one is lost and
asks again what was not answered; what it gives up on is a TransportError here, and the next question connects anew.
Nothing waits longer than its deadline. Invariant: no connection outlives the client's `close`. The SDK opens a
connection that was closed again when somebody still asks it, and leaves the socket of one whose closing is cut off; so
a connection is closed when the last question on it has ended, and that takes as long as the SDK's own time limit.
"""

import asyncio
import contextlib
import math
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final, TypeVar

import bittensor

from orion.common.errors import ConfigError, TransportError
from orion.common.net.chain import ChainError, ChainErrorCode
from orion.common.net.chain_faults import failure

ResultT = TypeVar("ResultT")

READ_TIMEOUT_S: Final = 30.0
"""For one question, connecting included. Fetching a runtime's metadata takes seconds on a slow line."""
WRITE_TIMEOUT_S: Final = 180.0
"""For a transaction to be included and final: about four blocks of twelve seconds, and as much again and again."""
_CLOSE_TIMEOUT_S: Final = 12.0
"""For a connection to be made or closed when all shall end. More than the ten seconds that the SDK itself gives a peer
which does not answer: to cut it off is to leave its socket open."""
_POLICY_WAIT_S: Final = 30.0
"""How long an endpoint that turns us away is left alone when it does not say."""
_POLICY_WAIT_S_MAX: Final = 600.0
_ERA_BLOCKS: Final = 64
"""How long a transaction may wait for inclusion; afterwards it can't come back as a surprise. A power of two."""


@dataclass(eq=False, slots=True)
class _Connection:
    """The SDK's client, and who uses it."""

    client: Any
    num_asking: int = 0
    is_dropped: bool = False
    """No further question is asked on it."""
    is_ended: bool = False


class BittensorClient:
    """A chain, reached when it is first asked. Not for several event loops."""

    def __init__(self, network: str, fallbacks: Sequence[str] = ()) -> None:
        """`network` is a name that the SDK knows (finney, test, local) or a ws(s):// URL. `fallbacks` are further
        endpoints of the same chain; without any, the SDK's own for its names. Raises ConfigError."""
        self.network = network
        self._fallbacks = list(fallbacks)
        self._connection: _Connection | None = None
        self._connecting: asyncio.Task[None] | None = None
        self._closing: set[asyncio.Task[None]] = set()
        self._is_closed = False
        self._not_before_s = -math.inf
        """Time of the event loop before which the endpoint wants no more questions."""
        self._new_client()  # a network that does not exist should fail at once

    async def __aenter__(self) -> "BittensorClient":
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def close(self) -> None:
        """Ends the connection; nothing is asked afterwards."""
        self._is_closed = True
        if self._connecting is not None:
            await asyncio.wait([self._connecting], timeout=_CLOSE_TIMEOUT_S)
        self._drop()
        if self._closing:
            await asyncio.wait(self._closing)

    def _drop(self) -> None:
        """The next question opens another connection."""
        connection, self._connection = self._connection, None
        if connection is not None:
            connection.is_dropped = True
            if self._is_closed or not connection.num_asking:
                self._end(connection)

    def _end(self, connection: _Connection) -> None:
        if connection.is_ended:
            return
        connection.is_ended = True
        task = asyncio.create_task(_closed(connection.client))
        self._closing.add(task)
        task.add_done_callback(self._closing.discard)

    async def ask(self, question: Callable[[Any], Awaitable[ResultT]], timeout_s: float = READ_TIMEOUT_S) -> ResultT:
        """What `question` gets from the SDK's client. Raises ChainError (UNSUPPORTED when this runtime lacks what is
        asked for) or TransportError."""
        self._check_welcome()
        try:
            async with asyncio.timeout(timeout_s):
                return await self._asked(await self._connected(), question)
        except bittensor.ChainError as error:
            raise self._translated(failure(error.name, error.code.value, error.message)) from error
        except TimeoutError as error:
            self._drop()
            raise TransportError(f"chain {self.network}: no answer within {timeout_s:g} s") from error
        except bittensor.RpcPolicyError as error:
            self._drop()
            wait_s = _policy_wait_s(error.retry_after)
            self._not_before_s = asyncio.get_running_loop().time() + wait_s
            raise TransportError(f"chain {self.network}: {error}; left alone for {wait_s:g} s") from error
        except (bittensor.RpcConnectionError, bittensor.ConnectionNotReady, OSError) as error:
            self._drop()
            raise TransportError(f"chain {self.network}: {error}") from error
        except bittensor.BittensorError as error:
            raise ChainError(ChainErrorCode.OTHER, str(error)) from error
        except ValueError as error:
            # How the SDK says that the chain's metadata has no such storage, call or runtime API.
            raise ChainError(ChainErrorCode.UNSUPPORTED, str(error)) from error

    async def _asked(self, connection: _Connection, question: Callable[[Any], Awaitable[ResultT]]) -> ResultT:
        connection.num_asking += 1
        try:
            return await question(connection.client)
        finally:
            connection.num_asking -= 1
            if connection.is_dropped and not connection.num_asking:
                self._end(connection)

    async def submit(self, act: Callable[[Any], Awaitable[Any]]) -> Any:
        """The SDK's result of a transaction that succeeded and is final. Raises as `ask`."""
        result = await self.ask(act, WRITE_TIMEOUT_S)
        if not result.success:
            error = result.error
            name, kind = (None, "unknown") if error is None else (error.name, error.code.value)
            raise self._translated(failure(name, kind, result.message))
        return result

    async def execute(self, intent: Any, keypair: Any) -> Any:
        """Carries out an SDK intent, signed by its hotkey or coldkey. Raises as `submit`."""
        return await self.submit(lambda client: client.execute(intent, keypair, period=_ERA_BLOCKS))

    async def call(self, call: Any, keypair: Any, signer: str) -> Any:
        """Signs and submits a raw call; `signer` is `hotkey` or `coldkey`. Raises as `submit`."""
        return await self.submit(lambda client: client.submit_call(call, keypair, signer=signer, period=_ERA_BLOCKS))

    def _translated(self, error: ChainError | TransportError) -> ChainError | TransportError:
        if isinstance(error, TransportError):
            self._drop()
        return error

    def _check_welcome(self) -> None:
        """Raises TransportError while the endpoint has asked to be left alone: asking on would prolong that."""
        wait_s = self._not_before_s - asyncio.get_running_loop().time()
        if wait_s > 0:
            raise TransportError(f"chain {self.network}: asked for patience, {wait_s:.0f} s more")

    async def _connected(self) -> _Connection:
        assert not self._is_closed, "nothing is asked of a client that was closed"
        while self._connection is None:
            if self._connecting is None:
                self._connecting = asyncio.create_task(self._connect())
                self._connecting.add_done_callback(self._connecting_ended)
            # Whoever asks may give up; the SDK leaks a connection that is cancelled while it is made, so it goes on,
            # for as long as the SDK's own time limit on a handshake.
            await asyncio.shield(self._connecting)
        return self._connection

    async def _connect(self) -> None:
        connection = _Connection(self._new_client())
        try:
            await connection.client.connect()
        except Exception:
            self._end(connection)  # what failed may have been a question after the handshake
            raise
        self._connection = connection

    def _connecting_ended(self, task: asyncio.Task[None]) -> None:
        self._connecting = None
        if self._is_closed:
            self._drop()  # it came too late
        if not task.cancelled():
            task.exception()  # was told to whoever still waits

    def _new_client(self) -> Any:
        try:
            return bittensor.Client(self.network, fallback_endpoints=self._fallbacks or None)
        except ValueError as error:
            raise ConfigError(f"--network {self.network}: {error}") from error


async def _closed(client: Any) -> None:
    with contextlib.suppress(OSError, TimeoutError, bittensor.BittensorError):
        async with asyncio.timeout(_CLOSE_TIMEOUT_S):
            await client.close()


def _policy_wait_s(retry_after: str | None) -> float:
    """What an endpoint asks for in `Retry-After`, as far as that is a number of seconds and not absurd."""
    try:
        asked_s = float(retry_after or "")
    except ValueError:
        return _POLICY_WAIT_S
    return min(max(asked_s, 1.0), _POLICY_WAIT_S_MAX) if math.isfinite(asked_s) else _POLICY_WAIT_S
