"""Keeps a chain in one SQLite file: every block in a transaction of its own, so that a killed process loses none.

Owns the file. Must not know what is in the state. The file holds exactly what `DevChain` needs to go on: the blocks and
the versions of the state within the history, under the settings that can't change (block time, history). Invariant: a
block is in the file wholly or not at all, and no later block without it.
"""

import json
import sqlite3
from collections.abc import Iterator
from dataclasses import asdict, fields
from pathlib import Path

from orion.common.errors import ConfigError, DataError
from orion.devnet.blocks import Block
from orion.devnet.chain import DevChain, Sealed
from orion.devnet.config import DevnetConfig
from orion.devnet.state import Changes

_FORMAT = 1

_SCHEMA = """
CREATE TABLE meta (name TEXT PRIMARY KEY, value TEXT NOT NULL) STRICT;
CREATE TABLE blocks (number INTEGER PRIMARY KEY, parent BLOB, state_root BLOB, extrinsics TEXT NOT NULL) STRICT;
CREATE TABLE versions (key BLOB, block INTEGER, value BLOB, PRIMARY KEY (key, block)) STRICT, WITHOUT ROWID;
CREATE INDEX versions_by_block ON versions (block);
"""


class ChainFile:
    """The file of one chain, held by one process at a time."""

    def __init__(self, path: Path) -> None:
        """Raises DataError when the file can't be opened, or another process holds it."""
        self._path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            self._connection = sqlite3.connect(path, isolation_level=None, timeout=0.5)
            # One process writes; the lock is held until it ends, and the system frees it when the process is killed.
            self._connection.execute("PRAGMA locking_mode=EXCLUSIVE")
            self._connection.execute("PRAGMA journal_mode=WAL")
            self._connection.execute("PRAGMA synchronous=NORMAL")
            self._connection.execute("BEGIN EXCLUSIVE")
            self._connection.execute("COMMIT")
        except sqlite3.Error as error:
            raise DataError(
                f"{path}: can't be opened as a development chain ({error}); is another `orion devnet` using it?"
            ) from error

    def close(self) -> None:
        self._connection.close()

    def load(self, config: DevnetConfig) -> DevChain | None:
        """The chain as it was after its newest block, or None for a new file. Raises ConfigError, DataError."""
        if not self._connection.execute("SELECT 1 FROM sqlite_master WHERE name = 'meta'").fetchone():
            return None
        meta = dict(self._connection.execute("SELECT name, value FROM meta").fetchall())
        if meta.get("format") != str(_FORMAT):
            raise DataError(f"{self._path}: made by another version of the development chain; take a new file")
        kept = DevnetConfig(**json.loads(meta["config"]))
        for field in fields(config):
            ours, theirs = getattr(config, field.name), getattr(kept, field.name)
            if field.name in {"block_ms", "history_blocks"} and ours != theirs:
                raise ConfigError(
                    f"{self._path}: this chain was made with {field.name} = {theirs}, not {ours}; "
                    "start it with the same value, or take a new file"
                )
        return DevChain(kept, list(self._blocks()), list(self._versions()))

    def create(self, config: DevnetConfig, genesis: Sealed) -> None:
        """Puts a new chain into a new file."""
        with _transaction(self._connection):
            for statement in _SCHEMA.strip().split("\n"):
                self._connection.execute(statement)
            rows = [("format", str(_FORMAT)), ("config", json.dumps(asdict(config)))]
            self._connection.executemany("INSERT INTO meta VALUES (?, ?)", rows)
            self._insert(genesis)

    def append(self, sealed: Sealed, first: int) -> None:
        """Adds a block and forgets what only blocks before `first` saw."""
        with _transaction(self._connection):
            self._insert(sealed)
            # The block that has just become the oldest one: what it replaced is seen by nobody any more.
            replaced = "DELETE FROM versions WHERE block < ?1 AND key IN (SELECT key FROM versions WHERE block = ?1)"
            self._connection.execute(replaced, (first,))
            # What is gone since then needs no row to say so.
            self._connection.execute("DELETE FROM versions WHERE block = ? AND value IS NULL", (first,))
            self._connection.execute("DELETE FROM blocks WHERE number < ? AND number > 0", (first,))

    def _insert(self, sealed: Sealed) -> None:
        block = sealed.block
        extrinsics = json.dumps([extrinsic.hex() for extrinsic in block.extrinsics])
        row = (block.number, block.parent, block.state_root, extrinsics)
        self._connection.execute("INSERT INTO blocks VALUES (?, ?, ?, ?)", row)
        changes = [(key, block.number, value) for key, value in sealed.changes.items()]
        self._connection.executemany("INSERT INTO versions VALUES (?, ?, ?)", changes)

    def _blocks(self) -> Iterator[Block]:
        rows = self._connection.execute("SELECT number, parent, state_root, extrinsics FROM blocks ORDER BY number")
        for number, parent, root, extrinsics in rows:
            yield Block(number, parent, root, tuple(bytes.fromhex(each) for each in json.loads(extrinsics)))

    def _versions(self) -> Iterator[tuple[int, Changes]]:
        changes: Changes = {}
        newest: int | None = None
        for block, key, value in self._connection.execute("SELECT block, key, value FROM versions ORDER BY block"):
            if newest is not None and block != newest:
                yield newest, changes
                changes = {}
            newest = block
            changes[key] = value
        if newest is not None:
            yield newest, changes


class _transaction:
    """All of what happens inside, or nothing."""

    def __init__(self, connection: sqlite3.Connection) -> None:
        self._connection = connection

    def __enter__(self) -> None:
        self._connection.execute("BEGIN IMMEDIATE")

    def __exit__(self, kind: object, *_: object) -> None:
        self._connection.execute("COMMIT" if kind is None else "ROLLBACK")
