"""Where the public ledger is kept and read from.

Owns storage only; what an entry says is `orion.common.protocol.entries`. The ledger follows from the journal, entry by
entry and bit by bit, so it lies in a file of its own beside it: readers never wait for the journal's lock, a crash
between the two loses nothing (a restart gives the missing entries again; those that the journal could not give any more
are synced before it forgets their events), and anybody can take a copy away without the orchestrator's secret.
Invariants: sequence numbers are consecutive from 0; what was appended never changes.
"""

import sqlite3
from collections.abc import Generator, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import sqlalchemy as sql
from sqlalchemy.exc import DatabaseError

from orion.common.errors import ConfigError, DataError
from orion.common.ids import Digest
from orion.common.protocol.entries import PAGE_BYTES_MAX, PAGE_ENTRIES_MAX, LedgerPage, entry_from_json, first_digest
from orion.common.protocol.messages import RunInfo
from orion.orchestrator.events import Recorded

LEDGER_FILE = "ledger.sqlite"
_READ_ROWS = 1_000


@dataclass(frozen=True, slots=True)
class StoredPage:
    """Consecutive entries as JSON, and where the ledger ended when they were read."""

    from_sequence: int
    previous: Digest
    entries: tuple[bytes, ...]
    num_entries: int
    head: Digest

    def to_json(self) -> bytes:
        """A `LedgerPage`, without reading the entries again."""
        head = f'"num_entries":{self.num_entries},"head":"{self.head}"'
        start = f'{{"kind":"ledger_page","from_sequence":{self.from_sequence},"previous":"{self.previous}","entries":['
        return start.encode() + b",".join(self.entries) + b"]," + head.encode() + b"}"

    def to_message(self) -> LedgerPage:
        """The same as a message."""
        return LedgerPage(
            from_sequence=self.from_sequence,
            previous=self.previous,
            entries=tuple(entry_from_json(entry) for entry in self.entries),
            num_entries=self.num_entries,
            head=self.head,
        )


class LedgerStore(Protocol):
    """Keeps the entries of one run's ledger. Calls block; one thread appends, others may read."""

    @property
    def num_entries(self) -> int: ...

    def digest_before(self, sequence: int) -> Digest:
        """Digest of the ledger's first `sequence` entries, which are all there."""
        ...

    def append(self, recorded: Sequence[Recorded]) -> None:
        """Keeps further entries; those that are there already must be the same. Raises DataError when they differ."""
        ...

    def sync(self) -> None:
        """Makes durable what was appended so far: then the events that it follows from may be forgotten."""
        ...

    def page(self, from_sequence: int) -> StoredPage:
        """Entries from one on: at most PAGE_ENTRIES_MAX and, beyond the first, PAGE_BYTES_MAX."""
        ...

    def close(self) -> None: ...


class MemoryLedger:
    """A ledger for tests and the simulator."""

    def __init__(self, run_digest: Digest) -> None:
        self._digests = [first_digest(run_digest)]
        self._entries: list[bytes] = []

    @property
    def num_entries(self) -> int:
        return len(self._entries)

    def digest_before(self, sequence: int) -> Digest:
        return self._digests[sequence]

    def append(self, recorded: Sequence[Recorded]) -> None:
        for new in _new_ones(self, recorded):
            self._entries.append(new.entry)
            self._digests.append(new.digest)

    def sync(self) -> None:
        """Ends with its process as it is."""

    def page(self, from_sequence: int) -> StoredPage:
        begin = min(from_sequence, self.num_entries)
        fitting = _fitting(iter(self._entries[begin : begin + PAGE_ENTRIES_MAX]))
        return StoredPage(begin, self._digests[begin], fitting, self.num_entries, self._digests[-1])

    def close(self) -> None:
        """Nothing to let go of."""


_METADATA = sql.MetaData()
_RUN = sql.Table(
    "run",
    _METADATA,
    sql.Column("id", sql.Integer, primary_key=True),
    sql.Column("orchestrator", sql.String, nullable=False),
    sql.Column("run_info", sql.String, nullable=False),
)
_ENTRIES = sql.Table(
    "entries",
    _METADATA,
    sql.Column("sequence", sql.Integer, primary_key=True, autoincrement=False),
    sql.Column("digest", sql.String, nullable=False),
    sql.Column("entry", sql.LargeBinary, nullable=False),
)


class SqliteLedger:
    """A ledger in one SQLite file, with the run that it belongs to."""

    def __init__(self, path: Path, run_info: RunInfo, run_digest: Digest) -> None:
        """Opens a run's ledger or starts it. Raises ConfigError when the file belongs to another run. Blocks."""
        self._first_digest = first_digest(run_digest)
        self._engine = _engine(path)
        try:
            with self._engine.begin() as connection:
                # A lost last commit is given again by the journal, so there is no need to sync each one.
                _METADATA.create_all(connection)
                known = connection.execute(sql.select(_RUN)).one_or_none()
                if known is None:
                    fields = {"orchestrator": run_info.orchestrator, "run_info": run_info.model_dump_json()}
                    connection.execute(sql.insert(_RUN), fields)
                elif known.run_info != run_info.model_dump_json():
                    raise ConfigError(f"ledger {path} belongs to another run; use another folder")
                newest = connection.scalar(sql.select(sql.func.max(_ENTRIES.c.sequence)))
        except DatabaseError as error:
            self._engine.dispose()
            raise ConfigError(f"ledger {path}: {error.orig}") from error
        self._num_entries: int = 0 if newest is None else newest + 1

    @property
    def num_entries(self) -> int:
        return self._num_entries

    def digest_before(self, sequence: int) -> Digest:
        with self._engine.begin() as connection:
            return self._digest_before(connection, sequence)

    def append(self, recorded: Sequence[Recorded]) -> None:
        new = _new_ones(self, recorded)
        if not new:
            return
        rows = [{"sequence": each.sequence, "digest": each.digest, "entry": each.entry} for each in new]
        with self._engine.begin() as connection:
            connection.execute(sql.insert(_ENTRIES), rows)
        self._num_entries += len(rows)

    def sync(self) -> None:
        # A commit that is synced takes along all those before it that were not; this one writes a row as it was.
        with self._engine.connect() as connection:
            connection.exec_driver_sql("PRAGMA synchronous = FULL")
            connection.rollback()
            connection.execute(sql.update(_RUN).values(id=_RUN.c.id))
            connection.commit()
            connection.exec_driver_sql("PRAGMA synchronous = NORMAL")

    def page(self, from_sequence: int) -> StoredPage:
        with self._engine.begin() as connection:
            newest = connection.scalar(sql.select(sql.func.max(_ENTRIES.c.sequence)))
            num_entries: int = 0 if newest is None else newest + 1
            begin = min(from_sequence, num_entries)
            query = (
                sql.select(_ENTRIES.c.entry)
                .where(_ENTRIES.c.sequence >= begin)
                .order_by(_ENTRIES.c.sequence)
                .limit(PAGE_ENTRIES_MAX)
            )
            rows = connection.execution_options(yield_per=32).execute(query)
            entries = _fitting(row.entry for row in rows)
            rows.close()
            previous, head = self._digest_before(connection, begin), self._digest_before(connection, num_entries)
        return StoredPage(begin, previous, entries, num_entries, head)

    def close(self) -> None:
        self._engine.dispose()

    def _digest_before(self, connection: sql.Connection, sequence: int) -> Digest:
        if sequence == 0:
            return self._first_digest
        query = sql.select(_ENTRIES.c.digest).where(_ENTRIES.c.sequence == sequence - 1)
        return Digest(connection.execute(query).scalar_one())


def read_ledger_file(path: Path) -> tuple[RunInfo, Generator[bytes, None, None]]:
    """A run's description and its ledger's entries in order, for an audit; also while an orchestrator writes it.

    Raises DataError when the file is no ledger.
    """
    if not path.is_file():
        raise DataError(f"no ledger at {path}")
    engine = _engine(path)
    try:
        with engine.begin() as connection:
            row = connection.execute(sql.select(_RUN)).one()
        run_info = RunInfo.model_validate_json(row.run_info)
    except (DatabaseError, sql.exc.NoResultFound, ValueError) as error:
        engine.dispose()
        raise DataError(f"{path} is no ledger: {error}") from error
    return run_info, _read_entries(engine)


def copy_ledger(source: Path, target: Path) -> int:
    """Copies a ledger as it is at one moment, also while an orchestrator writes it; how many entries it has.

    Raises DataError when the file is no ledger. Blocks.
    """
    read_ledger_file(source)[1].close()
    with closing(sqlite3.connect(source)) as reading, closing(sqlite3.connect(target)) as writing:
        reading.backup(writing)
        count: int = writing.execute("SELECT count(*) FROM entries").fetchone()[0]
    return count


def _read_entries(engine: sql.Engine) -> Generator[bytes, None, None]:
    query = sql.select(_ENTRIES.c.entry).order_by(_ENTRIES.c.sequence)
    try:
        with engine.begin() as connection:
            for row in connection.execution_options(yield_per=_READ_ROWS).execute(query):
                yield row.entry
    finally:
        engine.dispose()


def _engine(path: Path) -> sql.Engine:
    engine = sql.create_engine(f"sqlite:///{path}", connect_args={"timeout": 10.0})

    @sql.event.listens_for(engine, "connect")
    def _set_up(connection: object, _: object) -> None:
        cursor = connection.cursor()  # type: ignore[attr-defined]
        cursor.execute("PRAGMA journal_mode = WAL")
        cursor.execute("PRAGMA synchronous = NORMAL")
        cursor.close()

    return engine


def _new_ones(store: LedgerStore, recorded: Sequence[Recorded]) -> list[Recorded]:
    """Those that the store does not have yet. Raises DataError for a gap, or when what it has is something else."""
    known = [each for each in recorded if each.sequence < store.num_entries]
    if known and store.digest_before(known[-1].sequence + 1) != known[-1].digest:
        raise DataError(f"entry {known[-1].sequence} of the ledger is not the one that follows from the journal")
    new = [each for each in recorded if each.sequence >= store.num_entries]
    if [each.sequence for each in new] != list(range(store.num_entries, store.num_entries + len(new))):
        raise DataError(f"entries do not follow number {store.num_entries - 1}")
    return new


def _fitting(entries: Iterator[bytes]) -> tuple[bytes, ...]:
    """As many as one page takes, at least one if there is any."""
    taken: list[bytes] = []
    size_bytes = 0
    for entry in entries:
        size_bytes += len(entry)
        if taken and size_bytes > PAGE_BYTES_MAX:
            break
        taken.append(entry)
    return tuple(taken)
