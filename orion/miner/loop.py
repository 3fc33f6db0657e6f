"""The one task that owns a MinerCore: hands it events, carries out what it decides, watches the feed, sends heartbeats.

Must not decide anything. The device works in a thread of its own, one job after the other; the network never waits for
it, nor it for the network. Whatever is started here ends with `run`, and whatever fails unasked ends `run` with its
error.
"""

import asyncio
from collections.abc import Coroutine
from functools import partial
from typing import Any

import structlog

from orion.common.clock import Clock
from orion.common.config import RunSpec
from orion.common.errors import OrionError, TransportError
from orion.common.net.bandwidth import BandwidthMeter
from orion.common.net.orchestrator_client import OrchestratorClient
from orion.common.offload import Offload
from orion.common.protocol.messages import RefusalCode
from orion.common.protocol.refusals import RefusedError
from orion.miner import events
from orion.miner.boundary_monitor import BoundaryMonitor
from orion.miner.cache import Slot, TensorCache
from orion.miner.config import MinerConfig
from orion.miner.core import MinerCore
from orion.miner.desk import Desk
from orion.miner.effects import (
    Accept,
    AnswerHolds,
    AskHolds,
    Compute,
    DropGraph,
    Effect,
    FreeAllButGradient,
    FreeTensors,
    PersistLog,
    ReadBody,
    RefreshFeed,
    Refuse,
    RequestLease,
    SendCancel,
    SendTensor,
)
from orion.miner.hands import Deed, Ending, Hands, failed, size_bytes_max
from orion.miner.peer_client import PeerClient
from orion.miner.worker import DeviceWorker

TICK_S = 0.5
"""Longest time between two looks of the core at everything."""
FEED_PAUSE_S = 0.5
"""Before the feed is asked for again after a failure; after the first one that happens at once, because a member that
waits on no connection is soon taken for dead."""
FLUSH_S = 10.0
"""What a miner whose run is over has to get its last records told."""

_log = structlog.get_logger("orion.miner")


class MinerLoop:
    """Runs one core until its run is over."""

    def __init__(
        self,
        spec: RunSpec,
        config: MinerConfig,
        clock: Clock,
        *,
        core: MinerCore,
        desk: Desk,
        hands: Hands,
        peers: PeerClient,
        orchestrator: OrchestratorClient,
        upload_meter: BandwidthMeter,
        download_meter: BandwidthMeter,
        worker: DeviceWorker,
        cache: TensorCache,
        monitor: BoundaryMonitor,
        on_device: Offload,
    ) -> None:
        self._spec = spec
        self._config = config
        self._clock = clock
        self._core = core
        self._desk = desk
        self._hands = hands
        self._peers = peers
        self._orchestrator = orchestrator
        self._upload_meter = upload_meter
        self._download_meter = download_meter
        self._worker = worker
        self._cache = cache
        self._monitor = monitor
        self._on_device = on_device
        self._running: set[asyncio.Task[None]] = set()
        self._news = asyncio.Event()
        """Something that the orchestrator should hear soon."""
        self._busy_s = 0.0
        """Device time since the last heartbeat."""
        self._computed_s = 0.0
        """When the device last ended a job."""

    async def run(self) -> None:
        """Returns once the run is over and everything was told. Raises DataError, ConfigError, and TransportError or
        RefusedError when there was no feed for `silence_s_max`."""
        try:
            async with asyncio.TaskGroup() as tasks:
                self._start(tasks, self._watch_feed())
                self._start(tasks, self._send_heartbeats())
                await self._own_core(tasks)
                for task in self._running:
                    task.cancel()
        except ExceptionGroup as group:
            if not all(isinstance(error, OrionError) for error in group.exceptions):
                raise
            raise group.exceptions[0] from None

    async def _own_core(self, tasks: asyncio.TaskGroup) -> None:
        over_s: float | None = None
        ready_step: int | None = None
        while not self._core.is_finished:
            now_s = self._clock.now_s()
            wake_s = self._core.next_wake_s(now_s)
            timeout_s = TICK_S if wake_s is None else min(TICK_S, max(0.0, wake_s - now_s))
            event = await self._desk.next_event(timeout_s)
            _tell(event)
            for effect in self._core.handle(event or events.Ticked(), self._clock.now_s()):
                self._carry_out(tasks, effect)
            if self._core.ready_step != ready_step:
                ready_step = self._core.ready_step
                if ready_step is not None:
                    self._news.set()
            if self._core.run_is_over:
                over_s = self._clock.monotonic_s() if over_s is None else over_s
                if self._clock.monotonic_s() - over_s > FLUSH_S:
                    _log.warning("records_not_told")
                    return

    def _carry_out(self, tasks: asyncio.TaskGroup, effect: Effect) -> None:
        match effect:
            case ReadBody() | Accept() | Refuse() | AnswerHolds():
                self._desk.answer(effect)
            case FreeTensors(microbatch_id):
                # At once, because its credit may be given to another one; the engine's part waits for the device.
                self._cache.free(microbatch_id)
                self._start(tasks, self._on_device(partial(self._worker.free, microbatch_id)))
            case FreeAllButGradient(microbatch_id):
                self._cache.free_all_but(microbatch_id, Slot.GRADIENT_OUT)
            case DropGraph(microbatch_id):
                self._start(tasks, self._on_device(partial(self._worker.drop, microbatch_id)))
            case AskHolds():
                self._start(tasks, self._ask_holds(effect))
            case Compute():
                self._start(tasks, self._compute(effect))
            case PersistLog():
                self._start(tasks, self._persist(effect))
            case SendTensor():
                self._start(tasks, self._send(effect))
            case SendCancel():
                self._start(tasks, self._cancel(effect))
            case RefreshFeed():
                self._start(tasks, self._refresh_feed())
            case _:
                self._start(tasks, self._attempt(effect))

    def _start(self, tasks: asyncio.TaskGroup, work: Coroutine[Any, Any, None]) -> None:
        task = tasks.create_task(work)
        self._running.add(task)
        task.add_done_callback(self._running.discard)

    async def _compute(self, effect: Compute) -> None:
        began_s = self._clock.monotonic_s()
        ended = await self._hands.compute(effect)
        ended_s = self._clock.monotonic_s()
        self._busy_s += ended_s - max(began_s, self._computed_s)
        self._computed_s = ended_s
        await self._desk.post(ended)

    async def _persist(self, effect: PersistLog) -> None:
        await self._desk.post(await self._hands.persist(effect))

    async def _send(self, effect: SendTensor) -> None:
        await self._desk.post(await self._peers.send(effect))

    async def _cancel(self, effect: SendCancel) -> None:
        if not await self._peers.cancel(effect):
            _log.info("cancel_not_heard", peer=effect.peer, microbatch_id=effect.cancel.microbatch_id)

    async def _ask_holds(self, effect: AskHolds) -> None:
        await self._desk.post(await self._peers.ask_holds(effect))

    async def _attempt(self, deed: Deed) -> None:
        limits = self._spec.time_limits
        limit_s = limits.transfer_grace_s + size_bytes_max(self._spec, deed) / limits.bandwidth_floor_bytes_per_s
        ending: Ending
        try:
            async with asyncio.timeout(limit_s):
                ending = await self._hands.attempt(deed)
        except (TransportError, RefusedError, TimeoutError) as error:
            if not isinstance(deed, RequestLease):  # no work is nothing to talk about
                _log.warning("effect_failed", effect=type(deed).__name__, error=str(error) or f"over {limit_s:g} s")
            ending = failed(deed, error)
        await self._desk.post(ending)

    async def _watch_feed(self) -> None:
        version, wait_s = 0, 0.0
        heard_s = self._clock.monotonic_s()
        num_failed = 0
        while True:
            try:
                feed = await self._orchestrator.feed(version, wait_s)
            except (TransportError, RefusedError) as error:
                if self._clock.monotonic_s() - heard_s > self._config.silence_s_max:
                    raise
                if isinstance(error, RefusedError) and error.code is RefusalCode.RUN_MISMATCH:
                    raise
                _log.warning("feed_failed", error=str(error))
                num_failed += 1
                if num_failed > 1 or isinstance(error, RefusedError):
                    await asyncio.sleep(FEED_PAUSE_S)
                continue
            heard_s, num_failed = self._clock.monotonic_s(), 0
            version, wait_s = feed.version, self._config.feed_wait_s
            await self._desk.post(events.FeedArrived(feed))

    async def _refresh_feed(self) -> None:
        try:
            feed = await self._orchestrator.feed(0, 0.0)
        except (TransportError, RefusedError) as error:
            _log.warning("feed_failed", error=str(error))
            return
        await self._desk.post(events.FeedArrived(feed))

    async def _send_heartbeats(self) -> None:
        told_s, num_applied = self._clock.monotonic_s(), 0
        while True:
            try:
                async with asyncio.timeout(self._config.heartbeat_s):
                    await self._news.wait()
            except TimeoutError:
                pass
            self._news.clear()
            view = self._core.view
            if view is None or self._core.run_is_over:
                continue
            now_s = self._clock.monotonic_s()
            seconds = max(now_s - told_s, 1e-3)
            rate = (self._core.num_applied - num_applied) * self._spec.tokens_per_microbatch / seconds
            boundary = self._monitor.due_report(view.stage.outer_step, view.stage.phase)
            heartbeat = self._core.heartbeat(rate, min(1.0, self._busy_s / seconds), boundary).model_copy(
                update={
                    "upload_bytes_per_s": self._upload_meter.bytes_per_s,
                    "download_bytes_per_s": self._download_meter.bytes_per_s,
                }
            )
            told_s, num_applied, self._busy_s = now_s, self._core.num_applied, 0.0
            try:
                await self._orchestrator.heartbeat(heartbeat)
            except (TransportError, RefusedError) as error:
                _log.warning("heartbeat_failed", error=str(error))
                continue
            if boundary is not None:
                self._monitor.reported()


def _tell(event: events.Event | None) -> None:
    """Logs what changes this miner's part in the run."""
    match event:
        case events.JoinEnded(joined) if joined is not None:
            _log.info("joined", stage=joined.stage_index, state=joined.state)
        case events.AnchorLoaded(stage_index, outer_step, digest):
            _log.info("anchor_loaded", stage=stage_index, outer_step=outer_step, digest=digest)
        case events.ComputeEnded(events.InnerStepDone(num_microbatches, None)):
            _log.info("inner_step_taken", num_microbatches=num_microbatches)
        case events.UploadEnded(outer_step, True):
            _log.info("pseudo_gradient_uploaded", outer_step=outer_step)
        case events.ReduceEnded(outer_step, partition_index, _, excluded):
            left_out = [exclusion.hotkey for exclusion in excluded]
            _log.info("partition_reduced", outer_step=outer_step, partition=partition_index, left_out=left_out)
        case events.ApplyEnded(outer_step, digest):
            _log.info("outer_step_applied", outer_step=outer_step, digest=digest)
        case events.ComputeEnded(events.MergedTaken(outer_step)):
            _log.info("merged_taken", outer_step=outer_step)
        case events.CheckpointEnded(outer_step, ref) if ref is not None:
            _log.info("checkpoint_uploaded", outer_step=outer_step)
