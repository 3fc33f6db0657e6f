"""The journal in a database: one SQLite file in WAL mode, or PostgreSQL.

Owns the connection, on which everything is done, and with it the right to write: a second process is refused, and a
process whose connection is gone has lost that right and can write nothing more. Its tables are `journal_tables`, how
they came to be is in `migrations`.
"""

import fcntl
import zlib
from collections.abc import Generator, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import MappingProxyType

import sqlalchemy as sql
from sqlalchemy.exc import DatabaseError

from orion.common.errors import ConfigError
from orion.common.ids import Digest
from orion.orchestrator.database import make_engine, parse_address, shown, sqlite_path
from orion.orchestrator.events import event_from_json, event_to_json
from orion.orchestrator.journal import (
    SNAPSHOTS_KEPT,
    Header,
    Record,
    Snapshot,
    check_consecutive,
    check_covers,
    check_kept,
)
from orion.orchestrator.journal_tables import EVENTS, HEADER, SNAPSHOTS
from orion.orchestrator.migrate import migrate

_LOCK_TIMEOUT_S = 5.0
"""What the server of a database gets to notice that the process before has died."""
_READ_ROWS = 1_000
_COMPRESSION = 1
"""Of snapshots: they shrink to a tenth, at 100 MB/s or so."""
_LOCK_NAME = "orion journal"

_SQLITE_PRAGMAS = MappingProxyType(
    {
        "journal_mode": "WAL",
        # NORMAL would lose the newest commits with the machine's power, and with them answers that miners rely on. As
        # a commit takes all events that have gathered, the sync is paid per batch, not per event.
        "synchronous": "FULL",
        # What dropping many events at once has made of it is cut off again.
        "journal_size_limit": "67108864",
    }
)


class SqlJournal:
    """A journal in a database."""

    def __init__(self, address: str, header: Header) -> None:
        """Opens the journal of a run, or starts it with the given header; an existing one keeps its own secret.

        Raises ConfigError when it belongs to another run or version, is in use, cannot be reached or is no journal.
        Blocks.
        """
        self._name = shown(address)
        with ExitStack() as stack:
            self._connection = stack.enter_context(owned(address))
            self.header = self._open(header)
            self._first_sequence, self._next_sequence = self._bounds()
            self._opened = stack.pop_all()

    @property
    def next_sequence(self) -> int:
        return self._next_sequence

    def append(self, records: Sequence[Record]) -> None:
        check_consecutive(records, self._next_sequence)
        rows = [
            {"sequence": record.sequence, "now_s": record.now_s, "event": event_to_json(record.event)}
            for record in records
        ]
        with self._connection.begin():
            self._connection.execute(sql.insert(EVENTS), rows)
        self._next_sequence += len(records)

    def read(self, from_sequence: int = 0) -> Generator[Record, None, None]:
        check_kept(from_sequence, self._first_sequence)
        query = sql.select(EVENTS).where(EVENTS.c.sequence >= from_sequence).order_by(EVENTS.c.sequence)
        with self._connection.begin():
            for row in self._connection.execute(query, execution_options={"yield_per": _READ_ROWS}):
                yield Record(row.sequence, row.now_s, event_from_json(row.event))

    def keep(self, snapshot: Snapshot) -> None:
        check_covers(snapshot, self._next_sequence)
        with self._connection.begin():
            self._connection.execute(sql.delete(SNAPSHOTS).where(SNAPSHOTS.c.sequence == snapshot.sequence))
            self._connection.execute(sql.insert(SNAPSHOTS), _row_of(snapshot))
            newest = sql.select(SNAPSHOTS.c.sequence).order_by(SNAPSHOTS.c.sequence.desc()).limit(SNAPSHOTS_KEPT)
            kept = list(self._connection.scalars(newest))
            first_sequence = kept[-1] if len(kept) == SNAPSHOTS_KEPT else self._first_sequence
            self._connection.execute(sql.delete(SNAPSHOTS).where(SNAPSHOTS.c.sequence < kept[-1]))
            self._connection.execute(sql.delete(EVENTS).where(EVENTS.c.sequence < first_sequence))
        self._first_sequence = first_sequence

    def snapshots(self) -> Generator[Snapshot, None, None]:
        with self._connection.begin():
            numbers = list(self._connection.scalars(sql.select(SNAPSHOTS.c.sequence)))
        for sequence in sorted(numbers, reverse=True):
            with self._connection.begin():
                row = self._connection.execute(sql.select(SNAPSHOTS).where(SNAPSHOTS.c.sequence == sequence)).one()
            yield Snapshot(row.sequence, row.now_s, row.num_entries, _unpacked(row.state), Digest(row.digest))

    def close(self) -> None:
        self._opened.close()

    def _open(self, header: Header) -> Header:
        with self._connection.begin():
            row = self._connection.execute(sql.select(HEADER)).one_or_none()
            if row is None:
                fields = {"run_digest": header.run_digest, "secret": header.secret}
                self._connection.execute(
                    sql.insert(HEADER), {"id": 1, "format_version": header.format_version, **fields}
                )
                return header
        if row.format_version != header.format_version:
            raise ConfigError(
                f"journal {self._name} was written by another version ({row.format_version}, this one writes "
                f"{header.format_version}); use that version or another folder"
            )
        if row.run_digest != header.run_digest:
            raise ConfigError(
                f"journal {self._name} belongs to the run {row.run_digest[:16]}…, not to {header.run_digest[:16]}…: "
                "the run file has changed since; restore it or use another folder"
            )
        return Header(Digest(row.run_digest), row.secret, row.format_version)

    def _bounds(self) -> tuple[int, int]:
        """The first event that is kept, and the next one to come."""
        with self._connection.begin():
            first, newest = self._connection.execute(
                sql.select(sql.func.min(EVENTS.c.sequence), sql.func.max(EVENTS.c.sequence))
            ).one()
            snapshot = self._connection.scalar(sql.select(sql.func.max(SNAPSHOTS.c.sequence)))
        if newest is None:
            return snapshot or 0, snapshot or 0
        return first, newest + 1


@contextmanager
def owned(address: str) -> Iterator[sql.Connection]:
    """A connection to a journal's database that holds the right to write, with all tables there.

    Raises ConfigError when another process holds it, when the database cannot be reached, and when it holds something
    else or a newer journal.
    """
    url, name = parse_address(address), shown(address)
    path = sqlite_path(url)
    with ExitStack() as stack:
        engine = make_engine(url, _SQLITE_PRAGMAS)
        stack.callback(engine.dispose)
        try:
            if path is not None:
                stack.enter_context(_FileLock(path))
            connection = stack.enter_context(engine.connect())
            if path is None:
                _lock(connection, name)
            migrate(connection, name)
        except DatabaseError as error:
            raise ConfigError(f"journal {name}: {error.orig}") from error
        yield connection


class _FileLock:
    """The right to write a journal's file; goes with the process that holds it."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def __enter__(self) -> None:
        self._file = self._path.with_name(self._path.name + ".lock").open("wb")
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            self._file.close()
            raise ConfigError(f"journal {self._path} is in use: is another orchestrator using it?") from error

    def __exit__(self, *_: object) -> None:
        self._file.close()


def _lock(connection: sql.Connection, name: str) -> None:
    """The right to write a journal on a server; goes with the connection."""
    with connection.begin():
        connection.exec_driver_sql(f"SET LOCAL lock_timeout = {int(1000 * _LOCK_TIMEOUT_S)}")
        try:
            connection.execute(
                sql.text("SELECT pg_advisory_lock(hashtext(:name), hashtext(current_schema()))"), {"name": _LOCK_NAME}
            )
        except DatabaseError as error:
            raise ConfigError(f"journal {name} is in use: is another orchestrator using it? {error.orig}") from error


def _row_of(snapshot: Snapshot) -> dict[str, object]:
    return {
        "sequence": snapshot.sequence,
        "now_s": snapshot.now_s,
        "num_entries": snapshot.num_entries,
        "digest": snapshot.digest,
        "state": zlib.compress(snapshot.state, _COMPRESSION),
    }


def _unpacked(state: bytes) -> bytes:
    """A damaged one is empty, and no longer has its digest."""
    try:
        return zlib.decompress(state)
    except zlib.error:
        return b""
