"""The public ledger: what its entries say, how they are chained, and how they are read. Pure.

Everything that credit, scores and pay follow from stands in the ledger, in the order in which the orchestrator took it.
An entry is either somebody's own signed words (`Said`, with the proof that they are theirs) or what only the
orchestrator can know (who leased what, what was out of time, how a merge came out). `orion.common.ledger.book` is the
one place that says what follows from them.

Invariants: sequence numbers are consecutive from 0; each entry's digest covers its JSON and the digest before it, and
the first one covers the run's digest, so that one digest stands for a whole ledger up to its place.
"""

from enum import StrEnum
from typing import Annotated, Literal

from blake3 import blake3
from pydantic import Field, StringConstraints, TypeAdapter

from orion.common.ids import Digest
from orion.common.protocol.fields import (
    BATCH_MAX,
    CONTRIBUTIONS_MAX,
    PARTITIONS_MAX,
    Age,
    Blake3,
    Count,
    Microbatch,
    Ss58,
    StageIndex,
    Step,
    Text,
    UnixSeconds,
)
from orion.common.protocol.messages import LeasedMicrobatch, Message, Reduced, Report, RunCheckpoint, Uploaded
from orion.common.protocol.records import ScoreSheet, Verdict

PAGE_ENTRIES_MAX = 512
PAGE_BYTES_MAX = 4 * 1024 * 1024
"""Of the entries in one page; a single entry may be larger (a report of 8 MiB) and then is a page of its own."""
REDUCERS_MAX = 64
"""Of one partition."""


class Proof(Message):
    """What a signed request leaves behind: with the message it carried, anybody can verify who said it to whom."""

    nonce_ns: Annotated[int, Field(ge=0, lt=2**63)]
    signature: Annotated[str, StringConstraints(pattern=r"^0x[0-9a-f]{128}$")]
    """sr25519, over the btauth/1 payload."""
    target: Annotated[str, StringConstraints(max_length=2_048)]
    """Path and query of the request as it was sent; names the route, the protocol's version and the run."""


Statement = Annotated[Report | Uploaded | Reduced | Verdict | ScoreSheet, Field(discriminator="kind")]
"""What is kept with its sender's signature. The signed body is the message's own JSON, byte for byte."""
STATEMENT_TYPES = (Report, Uploaded, Reduced, Verdict, ScoreSheet)


class Said(Message):
    """A message that was accepted."""

    kind: Literal["said"] = "said"
    hotkey: Ss58
    stage_index: StageIndex | None
    """Its sender's stage then; None for a validator."""
    message: Statement
    proof: Proof | None
    """None only where senders are known without signatures: in the simulator and in tests of the core."""
    commitment_in_time: bool = True
    """Whether a report's commitment came before its outer step's uploads were closed. The orchestrator's word."""


class TripsLeased(Message):
    """Rights to start microbatches were given out."""

    kind: Literal["trips_leased"] = "trips_leased"
    outer_step: Step
    lessee: Ss58
    trips: Annotated[tuple[LeasedMicrobatch, ...], Field(min_length=1, max_length=256)]


class TripsDied(Message):
    """Trips were ended by the orchestrator: overdue, their lessee gone, or their outer step over."""

    kind: Literal["trips_died"] = "trips_died"
    outer_step: Step
    microbatch_ids: Annotated[tuple[Microbatch, ...], Field(min_length=1, max_length=BATCH_MAX)]
    reason: Text


class OuterStepOpened(Message):
    """Records of this outer step are taken from here on."""

    kind: Literal["outer_step_opened"] = "outer_step_opened"
    outer_step: Step


class RecordsClosed(Message):
    """Records about trips of older outer steps no longer count, and what is older still no longer scores."""

    kind: Literal["records_closed"] = "records_closed"
    trips_before: Step
    work_before: Step


class ContributionOutcome(Message):
    """A pseudo-gradient that is in the merge. Whoever trained and is not among these, nor late among those of the next
    outer step, contributed nothing."""

    hotkey: Ss58
    num_microbatches: Count
    """What it counts for in the mean, before it is discounted for its age."""
    age: Age = 0
    """Outer steps that it came late."""
    num_merged: Count
    """Partitions whose mean holds it."""


class ReductionVote(StrEnum):
    """What became of a partition that a member was asked to reduce."""

    AGREED = "agreed"
    """Its bytes stand."""
    DIFFERED = "differed"
    """Others' bytes stand."""
    UNDECIDED = "undecided"
    """As many said one thing as another: nobody's bytes stand."""
    MISSED = "missed"
    """It had delivered nothing when the partition was settled, and was late or gone. Who was asked only just before
    that is not among the outcomes."""


class ReductionOutcome(Message):
    partition_index: Annotated[int, Field(ge=0, lt=PARTITIONS_MAX)]
    hotkey: Ss58
    vote: ReductionVote


class MergeSettled(Message):
    """How a stage's outer step was merged: who contributed, who reduced, and what became of it."""

    kind: Literal["merge_settled"] = "merge_settled"
    stage_index: StageIndex
    outer_step: Step
    num_partitions: Annotated[int, Field(ge=1, le=PARTITIONS_MAX)]
    num_settled: Count
    """Partitions that have a mean; the others keep their anchor, and no contributor is blamed for these."""
    contributions: Annotated[tuple[ContributionOutcome, ...], Field(max_length=CONTRIBUTIONS_MAX)]
    reductions: Annotated[tuple[ReductionOutcome, ...], Field(max_length=PARTITIONS_MAX * REDUCERS_MAX)]


class CheckpointKept(Message):
    """Every stage's anchor of an outer step is durable: the run can go on from here."""

    kind: Literal["checkpoint_kept"] = "checkpoint_kept"
    checkpoint: RunCheckpoint


Fact = Annotated[
    Said | TripsLeased | TripsDied | OuterStepOpened | RecordsClosed | MergeSettled | CheckpointKept,
    Field(discriminator="kind"),
]


class LedgerEntry(Message):
    """One entry of the ledger."""

    sequence: Count
    time_s: UnixSeconds
    """When the orchestrator took it."""
    fact: Fact


class EntriesQuery(Message):
    """Asks for entries from one on."""

    kind: Literal["entries_query"] = "entries_query"
    from_sequence: Count = 0


class LedgerPage(Message):
    """Consecutive entries, and where the ledger ended when they were read."""

    kind: Literal["ledger_page"] = "ledger_page"
    from_sequence: Count
    previous: Blake3
    """Digest of the ledger before the first entry of this page."""
    entries: Annotated[tuple[LedgerEntry, ...], Field(max_length=PAGE_ENTRIES_MAX)]
    num_entries: Count
    """Of the whole ledger then."""
    head: Blake3
    """Digest of the whole ledger then."""


def first_digest(run_digest: Digest) -> Digest:
    """The digest of a run's ledger without entries."""
    return Digest(blake3(b"orion ledger\n" + run_digest.encode()).hexdigest())


def chained(previous: Digest, entry_json: bytes) -> Digest:
    """The digest of a ledger that ended with `previous`, with one more entry."""
    return Digest(blake3(previous.encode() + b"\n" + entry_json).hexdigest())


_ENTRY: TypeAdapter[LedgerEntry] = TypeAdapter(LedgerEntry)


def entry_to_json(entry: LedgerEntry) -> bytes:
    """The form over which an entry is chained."""
    return _ENTRY.dump_json(entry)


def entry_from_json(data: bytes) -> LedgerEntry:
    """The entry that `entry_to_json` wrote. Raises pydantic.ValidationError for anything else."""
    return _ENTRY.validate_json(data)
