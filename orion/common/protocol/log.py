"""The canonical form of a miner's log, over which it commits. Pure."""

from collections.abc import Sequence

from orion.common.ids import Digest
from orion.common.protocol.merkle import Frontier
from orion.common.protocol.records import LogEntry


def entry_bytes(entry: LogEntry) -> bytes:
    """The entry as a record of the log's Merkle tree: its JSON, fields in their order, without blanks."""
    return entry.model_dump_json().encode()


def log_root(entries: Sequence[LogEntry]) -> Digest:
    """Merkle root of the ordered log."""
    frontier = Frontier()
    for entry in entries:
        frontier.append(entry_bytes(entry))
    return frontier.root
