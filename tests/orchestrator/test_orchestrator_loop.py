"""The loop around the core: journal first, then effects; bounds; and what ends it."""

import asyncio
import contextlib
import random
import threading
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from orchestrator_world import World, hotkey_of, make_spec
from prometheus_client import CollectorRegistry

from orion.common.clock import Clock, SystemClock
from orion.common.config import RunSpec
from orion.common.errors import TransportError
from orion.common.ids import MemberState
from orion.common.net.directory_store import DirectoryStore
from orion.common.net.store import ObjectStore, StoredObject
from orion.common.protocol.messages import (
    Join,
    Joined,
    RefusalCode,
)
from orion.common.protocol.refusals import RefusedError
from orion.orchestrator.core import OrchestratorCore
from orion.orchestrator.events import MetagraphUpdated, Neuron, RequestArrived, Resumed
from orion.orchestrator.journal import Header, Journal, MemoryJournal, Record
from orion.orchestrator.ledger_store import MemoryLedger
from orion.orchestrator.loop import OrchestratorLoop
from orion.orchestrator.metrics import LoopMetrics

A0 = hotkey_of(0, 0)
JOIN = Join(url="http://10.0.0.1:1", device="cpu", memory_bytes=1)
SPEC = make_spec()


class GatedJournal(MemoryJournal):
    """Appends wait until they are let through, as on a slow disk; or fail, as on a full one."""

    def __init__(self) -> None:
        super().__init__(Header(SPEC.digest, b"s" * 32))
        self.gate = threading.Event()
        self.gate.set()
        self.fails = False
        self.num_appends = 0

    def append(self, records: Sequence[Record]) -> None:
        assert self.gate.wait(10.0)
        if self.fails:
            raise OSError("disk full")
        self.num_appends += 1
        super().append(records)


class BrokenStore(DirectoryStore):
    """Cannot be reached at first; then it says what it is told to."""

    def __init__(self, root: Path) -> None:
        super().__init__(root)
        self.objects: dict[str, StoredObject] = {}
        self.is_broken = True
        self.num_failures = 0

    async def stat(self, key: str) -> StoredObject | None:
        if self.is_broken:
            self.num_failures += 1
            raise TransportError("store: no answer within 1 s")
        return self.objects.get(key)


class SteppedClock(SystemClock):
    """The machine's clock, put forward when told to."""

    ahead_s = 0.0

    def now_s(self) -> float:
        return super().now_s() + self.ahead_s


@pytest.fixture
def store(tmp_path: Path) -> ObjectStore:
    return DirectoryStore(tmp_path)


def make_loop(
    journal: Journal,
    store: ObjectStore,
    queue_max: int = 100,
    *,
    spec: RunSpec = SPEC,
    clock: Clock | None = None,
    tick_s: float = 5.0,
    snapshot_events: int = 1000,
) -> OrchestratorLoop:
    return OrchestratorLoop(
        OrchestratorCore(spec, random.Random(7)),
        journal,
        MemoryLedger(spec.digest),
        store,
        clock if clock is not None else SystemClock(),
        metrics=LoopMetrics(CollectorRegistry()),
        tick_s=tick_s,
        queue_max=queue_max,
        snapshot_events=snapshot_events,
    )


@asynccontextmanager
async def running(loop: OrchestratorLoop) -> AsyncIterator[OrchestratorLoop]:
    task = asyncio.create_task(loop.run())
    await loop.post(MetagraphUpdated(neurons=(Neuron(hotkey=A0, validator_permit=False),)))
    try:
        yield loop
    finally:
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task


async def test_an_answer_leaves_only_after_its_event_is_durable(store: ObjectStore) -> None:
    journal = GatedJournal()
    async with running(make_loop(journal, store)) as loop:
        journal.gate.clear()
        asking = asyncio.create_task(loop.ask(A0, JOIN))
        done, _ = await asyncio.wait([asking], timeout=0.05)
        assert not done and loop.core.version == 0, "nothing is decided before it is written down"
        journal.gate.set()
        assert isinstance(await asking, Joined)
    events = [record.event for record in journal.read()]
    assert any(isinstance(event, RequestArrived) and event.message == JOIN for event in events)


async def test_events_that_gather_are_committed_together(store: ObjectStore) -> None:
    journal = GatedJournal()
    async with running(make_loop(journal, store)) as loop:
        await loop.ask(A0, JOIN)
        before = journal.num_appends
        journal.gate.clear()
        asking = [asyncio.create_task(loop.ask(A0, JOIN)) for _ in range(20)]
        await asyncio.sleep(0)
        journal.gate.set()
        await asyncio.gather(*asking)
        assert journal.num_appends - before <= 2


async def test_when_too_much_waits_requests_are_busy(store: ObjectStore) -> None:
    journal = GatedJournal()
    async with running(make_loop(journal, store, queue_max=3)) as loop:
        await loop.ask(A0, JOIN)
        journal.gate.clear()
        asking = [asyncio.create_task(loop.ask(A0, JOIN)) for _ in range(30)]
        refused = 0
        done, waiting = await asyncio.wait(asking, timeout=0.05)
        for task in done:
            error = task.exception()
            assert isinstance(error, RefusedError) and error.code is RefusalCode.BUSY
            assert error.retry_after_s is not None
            refused += 1
        assert refused >= 20
        journal.gate.set()
        assert {type(answer) for answer in await asyncio.gather(*waiting)} == {Joined}


async def test_a_refusal_comes_back_as_an_error(store: ObjectStore) -> None:
    async with running(make_loop(MemoryJournal(Header(SPEC.digest, b"s" * 32)), store)) as loop:
        with pytest.raises(RefusedError) as refused:
            await loop.ask(hotkey_of(0, 1), JOIN)
        assert refused.value.code is RefusalCode.FORBIDDEN


async def test_a_journal_that_fails_ends_the_process_and_nobody_hears_a_yes(store: ObjectStore) -> None:
    journal = GatedJournal()
    loop = make_loop(journal, store)
    task = asyncio.create_task(loop.run())
    await loop.post(MetagraphUpdated(neurons=(Neuron(hotkey=A0, validator_permit=False),)))
    await asyncio.sleep(0)
    journal.fails = True
    with pytest.raises(RefusedError):
        await loop.ask(A0, JOIN)
    with pytest.raises(ExceptionGroup) as failed:
        await task
    assert failed.value.subgroup(lambda error: "disk full" in str(error)) is not None
    with pytest.raises(RefusedError):
        await loop.ask(A0, JOIN)


async def test_a_new_loop_resumes_where_the_journal_ends(store: ObjectStore) -> None:
    journal = MemoryJournal(Header(SPEC.digest, b"s" * 32))
    async with running(make_loop(journal, store)) as loop:
        await loop.ask(A0, JOIN)
    digest = loop.core.digest()
    again = make_loop(journal, store)
    assert again.core.digest() == digest
    async with running(again):
        assert await again.ask(A0, JOIN) == Joined(stage_index=0, state=MemberState.JOINING)
    assert sum(isinstance(record.event, Resumed) for record in journal.read()) == 1


async def test_the_wait_for_a_change_ends_with_the_change_the_time_or_the_loop(store: ObjectStore) -> None:
    async with running(make_loop(MemoryJournal(Header(SPEC.digest, b"s" * 32)), store)) as loop:
        await loop.wait_for_change(0, 0.01)
        assert loop.core.version == 0
        waiting = asyncio.create_task(loop.wait_for_change(0, 30.0))
        await loop.ask(A0, JOIN)
        await asyncio.wait_for(waiting, 5.0)
        version = loop.core.version
        assert version > 0
        last = asyncio.create_task(loop.wait_for_change(version, 30.0))
        await asyncio.sleep(0)
    await asyncio.wait_for(last, 5.0)


async def test_a_store_that_was_out_of_reach_is_asked_again(tmp_path: Path) -> None:
    store, clock = BrokenStore(tmp_path), SteppedClock()
    spec = make_spec(num_stages=1, replicas=1)
    loop = make_loop(
        MemoryJournal(Header(spec.digest, b"s" * 32)), store, spec=spec, clock=clock, tick_s=0.02, queue_max=1000
    )
    # The same run in memory tells which messages lead to the upload, and which objects it names.
    script = World(spec)
    script.start()
    script.upload_all(script.train())
    async with running(loop):
        for _, event in script.events:
            if isinstance(event, RequestArrived):
                await loop.ask(event.hotkey, event.message)
        version = loop.core.version
        assert loop.core.phases() == ("upload(0)",)
        store.objects = {key: StoredObject(ref.size_bytes, ref.digest) for key, ref in script.store.items()}
        store.is_broken = False
        clock.ahead_s = 3.0
        await loop.wait_for_change(version, 10.0)
        assert loop.core.phases() == ("merge(0)",)
        assert store.num_failures > 0
