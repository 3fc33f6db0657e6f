"""Receipts that cannot both be true. Pure.

A contradiction names the two ledger entries that hold the signed reports, so that anybody can look. When two ends of a
transfer differ, one of them lies and nobody can say which, so neither is paid for it; when one miner says two things,
the first stands and the second shows what its word is worth. Neither is a sentence: a validator's replay is.
"""

from dataclasses import dataclass, field
from enum import StrEnum

from orion.common.ids import Direction, Hotkey, MicrobatchId

CONTRADICTIONS_PER_MINER_MAX = 64
"""Kept of one outer step for each miner that is named first; more of them say nothing new."""


class ContradictionKind(StrEnum):
    """Who contradicts whom."""

    ENDS_DIFFER = "ends_differ"
    """Sender and receiver name different bytes."""
    TWO_WORDS = "two_words"
    """One end says now this, now that."""


@dataclass(frozen=True, slots=True)
class Contradiction:
    """Two records of one transfer that cannot both be true."""

    kind: ContradictionKind
    hotkeys: tuple[Hotkey, ...]
    """Sender and receiver, or the one that said both."""
    outer_step: int
    microbatch_id: MicrobatchId
    direction: Direction
    to_stage: int
    sequences: tuple[int, int]
    """Ledger entries with the two reports, the earlier one first."""


@dataclass(slots=True)
class Contradictions:
    """Those of one outer step."""

    found: list[Contradiction] = field(default_factory=list)
    num_found: dict[Hotkey, int] = field(default_factory=dict)
    """By the miner that is named first; the ones beyond the bound are not counted."""

    def add(self, contradiction: Contradiction) -> bool:
        """Keeps it, unless there are enough of this miner."""
        first = contradiction.hotkeys[0]
        if self.num_found.get(first, 0) >= CONTRADICTIONS_PER_MINER_MAX:
            return False
        self.num_found[first] = self.num_found.get(first, 0) + 1
        self.found.append(contradiction)
        return True
