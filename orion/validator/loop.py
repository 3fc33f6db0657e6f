"""The one task that owns a ValidatorCore: hands it events, carries out what it decides, watches the feed.

Must not decide anything. Whatever is started here ends with `run`: nothing goes on in the background afterwards.
"""

import asyncio
import logging
from collections.abc import Coroutine
from types import MappingProxyType

import structlog

from orion.common.clock import Clock
from orion.common.errors import OrionError, TransportError
from orion.common.net.orchestrator_client import OrchestratorClient
from orion.common.protocol.messages import RefusalCode
from orion.common.protocol.refusals import RefusedError
from orion.validator.config import ValidatorConfig
from orion.validator.core import ValidatorCore
from orion.validator.events import Effect, Event, FeedArrived, Notice, Ticked
from orion.validator.hands import Hands

EVENTS_MAX = 256
"""Events that wait for the core; whoever brings more waits."""

FEED_PAUSE_S = 1.0
"""Before the feed is asked for again after a failure."""

_LAST_FEED_S = 5.0
"""How long the orchestrator may hold the feed once the run is finished and nothing changes any more."""

_LEVELS = MappingProxyType({"info": logging.INFO, "warning": logging.WARNING})

_log = structlog.get_logger("orion.validator")


class ValidatorLoop:
    """Runs one core until it is done, or for ever."""

    def __init__(
        self,
        core: ValidatorCore,
        hands: Hands,
        orchestrator: OrchestratorClient,
        clock: Clock,
        config: ValidatorConfig,
    ) -> None:
        self._core = core
        self._hands = hands
        self._orchestrator = orchestrator
        self._clock = clock
        self._config = config
        self._events: asyncio.Queue[Event] = asyncio.Queue(EVENTS_MAX)
        self._running: set[asyncio.Task[None]] = set()

    async def run(self) -> None:
        """Returns once the run is finished and its last weights are set, unless the config says to follow.

        Raises TransportError or RefusedError when there was no feed for `silence_s_max`.
        """
        try:
            async with asyncio.TaskGroup() as tasks:
                self._start(tasks, self._watch_feed())
                self._start(tasks, self._tick())
                while self._config.follow or not self._core.is_done:
                    event = await self._events.get()
                    for effect in self._core.handle(event, self._clock.monotonic_s()):
                        if isinstance(effect, Notice):
                            _log.log(_LEVELS[effect.level], effect.event, **effect.fields)
                        else:
                            self._start(tasks, self._carry_out(effect))
                for task in self._running:
                    task.cancel()
        except ExceptionGroup as group:
            silence = next((error for error in group.exceptions if isinstance(error, OrionError)), None)
            if silence is None:
                raise
            raise silence from None

    def _start(self, tasks: asyncio.TaskGroup, work: Coroutine[None, None, None]) -> None:
        task = tasks.create_task(work)
        self._running.add(task)
        task.add_done_callback(self._running.discard)

    async def _carry_out(self, effect: Effect) -> None:
        event = await self._hands.carry_out(effect)
        if event is not None:
            await self._events.put(event)

    async def _tick(self) -> None:
        while True:
            await asyncio.sleep(self._config.tick_s)
            await self._events.put(Ticked())

    async def _watch_feed(self) -> None:
        version, finished = 0, False
        heard_s = self._clock.monotonic_s()
        while True:
            wait_s = min(_LAST_FEED_S, self._config.feed_wait_s) if finished else self._config.feed_wait_s
            try:
                feed = await self._orchestrator.feed(version, wait_s)
            except (TransportError, RefusedError) as error:
                if self._clock.monotonic_s() - heard_s > self._config.silence_s_max:
                    raise
                if isinstance(error, RefusedError) and error.code is RefusalCode.RUN_MISMATCH:
                    raise
                _log.warning("feed_failed", detail=str(error))
                await asyncio.sleep(FEED_PAUSE_S)
                continue
            heard_s = self._clock.monotonic_s()
            version, finished = feed.version, feed.finished
            await self._events.put(FeedArrived(feed))
