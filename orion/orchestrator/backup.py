"""A run's journal and ledger as a folder that can be taken away, and back again.

Owns what belongs to a backup and in which order it is copied. A backup holds the run's secret. Invariants: it is of
two moments, the ledger's before the journal's, so that the journal tells all that the ledger lacks; it is whole or has
another name; the orchestrator may be at work meanwhile and waits for nothing.
"""

import shutil
import sqlite3
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path

import sqlalchemy as sql
from sqlalchemy.exc import DatabaseError

from orion.common.errors import ConfigError, DataError
from orion.orchestrator.config import JOURNAL_FILE
from orion.orchestrator.database import make_engine, parse_address, shown, sqlite_path
from orion.orchestrator.journal_tables import EVENTS, HEADER, SNAPSHOTS
from orion.orchestrator.ledger_store import LEDGER_FILE, copy_ledger
from orion.orchestrator.migrate import NEWEST, version_of
from orion.orchestrator.sql_journal import owned

_ROWS_AT_ONCE = 500
_ATTEMPTS_MAX = 5
"""The journal may forget just what the copy of the ledger lacks, when two snapshots come between the two copies."""


@dataclass(frozen=True, slots=True)
class BackupReport:
    """What was copied."""

    run_digest: str
    num_events: int
    """Ever taken, those that only snapshots hold included."""
    num_events_kept: int
    snapshots: tuple[int, ...]
    """The events that each of them comes before."""
    num_entries: int
    """Of the public ledger."""


def back_up(state_folder: Path, journal_address: str, target: Path) -> BackupReport:
    """Copies a run's journal and ledger to a new folder. Raises ConfigError or DataError: then there is none."""
    if target.exists():
        raise ConfigError(f"{target} is there already; choose a new folder")
    part = target.with_name(target.name + ".part")
    part.mkdir(parents=True)
    try:
        report = _copy_until_it_fits(state_folder / LEDGER_FILE, journal_address, part)
        part.rename(target)
    finally:
        if part.exists():
            shutil.rmtree(part)
    return report


def restore(source: Path, state_folder: Path, journal_address: str) -> BackupReport:
    """Fills an empty journal and a state folder without a ledger from a backup.

    Raises ConfigError when there is something already, DataError when the backup is none. Blocks.
    """
    ledger = state_folder / LEDGER_FILE
    for path in (source / JOURNAL_FILE, source / LEDGER_FILE):
        if not path.is_file():
            raise DataError(f"{source} is no backup: it has no {path.name}")
    if ledger.exists():
        raise ConfigError(f"{ledger} is there already; restore to a new folder")
    state_folder.mkdir(parents=True, exist_ok=True)
    with owned(journal_address) as target:
        with target.begin():
            if target.execute(sql.select(HEADER)).first() is not None:
                raise ConfigError(f"{shown(journal_address)} holds a journal already; restore to a new one")
        part = ledger.with_name(ledger.name + ".part")
        num_entries = copy_ledger(source / LEDGER_FILE, part)
        report = _copy_journal(f"sqlite:///{source / JOURNAL_FILE}", target)
        part.rename(ledger)
    return replace(report, num_entries=num_entries)


def _copy_until_it_fits(ledger: Path, journal_address: str, folder: Path) -> BackupReport:
    for _ in range(_ATTEMPTS_MAX):
        for path in folder.iterdir():
            path.unlink()
        num_entries = copy_ledger(ledger, folder / LEDGER_FILE)
        with owned(f"sqlite:///{folder / JOURNAL_FILE}") as target:
            report = _copy_journal(journal_address, target)
            with target.begin():
                needed: int | None = target.scalar(sql.select(sql.func.min(SNAPSHOTS.c.num_entries)))
        _make_one_file(folder / JOURNAL_FILE)
        is_complete = report.num_events_kept == report.num_events
        if is_complete or needed is None or needed <= num_entries:
            return replace(report, num_entries=num_entries)
    raise DataError(f"the journal forgot events faster than {ledger} could be copied; try again")


def _make_one_file(journal: Path) -> None:
    """So that a backup can be read where nothing can be written, which WAL mode needs."""
    with closing(sqlite3.connect(journal)) as connection:
        connection.execute("PRAGMA journal_mode = DELETE")
    journal.with_name(f"{journal.name}.lock").unlink()


def _copy_journal(address: str, target: sql.Connection) -> BackupReport:
    """Copies a journal as it is at one moment into empty tables."""
    url, name = parse_address(address), shown(address)
    path = sqlite_path(url)
    if path is not None and not path.is_file():
        raise DataError(f"no journal at {path}")
    engine = make_engine(url, {})
    try:
        with engine.connect() as source:
            if path is None:
                source.execution_options(isolation_level="REPEATABLE READ")
            with source.begin(), target.begin():
                version = version_of(source)
                if version != NEWEST:
                    raise ConfigError(
                        f"journal {name} is of another version ({version}, this one copies {NEWEST}); "
                        "use that version, or start an orchestrator of this one on it first"
                    )
                for table in (HEADER, SNAPSHOTS, EVENTS):
                    _copy_table(source, target, table)
                return _report(target)
    except DatabaseError as error:
        raise DataError(f"journal {name}: {error.orig}") from error
    finally:
        engine.dispose()


def _copy_table(source: sql.Connection, target: sql.Connection, table: sql.Table) -> None:
    rows = source.execute(sql.select(table), execution_options={"yield_per": _ROWS_AT_ONCE})
    for batch in rows.mappings().partitions():
        target.execute(sql.insert(table), [dict(row) for row in batch])


def _report(connection: sql.Connection) -> BackupReport:
    run_digest = connection.scalar(sql.select(HEADER.c.run_digest))
    if run_digest is None:
        raise DataError("the journal is empty: no run has begun on it")
    kept: int = connection.scalar(sql.select(sql.func.count()).select_from(EVENTS)) or 0
    newest: int | None = connection.scalar(sql.select(sql.func.max(EVENTS.c.sequence)))
    snapshots: Sequence[int] = connection.scalars(sql.select(SNAPSHOTS.c.sequence).order_by(SNAPSHOTS.c.sequence)).all()
    num_events = newest + 1 if newest is not None else max(snapshots, default=0)
    return BackupReport(run_digest, num_events, kept, tuple(snapshots), 0)
