"""Where events wait for the core, and requests for their answers.

Owns the queue and who waits for what; decides nothing. Invariants: the queue is bounded, and a request that finds it
full is refused at once; each request that waits hears exactly once, or is gone itself.
"""

import asyncio
import itertools

from orion.common.protocol.messages import (
    Refusal,
    RefusalCode,
)
from orion.miner.effects import Accept, AnswerHolds, ReadBody, Refuse
from orion.miner.events import BackwardOffered, BodyEnded, Event, ForwardOffered, HoldsAsked

EVENTS_MAX = 4096
BUSY_RETRY_S = 0.5

Answer = ReadBody | Accept | Refuse | AnswerHolds
Asked = ForwardOffered | BackwardOffered | BodyEnded | HoldsAsked


class Desk:
    """Between those who bring events and the one task that owns the core."""

    def __init__(self) -> None:
        self._events: asyncio.Queue[Event] = asyncio.Queue(EVENTS_MAX)
        self._waiting: dict[int, asyncio.Future[Answer]] = {}
        self._request_ids = itertools.count()

    def new_request_id(self) -> int:
        """An id that no other request of this process has."""
        return next(self._request_ids)

    async def next_event(self, timeout_s: float) -> Event | None:
        """The next event, None when none came in time."""
        try:
            async with asyncio.timeout(timeout_s):
                return await self._events.get()
        except TimeoutError:
            return None

    async def post(self, event: Event) -> None:
        """Brings an event; waits while the queue is full."""
        await self._events.put(event)

    async def ask(self, event: Asked) -> Answer:
        """Brings an event that is answered, and gives the answer."""
        if isinstance(event, ForwardOffered | BackwardOffered | HoldsAsked) and self._events.full():
            message = "too many events wait"
            return Refuse(
                event.request_id,
                Refusal(code=RefusalCode.BUSY, message=message, retry_after_s=BUSY_RETRY_S),
            )
        future: asyncio.Future[Answer] = asyncio.get_running_loop().create_future()
        self._waiting[event.request_id] = future
        try:
            await self._events.put(event)
            return await future
        finally:
            if self._waiting.get(event.request_id) is future:
                del self._waiting[event.request_id]

    def answer(self, answer: Answer) -> None:
        """Hands the core's answer to the request that waits for it, if it still does."""
        future = self._waiting.pop(answer.request_id, None)
        if future is not None and not future.done():
            future.set_result(answer)
