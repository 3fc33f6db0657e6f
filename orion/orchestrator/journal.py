"""The journal: every event in order, durable before anybody sees what it caused.

Owns how events are kept; knows nothing of what they mean. A restart replays them through a fresh core and stands where
the old one stood. Invariants: sequence numbers are consecutive from 0; a batch is kept wholly or not at all; a journal
belongs to one run, and to one process at a time.
"""

from collections.abc import Generator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Protocol

import sqlalchemy as sql
from blake3 import blake3
from sqlalchemy.exc import DatabaseError

from orion.common.errors import ConfigError
from orion.common.ids import Digest
from orion.orchestrator.events import Event, event_from_json, event_to_json

FORMAT_VERSION = 3
"""Raised when an event changes its meaning, so that old events are not replayed into another state."""
SECRET_BYTES = 32
_LOCK_TIMEOUT_S = 1.0
_READ_ROWS = 1_000


@dataclass(frozen=True, slots=True)
class Header:
    """What a journal is about; written once."""

    run_digest: Digest
    secret: bytes
    """Known to this run's orchestrator only: seed of its draws, and key of its object URLs."""
    format_version: int = FORMAT_VERSION

    def derived(self, purpose: str) -> bytes:
        """32 secret bytes for one purpose."""
        return blake3(self.secret, derive_key_context=f"orion orchestrator {purpose}").digest()


@dataclass(frozen=True, slots=True)
class Record:
    """An event, its place, and the time at which it was taken."""

    sequence: int
    now_s: float
    event: Event


class Journal(Protocol):
    """Where events are kept. Calls block and come one at a time."""

    @property
    def header(self) -> Header: ...

    def append(self, records: Sequence[Record]) -> None:
        """Keeps a batch; durable on return. Its numbers follow those before without a gap."""
        ...

    def read(self, from_sequence: int = 0) -> Generator[Record, None, None]:
        """All records from one on, in order."""
        ...

    def close(self) -> None:
        """Lets go of it; nothing may be called afterwards."""
        ...


class MemoryJournal:
    """A journal for tests and the simulator; a restart is another core that reads the same object."""

    def __init__(self, header: Header) -> None:
        self.header = header
        self._rows: list[tuple[float, bytes]] = []

    def append(self, records: Sequence[Record]) -> None:
        _check_consecutive(records, len(self._rows))
        self._rows.extend((record.now_s, event_to_json(record.event)) for record in records)

    def read(self, from_sequence: int = 0) -> Generator[Record, None, None]:
        for sequence in range(from_sequence, len(self._rows)):
            now_s, event = self._rows[sequence]
            yield Record(sequence, now_s, event_from_json(event))

    def close(self) -> None:
        """Nothing to let go of."""


_METADATA = sql.MetaData()
_HEADER = sql.Table(
    "header",
    _METADATA,
    sql.Column("id", sql.Integer, primary_key=True),
    sql.Column("format_version", sql.Integer, nullable=False),
    sql.Column("run_digest", sql.String, nullable=False),
    sql.Column("secret", sql.LargeBinary, nullable=False),
)
_EVENTS = sql.Table(
    "events",
    _METADATA,
    sql.Column("sequence", sql.Integer, primary_key=True, autoincrement=False),
    sql.Column("now_s", sql.Float, nullable=False),
    sql.Column("event", sql.LargeBinary, nullable=False),
)

_PRAGMAS = MappingProxyType(
    {
        # One process owns a journal: a second one fails at once instead of writing in between.
        "locking_mode": "EXCLUSIVE",
        "journal_mode": "WAL",
        # NORMAL would lose the newest commits with the machine's power, and with them answers that miners rely on. As
        # a commit takes all events that have gathered, the sync is paid per batch, not per event.
        "synchronous": "FULL",
    }
)


class SqliteJournal:
    """A journal in one SQLite file."""

    def __init__(self, path: Path, header: Header) -> None:
        """Opens the journal of a run, or starts it with the given header; an existing one keeps its own secret.

        Raises ConfigError when the file belongs to another run or version, is in use, or is no journal. Blocks.
        """
        self._path = path
        self._engine = sql.create_engine(
            f"sqlite:///{path}",
            poolclass=sql.StaticPool,
            # Calls come one at a time, but not always from one thread. The owner of a locked file keeps it for long.
            connect_args={"check_same_thread": False, "timeout": _LOCK_TIMEOUT_S},
        )
        try:
            self._connection = self._engine.connect()
            self.header = self._open(header)
            newest = self._connection.scalar(sql.select(sql.func.max(_EVENTS.c.sequence)))
            self._connection.rollback()
        except DatabaseError as error:
            self._engine.dispose()
            raise ConfigError(f"journal {path}: {error.orig}; is another orchestrator using it?") from error
        except ConfigError:
            self.close()
            raise
        self._next_sequence: int = 0 if newest is None else newest + 1

    def append(self, records: Sequence[Record]) -> None:
        _check_consecutive(records, self._next_sequence)
        rows = [
            {"sequence": record.sequence, "now_s": record.now_s, "event": event_to_json(record.event)}
            for record in records
        ]
        with self._connection.begin():
            self._connection.execute(sql.insert(_EVENTS), rows)
        self._next_sequence += len(records)

    def read(self, from_sequence: int = 0) -> Generator[Record, None, None]:
        query = sql.select(_EVENTS).where(_EVENTS.c.sequence >= from_sequence).order_by(_EVENTS.c.sequence)
        with self._connection.begin():
            for row in self._connection.execution_options(yield_per=_READ_ROWS).execute(query):
                yield Record(row.sequence, row.now_s, event_from_json(row.event))

    def close(self) -> None:
        self._connection.close()
        self._engine.dispose()

    def _open(self, header: Header) -> Header:
        for name, value in _PRAGMAS.items():
            self._connection.exec_driver_sql(f"PRAGMA {name} = {value}")
        self._connection.rollback()
        with self._connection.begin():
            _METADATA.create_all(self._connection)
            row = self._connection.execute(sql.select(_HEADER)).one_or_none()
            if row is None:
                fields = {"run_digest": header.run_digest, "secret": header.secret}
                self._connection.execute(sql.insert(_HEADER), {"format_version": header.format_version, **fields})
                return header
        if row.format_version != header.format_version:
            raise ConfigError(
                f"journal {self._path} was written by another version ({row.format_version}, this one writes "
                f"{header.format_version}); use that version or another folder"
            )
        if row.run_digest != header.run_digest:
            raise ConfigError(
                f"journal {self._path} belongs to the run {row.run_digest[:16]}…, not to {header.run_digest[:16]}…: "
                "the run file has changed since; restore it or use another folder"
            )
        return Header(Digest(row.run_digest), row.secret, row.format_version)


def _check_consecutive(records: Sequence[Record], next_sequence: int) -> None:
    numbers = [record.sequence for record in records]
    if numbers != list(range(next_sequence, next_sequence + len(records))):
        raise ValueError(f"records {numbers} do not follow number {next_sequence - 1}")
