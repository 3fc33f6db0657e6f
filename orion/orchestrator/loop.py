"""The one task that owns the core: events in, journal, core, effects out.

Owns all waiting around the core: the queue of events, the tick, snapshots, the store's answers, who waits for a reply
or for a new feed, and on which connection. Decides nothing. Invariants: an event is durable before any of its effects
leaves; events are handled in the order of the journal; the queue is bounded, and a request that finds it full is
refused with BUSY.
"""

import asyncio
import itertools
from collections.abc import Hashable
from concurrent.futures import ThreadPoolExecutor
from typing import Final

import structlog

from orion.common.clock import Clock
from orion.common.errors import TransportError
from orion.common.ids import Hotkey
from orion.common.net.store import ObjectStore
from orion.common.protocol.entries import Proof
from orion.common.protocol.messages import (
    ObjectRef,
    RefusalCode,
)
from orion.common.protocol.refusals import RefusedError, refused
from orion.orchestrator.connections import FeedConnections
from orion.orchestrator.core import OrchestratorCore
from orion.orchestrator.events import (
    Announce,
    Answer,
    CheckObject,
    ConnectionLost,
    ConnectionSeen,
    DeleteObjects,
    Effect,
    Event,
    ObjectChecked,
    Recorded,
    Refuse,
    Request,
    RequestArrived,
    Response,
    Resumed,
    Ticked,
)
from orion.orchestrator.journal import Journal, Record, Snapshot
from orion.orchestrator.ledger_store import LedgerStore
from orion.orchestrator.metrics import LoopMetrics
from orion.orchestrator.replay import Watcher, replay

BATCH_MAX: Final = 512
"""Events in one commit: enough to make the sync cheap, few enough to answer soon."""
_CHECKS_AT_ONCE = 8
_CHECKS_MAX = 4_096
"""Looks at objects that may wait; a lost one is asked for again by the core."""
_DELETIONS_MAX = 4_096
_DELETE_AGAIN_S = 5.0
"""After the store could not be reached; what a crash cuts off is deleted at the next start."""
_RETRY_S = 1.0

_log = structlog.get_logger(__name__)


class OrchestratorLoop:
    """Runs one core on one journal."""

    def __init__(
        self,
        core: OrchestratorCore,
        journal: Journal,
        ledger: LedgerStore,
        store: ObjectStore,
        clock: Clock,
        *,
        metrics: LoopMetrics,
        tick_s: float,
        queue_max: int,
        snapshot_events: int,
        watcher: Watcher | None = None,
    ) -> None:
        """Replays the journal into the core, which must be new, and gives the ledger what it lacks. Blocks while it
        does. Make it in a running loop. Every `snapshot_events` events the journal gets a snapshot."""
        self.core = core
        self._journal = journal
        self._ledger = ledger
        self._recorded: list[Recorded] = []
        self._store = store
        self._clock = clock
        self._metrics = metrics
        self._tick_s = tick_s
        self._queue: asyncio.Queue[Event] = asyncio.Queue(queue_max)
        self._checks: asyncio.Queue[ObjectRef] = asyncio.Queue(_CHECKS_MAX)
        self._deletions: asyncio.Queue[str] = asyncio.Queue(_DELETIONS_MAX)
        self._waiting: dict[int, asyncio.Future[Response]] = {}
        self._request_ids = itertools.count()
        self._changed = asyncio.Event()
        self._connections = FeedConnections()
        self._is_closed = False
        self._watcher = watcher
        self._snapshot_events = snapshot_events
        replayed = replay(core, journal, ledger, watcher)
        self._next_sequence, self._now_s = replayed.next_sequence, replayed.now_s
        self._since_snapshot = replayed.num_events
        self._seen_notices = core.num_notices
        self.is_resumed = self._next_sequence > 0
        """Whether an earlier process has written to the journal."""
        if self.is_resumed:
            self._queue.put_nowait(Resumed())  # before anything else can be looked at with old deadlines

    @property
    def num_queued(self) -> int:
        """Events that wait to be decided."""
        return self._queue.qsize()

    async def run(self) -> None:
        """Works until it is cancelled. Raises what goes wrong: then the process must end."""
        # A thread of its own: commits come one after the other, also the last one, before the journal is closed.
        executor = ThreadPoolExecutor(max_workers=1, thread_name_prefix="journal")
        try:
            async with asyncio.TaskGroup() as group:
                group.create_task(self._decide(executor))
                group.create_task(self._tick())
                group.create_task(self._delete_objects())
                for _ in range(_CHECKS_AT_ONCE):
                    group.create_task(self._check_objects())
        finally:
            self._close()
            executor.shutdown(wait=True)

    async def ask(self, hotkey: Hotkey, message: Request, proof: Proof | None = None) -> Response:
        """Has the core decide on a message whose signature holds. Raises RefusedError.

        `proof` comes with messages that the public ledger keeps.
        """
        request_id = next(self._request_ids)
        answered: asyncio.Future[Response] = asyncio.get_running_loop().create_future()
        self._waiting[request_id] = answered
        try:
            self._queue_request(RequestArrived(request_id=request_id, hotkey=hotkey, message=message, proof=proof))
            return await answered
        finally:
            self._waiting.pop(request_id, None)

    async def post(self, event: Event) -> None:
        """Hands in an event that nobody waits for; waits while the queue is full."""
        await self._queue.put(event)

    def feed_asked(self, hotkey: Hotkey, connection: Hashable) -> None:
        """A signed question for the feed has come on a connection; ends as `feed_answered`, whatever happens."""
        self._tell(self._connections.asked(hotkey, connection, self._clock.monotonic_s()))

    def feed_answered(self, hotkey: Hotkey, connection: Hashable) -> None:
        """It is being answered, or nobody waits for that any more."""
        self._connections.answered(hotkey, connection, self._clock.monotonic_s())

    def connection_opened(self, connection: Hashable) -> None:
        """Somebody has connected; ends as `connection_closed`."""
        self._connections.opened(connection)

    def connection_closed(self, connection: Hashable) -> None:
        """A connection ended, of whatever kind it was."""
        self._tell(self._connections.broke_off(connection))

    async def wait_for_change(self, version: int, timeout_s: float) -> None:
        """Returns once the feed's version is above the given one, after the time-out, or when the loop ends."""
        try:
            async with asyncio.timeout(timeout_s):
                while self.core.version <= version and not self._is_closed:
                    await self._changed.wait()
        except TimeoutError:
            return

    # --- tasks ---

    async def _decide(self, executor: ThreadPoolExecutor) -> None:
        loop = asyncio.get_running_loop()
        while True:
            events = [await self._queue.get()]
            while len(events) < BATCH_MAX and not self._queue.empty():
                events.append(self._queue.get_nowait())
            self._now_s = max(self._now_s, self._clock.now_s())
            records = [Record(self._next_sequence + place, self._now_s, event) for place, event in enumerate(events)]
            with self._metrics.journal_seconds.time():
                await loop.run_in_executor(executor, self._journal.append, records)
            self._next_sequence += len(records)
            self._metrics.events.inc(len(records))
            for record in records:
                effects = self.core.handle(record.event, record.now_s)
                if self._watcher is not None:
                    self._watcher.handled(record.event, effects)
                for effect in effects:
                    self._carry_out(effect)
            if self._recorded:
                # The journal holds what the ledger follows from, so answers need not wait for it.
                recorded, self._recorded = self._recorded, []
                await loop.run_in_executor(executor, self._ledger.append, recorded)
            self._since_snapshot += len(records)
            if self._since_snapshot >= self._snapshot_events:
                await self._keep_snapshot(executor)
                self._since_snapshot = 0

    async def _keep_snapshot(self, executor: ThreadPoolExecutor) -> None:
        """Nothing is decided meanwhile, so that the snapshot is that of one moment."""
        loop = asyncio.get_running_loop()
        with self._metrics.snapshot_seconds.time():
            snapshot = Snapshot.of(self._next_sequence, self._now_s, self.core.num_entries, self.core.snapshot())
            # The journal forgets events that the ledger's entries follow from.
            await loop.run_in_executor(executor, self._ledger.sync)
            await loop.run_in_executor(executor, self._journal.keep, snapshot)
        self._metrics.snapshot_bytes.set(len(snapshot.state))
        _log.info("snapshot_kept", sequence=snapshot.sequence, size_bytes=len(snapshot.state))

    async def _tick(self) -> None:
        while True:
            await asyncio.sleep(self._tick_s)
            await self._queue.put(Ticked())

    async def _check_objects(self) -> None:
        while True:
            ref = await self._checks.get()
            try:
                stored = await self._store.stat(ref.key)
            except TransportError as error:
                _log.warning("object_check_failed", key=ref.key, error=str(error))
                continue  # the core asks again
            durable = stored is not None and (stored.size_bytes, stored.digest) == (ref.size_bytes, ref.digest)
            await self._queue.put(ObjectChecked(ref=ref, durable=durable))

    async def _delete_objects(self) -> None:
        while True:
            prefix = await self._deletions.get()
            try:
                await self._store.delete_prefix(prefix)
            except TransportError as error:
                _log.warning("objects_not_deleted_yet", prefix=prefix, error=str(error))
                await asyncio.sleep(_DELETE_AGAIN_S)
                if not self._deletions.full():
                    self._deletions.put_nowait(prefix)
            else:
                _log.info("objects_deleted", prefix=prefix)

    # --- inside ---

    def _queue_request(self, event: RequestArrived) -> None:
        if self._is_closed:
            raise refused(RefusalCode.BUSY, "the orchestrator is stopping", _RETRY_S)
        try:
            self._queue.put_nowait(event)
        except asyncio.QueueFull:
            raise refused(RefusalCode.BUSY, "too many requests wait for a decision", _RETRY_S) from None

    def _tell(self, event: ConnectionLost | ConnectionSeen | None) -> None:
        """Queues a hint about a member. It is dropped while the queue is full: heartbeats tell the same later."""
        if event is None or self._is_closed or self._queue.full() or not self.core.is_present(event.hotkey):
            return
        self._queue.put_nowait(event)

    def _carry_out(self, effect: Effect) -> None:
        match effect:
            case Answer(request_id, message):
                if (answered := self._waiting.get(request_id)) is not None and not answered.done():
                    answered.set_result(message)
            case Refuse(request_id, refusal):
                if (answered := self._waiting.get(request_id)) is not None and not answered.done():
                    answered.set_exception(RefusedError(refusal))
            case CheckObject(ref):
                if self._checks.full():
                    _log.warning("object_check_put_off", key=ref.key)
                else:
                    self._checks.put_nowait(ref)
            case DeleteObjects(prefix):
                if self._deletions.full():
                    _log.error("objects_not_deleted", prefix=prefix)
                else:
                    self._deletions.put_nowait(prefix)
            case Announce(version):
                self._announce(version)
            case Recorded():
                self._recorded.append(effect)

    def _announce(self, version: int) -> None:
        self._changed.set()
        self._changed = asyncio.Event()
        for text in self.core.notices_after(self._seen_notices):
            _log.warning("notice", text=text)
        self._seen_notices = self.core.num_notices
        _log.info("feed_changed", version=version, phases=self.core.phases())

    def _close(self) -> None:
        self._is_closed = True
        self._changed.set()
        for answered in self._waiting.values():
            if not answered.done():
                answered.set_exception(refused(RefusalCode.BUSY, "the orchestrator is stopping", _RETRY_S))
