"""An orchestrator's real loop on a real journal, killed at its boundaries. Run as a process of its own, only by tests.

`python crash_points.py TASK_JSON`: a boundary lies before and after each commit of the journal, snapshot and append to
the ledger, each effect, each look at the store and each deletion. A process is forked for each life of the orchestrator
from this one, which has imported everything; it goes on with a recorded run and kills itself (SIGKILL) at a boundary.
Before each life the journal is folded through a core that has never been restarted: where the new life begins must be
just there. In the end everything must be as if nobody had been killed.

Two ways to strike: `chain` kills the same run again and again, each time some boundaries after the last; `each` strikes
every run once, each at another boundary, and lets it end.
"""

import asyncio
import contextlib
import json
import logging
import os
import random
import signal
import sys
import traceback
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import structlog
from orchestrator_world import World, make_spec
from prometheus_client import CollectorRegistry

from orion.common.clock import SystemClock
from orion.common.config import RunSpec
from orion.common.ids import Hotkey
from orion.common.net.directory_store import DirectoryStore
from orion.common.net.store import StoredObject
from orion.common.protocol.messages import Refusal, RunInfo
from orion.common.protocol.refusals import RefusedError
from orion.orchestrator.core import OrchestratorCore
from orion.orchestrator.events import (
    Answer,
    CheckObject,
    Effect,
    Event,
    ObjectChecked,
    Recorded,
    Refuse,
    RequestArrived,
    Response,
    Resumed,
)
from orion.orchestrator.journal import Header, Record, Snapshot
from orion.orchestrator.ledger_store import SqliteLedger
from orion.orchestrator.loop import OrchestratorLoop
from orion.orchestrator.metrics import LoopMetrics
from orion.orchestrator.replay import replay
from orion.orchestrator.sql_journal import SqlJournal

NEVER = 1 << 62
SEED = 7


class Fuse:
    """Kills its process once it has passed so many boundaries."""

    def __init__(self, length: int) -> None:
        self.length = length
        self.num_passed = 0

    def boundary(self) -> None:
        self.num_passed += 1
        if self.num_passed == self.length:
            os.kill(os.getpid(), signal.SIGKILL)

    @contextlib.contextmanager
    def around(self) -> Iterator[None]:
        self.boundary()
        yield
        self.boundary()


class StruckJournal(SqlJournal):
    def __init__(self, address: str, header: Header, fuse: Fuse) -> None:
        super().__init__(address, header)
        self._fuse = fuse

    def append(self, records: Sequence[Record]) -> None:
        with self._fuse.around():
            super().append(records)

    def keep(self, snapshot: Snapshot) -> None:
        with self._fuse.around():
            super().keep(snapshot)


class StruckLedger(SqliteLedger):
    fuse = Fuse(NEVER)

    def append(self, recorded: Sequence[Recorded]) -> None:
        with self.fuse.around():
            super().append(recorded)


class StruckStore(DirectoryStore):
    """Holds every object of the run."""

    def __init__(self, folder: Path, objects: dict[str, StoredObject], fuse: Fuse) -> None:
        super().__init__(folder)
        self._objects = objects
        self._fuse = fuse

    async def stat(self, key: str) -> StoredObject | None:
        with self._fuse.around():
            return self._objects.get(key)

    async def delete_prefix(self, prefix: str) -> None:
        with self._fuse.around():
            pass


class StruckEffects(list[Effect]):
    """Whoever carries them out passes a boundary before and after each."""

    def __init__(self, effects: list[Effect], fuse: Fuse) -> None:
        super().__init__(effects)
        self._fuse = fuse

    def __iter__(self) -> Iterator[Effect]:
        for effect in super().__iter__():
            with self._fuse.around():
                yield effect


class StruckCore(OrchestratorCore):
    """Counts what is under way, so that the next recorded event comes when the last one has had all its effects."""

    def __init__(self, spec: RunSpec, fuse: Fuse) -> None:
        super().__init__(spec, random.Random(SEED))
        self._fuse = fuse
        self.num_checks = 0
        self.num_posted = 0
        self.is_live = False
        """Whether effects are carried out, and not those of a replay."""
        self.changed = asyncio.Event()

    def handle(self, event: Event, now_s: float) -> list[Effect]:
        effects = super().handle(event, now_s)
        self.num_checks += sum(isinstance(effect, CheckObject) for effect in effects)
        if isinstance(event, ObjectChecked):
            self.num_checks -= 1
        elif not isinstance(event, RequestArrived):
            self.num_posted += 1
        self.changed.set()
        return StruckEffects(effects, self._fuse) if self.is_live else effects

    async def until_idle(self, num_posted: int) -> None:
        while self.num_checks > 0 or self.num_posted < num_posted:
            self.changed.clear()
            await self.changed.wait()


class RecordedClock(SystemClock):
    recorded_s = 0.0

    def now_s(self) -> float:
        return self.recorded_s


@dataclass
class Run:
    """A recorded run, and the one that is killed."""

    folder: Path
    address: str
    snapshot_events: int
    world: World

    def __post_init__(self) -> None:
        self.spec = self.world.spec
        events = self.world.events
        refs = [event.ref for _, event in events if isinstance(event, ObjectChecked)]
        self.objects = {ref.key: StoredObject(ref.size_bytes, ref.digest) for ref in refs}
        self.script = [(now_s, event) for now_s, event in events if not isinstance(event, ObjectChecked)]
        plain = OrchestratorCore(self.spec, random.Random(SEED))
        effects = [(event, plain.handle(event, now_s)) for now_s, event in events]
        self.answers = [_answer_of(each) for event, each in effects if not isinstance(event, ObjectChecked)]
        self.begin()

    def begin(self) -> None:
        self.never = OrchestratorCore(self.spec, random.Random(SEED))
        """A core that is never restarted."""
        self.next_sequence = 0
        self.num_done = 0
        """Events of the script that are in the journal."""
        self.entries: list[bytes] = []

    def header(self) -> Header:
        return Header(self.spec.digest, b"s" * 32)

    def ledger(self, kind: type[SqliteLedger]) -> SqliteLedger:
        return kind(self.folder / "ledger.sqlite", RunInfo(orchestrator=Hotkey("5" * 48), spec={}), self.spec.digest)

    def catch_up(self) -> None:
        """Folds what the last life has written."""
        journal = SqlJournal(self.address, self.header())
        for record in journal.read(self.next_sequence):
            effects = self.never.handle(record.event, record.now_s)
            self.entries += [effect.entry for effect in effects if isinstance(effect, Recorded)]
            self.num_done += not isinstance(record.event, ObjectChecked | Resumed)
            self.next_sequence = record.sequence + 1
        journal.close()

    def live(self, fuse_length: int) -> int | None:
        """One life; None: it was killed; else how many boundaries it passed to the end of the run."""
        reading, writing = os.pipe()
        pid = os.fork()
        if pid == 0:
            os.close(reading)
            code = 1
            try:
                passed = asyncio.run(self._work(Fuse(fuse_length)))
                os.write(writing, str(passed).encode())
                code = 0
            except BaseException:  # noqa: BLE001  the fork must not go on as its parent
                traceback.print_exc()
            finally:
                os._exit(code)
        os.close(writing)
        with os.fdopen(reading) as pipe:
            told = pipe.read()
        code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        if code == -signal.SIGKILL:
            return None
        if code != 0:
            raise SystemExit(f"a life ended with {code} after {self.num_done} events of the script")
        return int(told)

    async def _work(self, fuse: Fuse) -> int:
        StruckLedger.fuse = fuse
        clock, core, ledger = RecordedClock(), StruckCore(self.spec, fuse), self.ledger(StruckLedger)
        journal = StruckJournal(self.address, self.header(), fuse)
        loop = OrchestratorLoop(
            core,
            journal,
            ledger,
            StruckStore(self.folder, self.objects, fuse),
            clock,
            metrics=LoopMetrics(CollectorRegistry()),
            tick_s=3600.0,
            queue_max=1000,
            snapshot_events=self.snapshot_events,
        )
        assert core.digest() == self.never.digest(), "the journal leads elsewhere"
        assert ledger.num_entries == len(self.entries) == core.num_entries
        assert ledger.page(0).head == core.ledger_digest
        core.num_checks = core.num_posted = 0  # those of the replay: what was lost of them is asked again
        core.is_live, num_posted = True, int(loop.is_resumed)
        task = asyncio.create_task(loop.run())
        await core.until_idle(num_posted)
        for number in range(self.num_done, len(self.script)):
            clock.recorded_s, event = self.script[number]
            if isinstance(event, RequestArrived):
                assert await _ask(loop, event) == self.answers[number], f"event {number} is answered otherwise: {event}"
            else:
                await loop.post(event)
                num_posted += 1
            await core.until_idle(num_posted)
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task  # raises what it ended with, if it ended by itself
        journal.close()
        ledger.close()
        return fuse.num_passed

    def check_end(self) -> None:
        """The run has ended as if nothing had happened."""
        self.catch_up()
        status, expected = self.never.status(0.0), self.world.core.status(0.0)
        unlike = {"notices", "miners"}  # restarts are told, and count as word from everybody
        assert status.model_dump(exclude=unlike) == expected.model_dump(exclude=unlike)
        assert status.finished
        ledger = self.ledger(SqliteLedger)
        # Its newest entries may have been cut off by the end of the last life: the next start gives them.
        journal = SqlJournal(self.address, self.header())
        replay(OrchestratorCore(self.spec, random.Random(SEED)), journal, ledger)
        journal.close()
        entries: list[bytes] = []
        while len(entries) < ledger.num_entries:
            entries += ledger.page(len(entries)).entries
        ledger.close()
        assert entries == self.entries == [recorded.entry for recorded in self.world.recorded], "another ledger"


def _answer_of(effects: list[Effect]) -> Response | Refusal | None:
    for effect in effects:
        if isinstance(effect, Answer):
            return effect.message
        if isinstance(effect, Refuse):
            return effect.refusal
    return None


async def _ask(loop: OrchestratorLoop, event: RequestArrived) -> Response | Refusal:
    try:
        return await loop.ask(event.hotkey, event.message, event.proof)
    except RefusedError as error:
        return error.refusal


def chain(run: Run, seed: int, mean_fuse: int) -> int:
    """Kills until the run has ended; how often that was."""
    rng = random.Random(seed)
    num_killed = 0
    while True:
        run.catch_up()
        if run.live(1 + rng.randrange(2 * mean_fuse)) is not None:
            return num_killed
        num_killed += 1


def each(run: Run, folder: Path) -> int:
    """Kills one run at each of its boundaries; how many there are."""
    num_boundaries = run.live(NEVER)
    assert num_boundaries is not None
    run.catch_up()
    run.check_end()
    for number in range(1, num_boundaries + 1):
        run.folder = folder / str(number)
        run.folder.mkdir()
        run.address = f"sqlite:///{run.folder / 'journal.sqlite'}"
        run.begin()
        assert run.live(number) is None, f"boundary {number} was not reached"
        run.catch_up()
        assert run.live(NEVER) is not None
        run.check_end()
    return num_boundaries


def main(task: dict[str, Any]) -> None:
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.ERROR))
    world = World(make_spec(**task["spec"]))
    world.run()
    folder = Path(task["folder"])
    run = Run(folder, task["address"], task["snapshot_events"], world)
    if task["way"] == "each":
        num_killed = each(run, folder)
    else:
        num_killed = chain(run, task["seed"], task["mean_fuse"])
        run.check_end()
    sys.stdout.write(json.dumps({"num_killed": num_killed, "num_events": run.next_sequence}) + "\n")


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
