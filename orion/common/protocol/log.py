"""The canonical form of a miner's log, over which it commits. Pure."""

from collections.abc import Sequence

from blake3 import blake3

from orion.common.ids import Digest
from orion.common.protocol.records import LogEntry


def log_root(entries: Sequence[LogEntry]) -> Digest:
    """Digest of the ordered log: blake3 over one line of canonical JSON per entry."""
    hasher = blake3()
    for entry in entries:
        hasher.update(entry.model_dump_json().encode() + b"\n")
    return Digest(hasher.hexdigest())
