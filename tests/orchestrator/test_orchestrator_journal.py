"""The journal's contract, over every kind of journal; and what only a file can go through."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import sqlalchemy as sql
from orchestrator_world import World

from orion.common.errors import ConfigError
from orion.common.ids import Digest
from orion.common.protocol.messages import ObjectRef
from orion.orchestrator.events import Event, ObjectChecked, Ticked
from orion.orchestrator.journal import Header, Journal, MemoryJournal, Record, SqliteJournal

HEADER = Header(Digest("a" * 64), b"s" * 32)


@pytest.fixture(params=["memory", "sqlite"])
def journal(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Journal]:
    opened: Journal = MemoryJournal(HEADER) if request.param == "memory" else SqliteJournal(tmp_path / "j", HEADER)
    yield opened
    opened.close()


def records(*events: Event, first: int = 0) -> list[Record]:
    return [Record(first + place, 1000.0 + 0.1 * (first + place), event) for place, event in enumerate(events)]


def checked(name: str) -> ObjectChecked:
    return ObjectChecked(ref=ObjectRef(key=name, digest=Digest("b" * 64), size_bytes=3), durable=True)


def test_what_was_appended_is_read_in_order(journal: Journal) -> None:
    assert list(journal.read()) == []
    journal.append(records(Ticked(), checked("x")))
    journal.append(records(checked("y"), first=2))
    assert list(journal.read()) == records(Ticked(), checked("x"), checked("y"))
    assert list(journal.read(2)) == records(checked("y"), first=2)
    assert list(journal.read(3)) == []
    assert journal.header == HEADER


def test_a_gap_or_a_repeated_number_is_a_mistake_of_ours(journal: Journal) -> None:
    journal.append(records(Ticked()))
    for wrong in (records(Ticked()), records(Ticked(), first=2), list(reversed(records(Ticked(), Ticked(), first=1)))):
        with pytest.raises(ValueError, match="follow"):
            journal.append(wrong)
    assert len(list(journal.read())) == 1


def test_every_event_of_a_run_comes_back_as_it_was(journal: Journal) -> None:
    world = World()
    world.run()
    kept = [Record(sequence, now_s, event) for sequence, (now_s, event) in enumerate(world.events)]
    journal.append(kept)
    assert list(journal.read()) == kept


def reopen(folder: Path, change: Callable[[Header], Header] = lambda header: header) -> SqliteJournal:
    return SqliteJournal(folder / "j", change(HEADER))


def test_a_file_goes_on_where_it_ended_and_keeps_its_secret(tmp_path: Path) -> None:
    first = reopen(tmp_path)
    first.append(records(Ticked(), Ticked()))
    first.close()
    second = reopen(tmp_path, lambda header: replace(header, secret=b"t" * 32))
    assert second.header == HEADER
    second.append(records(checked("x"), first=2))
    assert list(second.read()) == records(Ticked(), Ticked(), checked("x"))
    second.close()


def test_a_file_of_another_run_or_version_is_refused(tmp_path: Path) -> None:
    reopen(tmp_path).close()
    with pytest.raises(ConfigError, match="another folder"):
        reopen(tmp_path, lambda header: replace(header, run_digest=Digest("c" * 64)))
    with pytest.raises(ConfigError, match="another version"):
        reopen(tmp_path, lambda header: replace(header, format_version=99))
    reopen(tmp_path).close()


def test_a_file_in_use_is_refused(tmp_path: Path) -> None:
    journal = reopen(tmp_path)
    with pytest.raises(ConfigError, match="another orchestrator"):
        reopen(tmp_path)
    journal.close()
    reopen(tmp_path).close()


def test_a_file_that_is_no_journal_is_refused(tmp_path: Path) -> None:
    (tmp_path / "j").write_text("not a database, and longer than the header of one, so that it is read\n" * 20)
    with pytest.raises(ConfigError, match="journal"):
        reopen(tmp_path)


def test_a_batch_is_kept_wholly_or_not_at_all(tmp_path: Path) -> None:
    journal = reopen(tmp_path)
    journal.append(records(Ticked()))
    engine = sql.create_engine(f"sqlite:///{tmp_path / 'j'}", poolclass=sql.NullPool)
    journal.close()
    with engine.begin() as connection:
        connection.exec_driver_sql(
            "CREATE TRIGGER full BEFORE INSERT ON events WHEN NEW.sequence = 2 "
            "BEGIN SELECT RAISE(ABORT, 'disk full'); END"
        )
    journal = reopen(tmp_path)
    with pytest.raises(sql.exc.IntegrityError, match="disk full"):
        journal.append(records(Ticked(), Ticked(), first=1))
    assert len(list(journal.read())) == 1
    journal.append(records(Ticked(), first=1))
    journal.close()
