"""A real orchestrator app that plays a recorded story: routes, loop, core and page are those of production."""

import asyncio
import contextlib
import socket
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

import uvicorn
from dashboard_story import Recording
from prometheus_client import CollectorRegistry

from orion.common.clock import SystemClock
from orion.common.net.directory_store import DirectoryStore
from orion.common.net.gate import Gate
from orion.common.net.store import StoredObject
from orion.common.protocol.messages import RunInfo
from orion.common.protocol.signing import Verifier, hotkey_of, keypair_from_uri
from orion.orchestrator.api import ApiParts, build_app
from orion.orchestrator.dashboard.live import LivePage
from orion.orchestrator.dashboard.watch import RunWatch
from orion.orchestrator.events import Effect, Event
from orion.orchestrator.journal import Header, MemoryJournal
from orion.orchestrator.ledger_store import MemoryLedger
from orion.orchestrator.loop import OrchestratorLoop
from orion.orchestrator.metrics import LoopMetrics, RunCollector, WatchCollector

KEY = keypair_from_uri("//orchestrator")


class PlayedClock(SystemClock):
    """Stands at the newest record's time; durations are real."""

    at_s = 0.0

    def now_s(self) -> float:
        return self.at_s


class SilentStore(DirectoryStore):
    """Never says whether something is there: the recording does."""

    async def stat(self, key: str) -> StoredObject | None:
        await asyncio.Event().wait()
        return None


class CountingWatch:
    """Passes on to the page's watch, and tells how many events were handled."""

    def __init__(self, watch: RunWatch) -> None:
        self._watch = watch
        self.num_handled = 0
        self.handled_one = asyncio.Event()

    def handled(self, event: Event, effects: Sequence[Effect]) -> None:
        self._watch.handled(event, effects)
        self.num_handled += 1
        self.handled_one.set()


class Player:
    """An orchestrator's app under way through a recording."""

    def __init__(self, recording: Recording, folder: Path, num_before: int = 0) -> None:
        """It is started again after so many records, which are in its journal."""
        self.recording = recording
        self.clock = PlayedClock()
        self.core = recording.core()
        self.watch = RunWatch(self.core)
        self.page = LivePage(self.watch, self.clock, refresh_s=0.05)
        self.dropped: list[object] = []
        self._counting = CountingWatch(self.watch)
        self._store = SilentStore(folder)
        registry, spec = CollectorRegistry(), recording.spec
        info = RunInfo(orchestrator=hotkey_of(KEY), spec=spec.model_dump(mode="json"))
        ledger = MemoryLedger(spec.digest)
        journal = MemoryJournal(Header(spec.digest, b"s" * 32))
        if num_before:
            journal.append(recording.records[:num_before])
            self.clock.at_s = recording.records[num_before - 1].now_s
        self.loop = OrchestratorLoop(
            self.core,
            journal,
            ledger,
            self._store,
            self.clock,
            metrics=LoopMetrics(registry),
            tick_s=1e6,
            queue_max=100,
            snapshot_events=1_000_000,
            watcher=self._counting,
        )
        registry.register(RunCollector(lambda: self.core.status(self.clock.now_s()), lambda: self.loop.num_queued))
        registry.register(WatchCollector(self.page))
        self.app = build_app(
            ApiParts(
                run_info=info,
                ledger=ledger,
                loop=self.loop,
                gate=Gate(Verifier(hotkey_of(KEY)), spec.digest, self.clock),
                store=self._store,
                served_objects=None,
                clock=self.clock,
                grant_s=60.0,
                data_files={},
                registry=registry,
                page=self.page,
                drop_connection=self.dropped.append,
            )
        )
        self.num_played = num_before

    async def play(self, num_records: int | None = None) -> None:
        """Goes on until so many records, or all, were handled."""
        end = len(self.recording.records) if num_records is None else num_records
        for record in self.recording.records[self.num_played : end]:
            self.clock.at_s = record.now_s
            wanted = self._counting.num_handled + 1
            await self.loop.post(record.event)
            while self._counting.num_handled < wanted:
                self._counting.handled_one.clear()
                await self._counting.handled_one.wait()
            self.num_played += 1


@asynccontextmanager
async def playing(recording: Recording, folder: Path, num_before: int) -> AsyncIterator[tuple[Player, str]]:
    """A player whose app is served on loopback, and its base URL."""
    player = Player(recording, folder, num_before)
    with contextlib.closing(socket.create_server(("127.0.0.1", 0))) as listener:
        url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        config = uvicorn.Config(player.app, lifespan="off", log_config=None, access_log=False, ws="none")
        server = uvicorn.Server(config)
        deciding = asyncio.create_task(player.loop.run())
        serving = asyncio.create_task(server.serve([listener]))
        try:
            yield player, url
        finally:
            player.page.close()
            server.should_exit = True
            await serving
            deciding.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await deciding
