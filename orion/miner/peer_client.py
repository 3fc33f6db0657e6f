"""What goes to other miners: tensors and cancels.

Owns what each failure of a send means as an event. Whom to ask and how often is the core's business. What it sends with
is given to it, so that it needs no event loop of its own.
"""

from typing import Protocol, TypeVar

from orion.common.clock import Clock
from orion.common.config import RunSpec
from orion.common.errors import TransportError
from orion.common.ids import Direction, Hotkey, MicrobatchId
from orion.common.protocol import routes
from orion.common.protocol.codec import Body
from orion.common.protocol.messages import (
    Accepted,
    Cancel,
    Done,
    Holds,
    HoldsQuery,
    Refusal,
    RefusalCode,
    Transfer,
)
from orion.common.protocol.refusals import RefusedError
from orion.miner.cache import OUTGOING, TensorCache
from orion.miner.effects import AskHolds, SendCancel, SendTensor
from orion.miner.events import HoldsEnded, SendEnded, SendOutcome

SEND_GRACE_S = 5.0
"""What a peer may take to answer, beyond moving the bytes: it decides in memory, so this covers a loaded machine."""
CANCEL_TIMEOUT_S = 5.0
CANCEL_ATTEMPTS = 2

ROUTES = {Direction.ACTIVATION: routes.FORWARD, Direction.GRADIENT: routes.BACKWARD}


AnswerT = TypeVar("AnswerT", Done, Holds)


class Peers(Protocol):
    """How other miners are asked (`RpcClient`)."""

    async def send_tensor(
        self, base_url: str, receiver: Hotkey, route: str, transfer: Transfer, body: Body, *, timeout_s: float
    ) -> Accepted: ...

    async def call(
        self,
        base_url: str,
        receiver: Hotkey,
        route: str,
        message: Cancel | HoldsQuery,
        answer_type: type[AnswerT],
        *,
        timeout_s: float,
    ) -> AnswerT: ...


class PeerClient:
    """Sends for one miner."""

    def __init__(self, spec: RunSpec, peers: Peers, cache: TensorCache, clock: Clock) -> None:
        self._floor_bytes_per_s = spec.time_limits.bandwidth_floor_bytes_per_s
        self._peers = peers
        self._cache = cache
        self._clock = clock

    async def send(self, effect: SendTensor) -> SendEnded:
        """Offers a tensor to a peer, once."""
        transfer = effect.transfer
        parcel = self._cache.get(transfer.microbatch_id, OUTGOING[transfer.direction])
        if parcel is None:
            # Freed since the core decided to send it; whatever the answer would be, nobody waits for it.
            return self._ended(effect, SendOutcome.REFUSED, 0.0, code=RefusalCode.NOT_FOUND)
        began_s = self._clock.monotonic_s()
        timeout_s = SEND_GRACE_S + transfer.size_bytes / self._floor_bytes_per_s
        try:
            accepted = await self._peers.send_tensor(
                effect.url, effect.peer, ROUTES[transfer.direction], transfer, parcel.body, timeout_s=timeout_s
            )
        except TransportError:
            return self._ended(effect, SendOutcome.UNREACHABLE, self._clock.monotonic_s() - began_s)
        except RefusedError as error:
            outcome = SendOutcome.BUSY if error.code is RefusalCode.BUSY else SendOutcome.REFUSED
            seconds = self._clock.monotonic_s() - began_s
            return self._ended(effect, outcome, seconds, refusal=error.refusal)
        seconds = self._clock.monotonic_s() - began_s
        return self._ended(effect, SendOutcome.ACCEPTED, seconds, accepted=accepted)

    async def ask_holds(self, effect: AskHolds) -> HoldsEnded:
        """Asks a peer what it holds, once."""
        began_s = self._clock.monotonic_s()
        outcome = SendOutcome.ACCEPTED
        held: tuple[MicrobatchId, ...] = ()
        try:
            holds = await self._peers.call(
                effect.url, effect.peer, routes.HOLDS, effect.query, Holds, timeout_s=effect.limit_s
            )
            held = holds.microbatch_ids
        except TransportError:
            outcome = SendOutcome.UNREACHABLE
        except RefusedError:
            outcome = SendOutcome.REFUSED
        return HoldsEnded(effect.peer, effect.query, outcome, self._clock.monotonic_s() - began_s, held)

    async def cancel(self, effect: SendCancel) -> bool:
        """Tells a peer, twice if need be; whether it heard."""
        for _ in range(CANCEL_ATTEMPTS):
            try:
                await self._peers.call(
                    effect.url, effect.peer, routes.CANCEL, effect.cancel, Done, timeout_s=CANCEL_TIMEOUT_S
                )
            except TransportError:
                continue
            except RefusedError:
                return False
            return True
        return False

    @staticmethod
    def _ended(
        effect: SendTensor,
        outcome: SendOutcome,
        seconds: float,
        *,
        code: RefusalCode | None = None,
        accepted: Accepted | None = None,
        refusal: Refusal | None = None,
    ) -> SendEnded:
        queued = credits = None
        if accepted is not None:
            queued, credits = accepted.queued, accepted.credits
        elif refusal is not None and refusal.queued is not None:
            queued, credits = refusal.queued, 0
        return SendEnded(
            microbatch_id=effect.transfer.microbatch_id,
            direction=effect.transfer.direction,
            peer=effect.peer,
            outcome=outcome,
            seconds=seconds,
            code=code if refusal is None else refusal.code,
            retry_after_s=None if refusal is None else refusal.retry_after_s,
            queued=queued,
            credits=credits,
            adopted=accepted is not None and accepted.adopted,
        )
