"""What the ledger's book keeps of trips, transfers and outer steps, and what an entry has changed in it.

Data only: what follows from it is the book's to say (`book.py`).
"""

from dataclasses import dataclass, field

from orion.common.ids import Digest, Direction, Hotkey, MicrobatchId, Outcome, Subject
from orion.common.ledger.contradictions import Contradiction, Contradictions
from orion.common.protocol.entries import MergeSettled
from orion.common.protocol.messages import MicrobatchEnd
from orion.common.protocol.records import CommitmentRecord, Verdict


@dataclass(frozen=True, slots=True)
class Hop:
    """A transfer as both its ends must name it."""

    direction: Direction
    to_stage: int
    sender: Hotkey
    receiver: Hotkey


@dataclass(frozen=True, slots=True)
class Claim:
    """What one end says of a transfer, and the entry in which it said so."""

    digest: Digest
    size_bytes: int
    sequence: int

    def says_the_same(self, other: "Claim") -> bool:
        return (self.digest, self.size_bytes) == (other.digest, other.size_bytes)


@dataclass(slots=True)
class Claims:
    """What each end says it sent or accepted; None = has not said."""

    by_sender: Claim | None = None
    by_receiver: Claim | None = None

    @property
    def agree(self) -> bool:
        return (
            self.by_sender is not None
            and self.by_receiver is not None
            and self.by_sender.says_the_same(self.by_receiver)
        )


@dataclass(slots=True)
class TripEvidence:
    """What is known of one trip: who leased it, how it ended, its transfers, and which stages were credited for it."""

    outer_step: int
    lessee: Hotkey
    outcome: Outcome | None = None
    hops: dict[Hop, Claims] = field(default_factory=dict)
    credited: dict[int, Hotkey] = field(default_factory=dict)


@dataclass(slots=True)
class StepLedger:
    """The record of one outer step."""

    trips: dict[MicrobatchId, TripEvidence] = field(default_factory=dict)
    """Dropped earlier than the rest."""
    num_receipts: dict[Hotkey, int] = field(default_factory=dict)
    num_matched: dict[Hotkey, int] = field(default_factory=dict)
    """Of a miner's receipts, those that the other end confirms."""
    num_credited: dict[tuple[Hotkey, int], int] = field(default_factory=dict)
    """By hotkey and stage."""
    commitments: dict[Hotkey, CommitmentRecord] = field(default_factory=dict)
    verdicts: dict[tuple[Hotkey, Hotkey, Subject], Verdict] = field(default_factory=dict)
    """By validator, miner and what was checked."""
    merges: dict[int, MergeSettled] = field(default_factory=dict)
    """By stage."""
    num_sheets: dict[Hotkey, int] = field(default_factory=dict)
    """Score sheets that each validator has sent while this outer step was the newest."""
    contradictions: Contradictions = field(default_factory=Contradictions)


@dataclass(frozen=True, slots=True)
class Credit:
    """A miner has just earned one microbatch."""

    hotkey: Hotkey
    stage_index: int


@dataclass(slots=True)
class Taken:
    """What an entry has changed."""

    num_taken: int = 0
    """Records that count."""
    num_ignored: int = 0
    """Records that are wrong, late or not their sender's to make."""
    ends: list[MicrobatchEnd] = field(default_factory=list)
    """Trips that have just ended by their lessee's word."""
    credits: list[Credit] = field(default_factory=list)
    contradictions: list[Contradiction] = field(default_factory=list)
    is_conflict: bool = False
    """Something else was said before, and that stands."""

    @property
    def changed(self) -> bool:
        """Whether the entry belongs into the ledger: something follows from it."""
        return self.num_taken > 0 or bool(self.contradictions)
