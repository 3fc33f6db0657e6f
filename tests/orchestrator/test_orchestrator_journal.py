"""The journal's contract, over every kind of journal; and what only a database can go through."""

import random
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import sqlalchemy as sql
from alembic.autogenerate import compare_metadata
from alembic.config import Config
from alembic.migration import MigrationContext
from alembic.script import ScriptDirectory
from orchestrator_world import World
from postgres import PostgresServer

from orion.common.errors import ConfigError, DataError
from orion.common.ids import Digest
from orion.common.protocol.messages import ObjectRef
from orion.orchestrator.core import OrchestratorCore
from orion.orchestrator.database import parse_address
from orion.orchestrator.events import Event, ObjectChecked, Ticked
from orion.orchestrator.journal import SNAPSHOTS_KEPT, Header, Journal, MemoryJournal, Record, Snapshot
from orion.orchestrator.journal_tables import METADATA
from orion.orchestrator.ledger_store import MemoryLedger
from orion.orchestrator.migrate import NEWEST, VERSION_TABLE
from orion.orchestrator.replay import Replayed, replay
from orion.orchestrator.sql_journal import SqlJournal

HEADER = Header(Digest("a" * 64), b"s" * 32)


@pytest.fixture
def address(request: pytest.FixtureRequest, kind: str, tmp_path: Path) -> str:
    """Of an empty database."""
    if kind == "sqlite":
        return f"sqlite:///{tmp_path / 'j'}"
    server: PostgresServer = request.getfixturevalue("postgres")
    return server.address()


on_databases = pytest.mark.parametrize("kind", ["sqlite", "postgres"])


@pytest.fixture
def journal(request: pytest.FixtureRequest, kind: str) -> Iterator[Journal]:
    opened: Journal
    opened = MemoryJournal(HEADER) if kind == "memory" else SqlJournal(request.getfixturevalue("address"), HEADER)
    yield opened
    opened.close()


on_all = pytest.mark.parametrize("kind", ["memory", "sqlite", "postgres"])


def records(*events: Event, first: int = 0) -> list[Record]:
    return [Record(first + place, 1000.0 + 0.1 * (first + place), event) for place, event in enumerate(events)]


def checked(name: str) -> ObjectChecked:
    return ObjectChecked(ref=ObjectRef(key=name, digest=Digest("b" * 64), size_bytes=3), durable=True)


def snapshot(sequence: int, state: bytes = b"state") -> Snapshot:
    return Snapshot.of(sequence, 1000.0 + 0.1 * sequence, 2 * sequence, state)


@on_all
def test_what_was_appended_is_read_in_order(journal: Journal) -> None:
    assert list(journal.read()) == []
    assert journal.next_sequence == 0
    journal.append(records(Ticked(), checked("x")))
    journal.append(records(checked("y"), first=2))
    assert journal.next_sequence == 3
    assert list(journal.read()) == records(Ticked(), checked("x"), checked("y"))
    assert list(journal.read(2)) == records(checked("y"), first=2)
    assert list(journal.read(3)) == []
    assert list(journal.snapshots()) == []
    assert journal.header == HEADER


@on_all
def test_a_gap_or_a_repeated_number_is_a_mistake_of_ours(journal: Journal) -> None:
    journal.append(records(Ticked()))
    for wrong in (records(Ticked()), records(Ticked(), first=2), list(reversed(records(Ticked(), Ticked(), first=1)))):
        with pytest.raises(ValueError, match="follow"):
            journal.append(wrong)
    for sequence in (0, 2):
        with pytest.raises(ValueError, match="a snapshot of"):
            journal.keep(snapshot(sequence))
    assert len(list(journal.read())) == 1
    assert list(journal.snapshots()) == []


@on_all
def test_every_event_of_a_run_comes_back_as_it_was(journal: Journal) -> None:
    world = World()
    world.run()
    kept = [Record(sequence, now_s, event) for sequence, (now_s, event) in enumerate(world.events)]
    journal.append(kept)
    assert list(journal.read()) == kept


@on_all
def test_the_last_two_snapshots_stay_and_the_events_since_the_first_of_them(journal: Journal) -> None:
    journal.append(records(Ticked(), checked("x")))
    journal.keep(snapshot(2))
    assert list(journal.snapshots()) == [snapshot(2)]
    assert len(list(journal.read())) == 2, "it is the only one, and might be damaged"
    journal.append(records(Ticked(), first=2))
    journal.keep(snapshot(3, b"other"))
    assert list(journal.snapshots()) == [snapshot(3, b"other"), snapshot(2)]
    assert list(journal.read(2)) == records(Ticked(), first=2)
    with pytest.raises(DataError, match="holds those from 2 on"):
        list(journal.read(1))
    journal.append(records(checked("y"), checked("z"), first=3))
    journal.keep(snapshot(5))
    assert [each.sequence for each in journal.snapshots()] == [5, 3]
    assert len(list(journal.snapshots())) == SNAPSHOTS_KEPT
    assert list(journal.read(3)) == records(checked("y"), checked("z"), first=3)
    journal.append(records(Ticked(), first=5))
    assert list(journal.read(5)) == records(Ticked(), first=5)


@on_all
def test_a_snapshot_that_is_kept_again_takes_the_place_of_the_first(journal: Journal) -> None:
    journal.append(records(Ticked()))
    journal.keep(snapshot(1))
    journal.keep(snapshot(1, b"again"))
    assert list(journal.snapshots()) == [snapshot(1, b"again")]
    assert len(list(journal.read())) == 1


@on_all
def test_a_restart_from_a_snapshot_is_a_restart_from_the_beginning(journal: Journal) -> None:
    """Of a journal that was compacted again and again; from the newest snapshot, and from the one before."""
    world = World()
    world.run()
    kept = [Record(number, now_s, event) for number, (now_s, event) in enumerate(world.events)]
    live = OrchestratorCore(world.spec, random.Random(7))
    for start in range(0, len(kept), 40):
        batch = kept[start : start + 40]
        journal.append(batch)
        for record in batch:
            live.handle(record.event, record.now_s)
        if len(batch) == 40:
            journal.keep(Snapshot.of(batch[-1].sequence + 1, batch[-1].now_s, live.num_entries, live.snapshot()))
    newest, before = journal.snapshots()
    for num_known, first in [(newest.num_entries, newest.sequence), (newest.num_entries - 1, before.sequence)]:
        ledger = MemoryLedger(world.spec.digest)
        ledger.append(world.recorded[:num_known])
        twin = OrchestratorCore(world.spec, random.Random(1))
        assert replay(twin, journal, ledger) == Replayed(len(kept), kept[-1].now_s, len(kept) - first)
        assert twin.digest() == live.digest() == world.core.digest()
        assert ledger.page(0).head == twin.ledger_digest
        assert ledger.num_entries == len(world.recorded), "the ledger got what it lacked"
    with pytest.raises(DataError, match=r"entries, of which 3 are there; and event 0 is in snapshots only"):
        ledger = MemoryLedger(world.spec.digest)
        ledger.append(world.recorded[:3])
        replay(OrchestratorCore(world.spec, random.Random(1)), journal, ledger)


def test_a_ledger_that_tells_something_else_than_the_snapshot_is_found() -> None:
    world = World()
    world.run()
    journal = MemoryJournal(Header(world.spec.digest, b"s" * 32))
    journal.append([Record(number, now_s, event) for number, (now_s, event) in enumerate(world.events)])
    journal.keep(Snapshot.of(len(world.events), world.now_s, world.core.num_entries, world.core.snapshot()))
    ledger = MemoryLedger(world.spec.digest)
    ledger.append([*world.recorded[:-1], replace(world.recorded[-1], digest=Digest("d" * 64))])
    with pytest.raises(DataError, match="not those that follow from the journal"):
        replay(OrchestratorCore(world.spec, random.Random(1)), journal, ledger)


@dataclass
class Database:
    """The same journal, opened again and again."""

    address: str

    def open(self, change: Callable[[Header], Header] = lambda header: header) -> SqlJournal:
        return SqlJournal(self.address, change(HEADER))

    def execute(self, *statements: str) -> None:
        """What others do to it."""
        engine = sql.create_engine(parse_address(self.address), poolclass=sql.NullPool)
        with engine.begin() as connection:
            for statement in statements:
                connection.exec_driver_sql(statement)


@pytest.fixture
def database(address: str) -> Database:
    return Database(address)


@on_databases
def test_a_journal_goes_on_where_it_ended_and_keeps_its_secret(database: Database) -> None:
    first = database.open()
    first.append(records(Ticked(), Ticked()))
    first.close()
    second = database.open(lambda header: replace(header, secret=b"t" * 32))
    assert second.header == HEADER
    second.append(records(checked("x"), first=2))
    assert list(second.read()) == records(Ticked(), Ticked(), checked("x"))
    second.keep(snapshot(3))
    second.append(records(Ticked(), first=3))
    second.keep(snapshot(4))
    second.close()
    with closing(database.open()) as third:
        assert third.next_sequence == 4
        assert list(third.read(3)) == records(Ticked(), first=3)
        third.keep(snapshot(4))
        third.append(records(Ticked(), first=4))
        third.keep(snapshot(5))
    with closing(database.open()) as fourth:
        assert list(fourth.snapshots()) == [snapshot(5), snapshot(4)]
        with pytest.raises(DataError, match="holds those from 4 on"):
            list(fourth.read(3))


@on_databases
def test_a_journal_of_another_run_or_version_is_refused(database: Database) -> None:
    database.open().close()
    with pytest.raises(ConfigError, match="another folder"):
        database.open(lambda header: replace(header, run_digest=Digest("c" * 64)))
    with pytest.raises(ConfigError, match="another version"):
        database.open(lambda header: replace(header, format_version=99))
    database.open().close()
    database.execute("UPDATE journal_version SET version_num = '9999'")
    with pytest.raises(ConfigError, match=r"another version \(9999, this one knows up to"):
        database.open()


@on_databases
def test_a_journal_in_use_is_refused(database: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("orion.orchestrator.sql_journal._LOCK_TIMEOUT_S", 0.1)
    journal = database.open()
    with pytest.raises(ConfigError, match="another orchestrator"):
        database.open()
    journal.append(records(Ticked()))
    journal.close()
    database.open().close()


@on_databases
def test_what_holds_something_else_is_refused_and_left_alone(database: Database) -> None:
    database.execute("CREATE TABLE events (content INTEGER)")
    with pytest.raises(ConfigError, match="something else than a journal"):
        database.open()
    database.execute("INSERT INTO events VALUES (1)")


@on_databases
def test_a_batch_is_kept_wholly_or_not_at_all(database: Database, kind: str) -> None:
    database.open().close()
    if kind == "sqlite":
        database.execute(
            "CREATE TRIGGER full_disk BEFORE INSERT ON events WHEN NEW.sequence = 2 "
            "BEGIN SELECT RAISE(ABORT, 'disk full'); END"
        )
    else:
        database.execute(
            "CREATE FUNCTION fail() RETURNS trigger AS $$ BEGIN "
            "RAISE EXCEPTION 'disk full' USING ERRCODE = 'integrity_constraint_violation'; END $$ LANGUAGE plpgsql",
            "CREATE TRIGGER full_disk BEFORE INSERT ON events FOR EACH ROW WHEN (NEW.sequence = 2) "
            "EXECUTE FUNCTION fail()",
        )
    with closing(database.open()) as journal:
        journal.append(records(Ticked()))
        with pytest.raises(sql.exc.IntegrityError, match="disk full"):
            journal.append(records(Ticked(), Ticked(), first=1))
        assert len(list(journal.read())) == 1
        journal.append(records(Ticked(), first=1))


@on_databases
def test_a_damaged_snapshot_is_noticed_and_the_one_before_is_used(database: Database) -> None:
    world = World()
    world.run()
    header = Header(world.spec.digest, b"s" * 32)
    core, ledger = OrchestratorCore(world.spec, random.Random(7)), MemoryLedger(world.spec.digest)
    ledger.append(world.recorded)
    with closing(SqlJournal(database.address, header)) as journal:
        for number, (now_s, event) in enumerate(world.events[:90]):
            journal.append([Record(number, now_s, event)])
            core.handle(event, now_s)
            if number % 30 == 29:
                journal.keep(Snapshot.of(number + 1, now_s, core.num_entries, core.snapshot()))
    database.execute("UPDATE snapshots SET state = substr(state, 1, 100) WHERE sequence = 90")
    with closing(SqlJournal(database.address, header)) as journal:
        twin = OrchestratorCore(world.spec, random.Random(1))
        assert replay(twin, journal, ledger) == Replayed(90, world.events[89][0], 30)
        assert twin.digest() == core.digest()
    database.execute("UPDATE snapshots SET digest = 'x'")
    with closing(SqlJournal(database.address, header)) as journal, pytest.raises(DataError, match="60 is damaged; and"):
        replay(OrchestratorCore(world.spec, random.Random(1)), journal, ledger)


@on_databases
def test_a_journal_of_before_there_were_snapshots_is_brought_up_to_date(database: Database, kind: str) -> None:
    world = World()
    world.run()
    kept = [Record(number, now_s, event) for number, (now_s, event) in enumerate(world.events)]
    with closing(database.open()) as journal:
        journal.append(kept)
    # What is left is what the version before there were migrations made, to the letter.
    database.execute("DROP TABLE snapshots", "DROP TABLE journal_version")
    if kind == "postgres":
        with pytest.raises(ConfigError, match="something else"):
            database.open()  # there were only files then
        return
    with closing(database.open()) as journal:
        assert journal.header == HEADER
        assert list(journal.read()) == kept
        journal.keep(snapshot(len(kept)))
        assert len(list(journal.snapshots())) == 1


def test_the_newest_migration_is_the_one_that_is_expected_and_makes_the_tables_that_are_used(tmp_path: Path) -> None:
    config = Config()
    config.set_main_option("script_location", "orion.orchestrator:migrations")
    config.set_main_option("path_separator", "os")
    assert ScriptDirectory.from_config(config).get_heads() == [NEWEST]
    database = Database(f"sqlite:///{tmp_path / 'j'}")
    database.open().close()
    engine = sql.create_engine(parse_address(database.address), poolclass=sql.NullPool)
    with engine.connect() as connection:
        context = MigrationContext.configure(connection, opts={"version_table": VERSION_TABLE, "compare_type": True})
        assert compare_metadata(context, METADATA) == []


def test_a_file_that_is_no_journal_is_refused(tmp_path: Path) -> None:
    (tmp_path / "j").write_text("not a database, and longer than the header of one, so that it is read\n" * 20)
    with pytest.raises(ConfigError, match="journal"):
        Database(f"sqlite:///{tmp_path / 'j'}").open()


def test_an_address_that_means_no_database_is_refused() -> None:
    for address in ("nonsense", "mysql://host/name", "sqlite://", "postgresql://host"):
        with pytest.raises(ConfigError, match="address is sqlite:///PATH or postgresql://"):
            SqlJournal(address, HEADER)
    with pytest.raises(ConfigError) as failed:
        SqlJournal("postgresql://me:secret@127.0.0.1:1/name", HEADER)
    assert "127.0.0.1:1/name" in str(failed.value) and "secret" not in str(failed.value)


def test_the_disk_that_a_journal_takes_is_bounded(tmp_path: Path) -> None:
    path = tmp_path / "j"
    journal = SqlJournal(f"sqlite:///{path}", HEADER)
    snapshot_bytes, num_snapshots = 500_000, 40
    for number in range(num_snapshots):
        journal.append(records(*[checked("x")] * 20, first=20 * number))
        journal.keep(snapshot(20 * (number + 1), random.Random(number).randbytes(snapshot_bytes)))
    size_bytes = sum(each.stat().st_size for each in tmp_path.iterdir())
    assert size_bytes < 0.5 * num_snapshots * snapshot_bytes
    journal.close()
