"""Backups of a journal and its ledger: taken while they are written, and brought back on any kind of database."""

import random
import threading
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest
from orchestrator_world import World, make_spec
from postgres import PostgresServer

from orion.common.config import RunSpec
from orion.common.errors import ConfigError, DataError
from orion.common.ids import Hotkey
from orion.common.protocol.messages import RunInfo
from orion.orchestrator.backup import back_up, restore
from orion.orchestrator.config import OrchestratorConfig
from orion.orchestrator.core import OrchestratorCore
from orion.orchestrator.events import Recorded
from orion.orchestrator.journal import Header, Record, Snapshot
from orion.orchestrator.ledger_store import LEDGER_FILE, SqliteLedger
from orion.orchestrator.replay import replay
from orion.orchestrator.sql_journal import SqlJournal

SNAPSHOT_EVENTS = 20


@dataclass
class Writer:
    """What an orchestrator does to its journal and ledger."""

    journal: SqlJournal
    ledger: SqliteLedger
    core: OrchestratorCore

    def write(self, world: World, until: int) -> None:
        for number in range(self.journal.next_sequence, until):
            now_s, event = world.events[number]
            self.journal.append([Record(number, now_s, event)])
            effects = self.core.handle(event, now_s)
            self.ledger.append([effect for effect in effects if isinstance(effect, Recorded)])
            if number % SNAPSHOT_EVENTS == SNAPSHOT_EVENTS - 1:
                self.ledger.sync()
                self.journal.keep(Snapshot.of(number + 1, now_s, self.core.num_entries, self.core.snapshot()))


@contextmanager
def opened(folder: Path, address: str, spec: RunSpec) -> Iterator[Writer]:
    folder.mkdir(exist_ok=True)
    run_info = RunInfo(orchestrator=Hotkey("5" * 48), spec={})
    with (
        closing(SqlJournal(address, Header(spec.digest, random.Random(address).randbytes(32)))) as journal,
        closing(SqliteLedger(folder / LEDGER_FILE, run_info, spec.digest)) as ledger,
    ):
        core = OrchestratorCore(spec, random.Random(7))
        replay(core, journal, ledger)
        yield Writer(journal, ledger, core)


@pytest.fixture(scope="module")
def world() -> World:
    world = World(make_spec(outer_steps=2))
    world.run()
    return world


def address_of(kind: str, folder: Path, request: pytest.FixtureRequest) -> str:
    if kind == "sqlite":
        return OrchestratorConfig(state_folder=folder).journal_address
    server: PostgresServer = request.getfixturevalue("postgres")
    return server.address()


@pytest.mark.parametrize("origin", ["sqlite", "postgres"])
@pytest.mark.parametrize("target", ["sqlite", "postgres"])
def test_a_run_goes_on_from_a_backup_that_was_taken_while_it_ran(
    tmp_path: Path, world: World, origin: str, target: str, request: pytest.FixtureRequest
) -> None:
    old, new, copy = tmp_path / "old", tmp_path / "new", tmp_path / "copies" / "copy"
    address = address_of(origin, old, request)
    with opened(old, address, world.spec) as writer:
        writer.write(world, 50)
        secret, digest = writer.journal.header.secret, writer.core.digest()
        report = back_up(old, address, copy)
        writer.write(world, len(world.events))
        assert writer.core.digest() == world.core.digest()
    assert (report.num_events, report.snapshots, report.num_entries) == (50, (20, 40), writer_entries(world, 50))
    assert report.num_events_kept == 30
    assert sorted(path.name for path in copy.iterdir()) == ["journal.sqlite", "ledger.sqlite"]
    address = address_of(target, new, request)
    assert restore(copy, new, address) == report
    with opened(new, address, world.spec) as writer:
        assert writer.journal.header.secret == secret
        assert writer.core.digest() == digest
        writer.write(world, len(world.events))
        assert writer.core.digest() == world.core.digest()
        assert writer.ledger.page(0).head == world.core.ledger_digest


def writer_entries(world: World, num_events: int) -> int:
    core = OrchestratorCore(world.spec, random.Random(7))
    for now_s, event in world.events[:num_events]:
        core.handle(event, now_s)
    return core.num_entries


def test_a_backup_beside_a_busy_writer_is_always_one_that_a_run_can_go_on_from(tmp_path: Path, world: World) -> None:
    old = tmp_path / "old"
    address = OrchestratorConfig(state_folder=old).journal_address
    num_copies = 0
    with opened(old, address, world.spec) as writer:
        writer.write(world, 5)
        writing = threading.Thread(target=writer.write, args=(world, len(world.events)))
        writing.start()
        while writing.is_alive() or num_copies < 3:
            copy = tmp_path / f"copy-{num_copies}"
            report = back_up(old, address, copy)
            num_copies += 1
            new = tmp_path / f"new-{num_copies}"
            restored = OrchestratorConfig(state_folder=new).journal_address
            restore(copy, new, restored)
            with opened(new, restored, world.spec) as again:
                assert again.journal.next_sequence == report.num_events
                assert again.ledger.num_entries == again.core.num_entries
        writing.join()


def test_what_is_there_is_never_written_over(tmp_path: Path, world: World) -> None:
    old, copy = tmp_path / "old", tmp_path / "copy"
    address = OrchestratorConfig(state_folder=old).journal_address
    with opened(old, address, world.spec) as writer:
        writer.write(world, 5)
    back_up(old, address, copy)
    with pytest.raises(ConfigError, match="is there already"):
        back_up(old, address, copy)
    with pytest.raises(ConfigError, match="restore to a new folder"):
        restore(copy, old, f"sqlite:///{tmp_path / 'other.sqlite'}")
    with pytest.raises(ConfigError, match="holds a journal already"):
        restore(copy, tmp_path / "new", address)
    assert not (tmp_path / "new" / LEDGER_FILE).exists()


def test_what_is_missing_is_named_and_nothing_is_left_behind(tmp_path: Path, world: World) -> None:
    old, copy = tmp_path / "old", tmp_path / "copy"
    address = OrchestratorConfig(state_folder=old).journal_address
    with pytest.raises(DataError, match="no ledger at"):
        back_up(old, address, copy)
    with opened(old, address, world.spec) as writer:
        writer.write(world, 5)
    with pytest.raises(DataError, match="no journal at"):
        back_up(old, f"sqlite:///{tmp_path / 'none.sqlite'}", copy)
    with pytest.raises(DataError, match="is no backup: it has no ledger"):
        (tmp_path / "half").mkdir()
        (tmp_path / "half" / "journal.sqlite").touch()
        restore(tmp_path / "half", tmp_path / "new", f"sqlite:///{tmp_path / 'new' / 'j'}")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["half", "old"]
