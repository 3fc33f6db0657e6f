"""Carries out a `PartPlan`: the shell that waits, for uploads and downloads alike.

Every attempt is a task; whatever way `run_parts` ends, none is left. A refusal ends the transfer at once, for whoever
asked to decide; only what may pass by itself (a lost connection, a busy server) is tried again.
"""

import asyncio
from collections.abc import Awaitable, Callable
from contextlib import AbstractAsyncContextManager

import structlog

from orion.common.clock import Clock
from orion.common.errors import TransportError
from orion.common.net.part_plan import Effect, PartPlan, SendPart
from orion.common.protocol.messages import RefusalCode
from orion.common.protocol.refusals import RefusedError

Move = Callable[[int], Awaitable[None]]
"""Moves the part of this index. Raises TransportError, RefusedError."""
Slots = AbstractAsyncContextManager[object]

_log = structlog.get_logger("orion.parts")


class _Run:
    """One plan on its way."""

    def __init__(self, plan: PartPlan, move: Move, clock: Clock, slots: Slots) -> None:
        self._plan = plan
        self._move = move
        self._clock = clock
        self._slots = slots
        self._tasks: dict[tuple[int, int], asyncio.Task[None]] = {}
        self._told: asyncio.Queue[tuple[SendPart, Exception | None] | None] = asyncio.Queue()
        """How an attempt ended; None: one has begun, so that the next look may be due earlier."""

    async def to_the_end(self) -> None:
        try:
            self._carry_out(self._plan.begin())
            while not self._plan.is_done:
                self._carry_out(await self._next())
        finally:
            for task in self._tasks.values():
                task.cancel()
            await asyncio.gather(*self._tasks.values(), return_exceptions=True)

    def _carry_out(self, effects: list[Effect]) -> None:
        for effect in effects:
            if isinstance(effect, SendPart):
                if effect.is_hedge:
                    _log.info("part_hedged", part=effect.index)
                self._tasks[effect.index, effect.attempt] = asyncio.create_task(self._attempt(effect))
            else:
                self._tasks[effect.index, effect.attempt].cancel()

    async def _next(self) -> list[Effect]:
        """What follows from what happens next: an attempt ends, begins, or has become slow."""
        plan, clock = self._plan, self._clock
        look_s = plan.next_look_s()
        try:
            async with asyncio.timeout(None if look_s is None else max(0.0, look_s - clock.monotonic_s())):
                told = await self._told.get()
        except TimeoutError:
            return plan.looked(clock.monotonic_s())
        if told is None:
            return []
        send, error = told
        if error is None:
            return plan.moved(send.index, send.attempt, clock.monotonic_s())
        if not isinstance(error, TransportError) and not _may_pass(error):
            raise error
        effects = plan.failed(send.index, send.attempt)
        if plan.has_failed:
            raise error
        _log.info("part_failed", part=send.index, error=str(error))
        return effects

    async def _attempt(self, send: SendPart) -> None:
        try:
            await asyncio.sleep(send.delay_s)
            if send.is_hedge:
                await self._begin(send)
            else:
                async with self._slots:
                    await self._begin(send)
        except Exception as error:  # noqa: BLE001 handed on, and raised unless it may pass
            self._told.put_nowait((send, error))
        else:
            self._told.put_nowait((send, None))

    async def _begin(self, send: SendPart) -> None:
        self._plan.started(send.index, send.attempt, self._clock.monotonic_s())
        self._told.put_nowait(None)
        await self._move(send.index)


async def run_parts(plan: PartPlan, move: Move, clock: Clock, slots: Slots) -> None:
    """Moves every part of the plan. First tries enter `slots` (a semaphore), which bounds how many transfers share the
    link; a second try needs none. Raises RefusedError, and TransportError when a part has failed too often."""
    await _Run(plan, move, clock, slots).to_the_end()


def _may_pass(error: Exception) -> bool:
    return isinstance(error, RefusedError) and error.code is RefusalCode.BUSY
