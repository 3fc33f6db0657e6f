"""The canonical form of a miner's log, over which it commits. Pure."""

from collections.abc import Sequence

from orion.common.ids import Digest
from orion.common.protocol.merkle import Frontier
from orion.common.protocol.messages import Commitment
from orion.common.protocol.records import LogEntry

BEGINNINGS_MAX = 16
"""How often an outer step may be begun on its anchor, the first time included: a process that ends and starts again
more often than this within one takes part from the next one on."""


def continues(earlier: Commitment, later: Commitment) -> bool:
    """Whether a commitment may follow another of the same log, as far as can be told without the log."""
    if earlier.is_final or later.num_entries < earlier.num_entries:
        return False
    if later.num_entries == earlier.num_entries and later.root != earlier.root:
        return False
    return later.num_applied >= earlier.num_applied and later.num_kept >= earlier.num_kept


def entry_bytes(entry: LogEntry) -> bytes:
    """The entry as a record of the log's Merkle tree: its JSON, fields in their order, without blanks."""
    return entry.model_dump_json().encode()


def log_root(entries: Sequence[LogEntry]) -> Digest:
    """Merkle root of the ordered log."""
    frontier = Frontier()
    for entry in entries:
        frontier.append(entry_bytes(entry))
    return frontier.root
