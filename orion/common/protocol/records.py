"""Messages of the public record: logs and evidence, verdicts, merges, credited work, status and losses.

Continues `messages.py`, under the same rules; a file of its own only because of its length.
"""

from typing import Annotated, Literal

from pydantic import Field, StringConstraints

from orion.common.ids import Digest, Hotkey, MemberState, Operation, Subject
from orion.common.protocol.fields import (
    BATCH_MAX,
    BOUNDARY_PAGE_MAX,
    COMMITMENTS_MAX,
    CONTRIBUTIONS_MAX,
    LOG_ENTRIES_MAX,
    MINERS_MAX,
    PARTITIONS_MAX,
    PROOF_NODES_MAX,
    STAGES_MAX,
    STALENESS_MAX,
    Age,
    Blake3,
    Count,
    Data,
    Microbatch,
    Real,
    Ss58,
    StageIndex,
    Step,
    Text,
    UnixSeconds,
    Url,
)
from orion.common.protocol.messages import (
    BoundaryReport,
    Commitment,
    Contribution,
    Heartbeat,
    Manifest,
    Message,
    ObjectRef,
    RunCheckpoint,
    StageState,
)

# --- validation -------------------------------------------------------------------------------------------------------


class LogEntry(Message):
    """One operation of a miner, in the order in which its device did them."""

    operation: Operation
    microbatch_id: Microbatch | None
    """None where the operation is about none: an inner step, a beginning anew."""
    data_id: Data | None
    inner_step: Step
    """Inner steps done before it since the outer step was begun, or begun anew."""
    input_digest: Blake3 | None
    """Of the body's narrow tensor and ids (forward), or of the gradient (backward); None where nothing came in."""
    output_digest: Blake3 | None
    """Of the tensor sent on: `z` (forward), the input gradient (backward; last stage: of its forward); None if none."""
    num_microbatches: Count = 0
    """Inner step: how many it averaged."""


class CommitmentRecord(Message):
    """What a miner has committed to in one outer step, as the orchestrator publishes it."""

    hotkey: Ss58
    stage_index: StageIndex
    commitment: Commitment
    """The newest: what the miner is paid for at most, and checked on."""
    earlier: Annotated[tuple[Commitment, ...], Field(max_length=COMMITMENTS_MAX)] = ()
    """Those before it, in order. Each must be the root of a prefix of the newest one's log."""


class CommitmentQuery(Message):
    kind: Literal["commitment_query"] = "commitment_query"
    outer_step: Step


class Commitments(Message):
    kind: Literal["commitments"] = "commitments"
    records: Annotated[tuple[CommitmentRecord, ...], Field(max_length=MINERS_MAX)]


class LogRequest(Message):
    """Validator to miner: hand over entries [`start`, `stop`) of the committed log, with proof."""

    kind: Literal["log_request"] = "log_request"
    outer_step: Step
    sizes: Annotated[tuple[Count, ...], Field(min_length=1, max_length=COMMITMENTS_MAX + 1)]
    """Entries of the commitments whose roots the proof is to meet: growing, the last one is the log asked for."""
    start: Count
    stop: Count


class CommittedLog(Message):
    """A range of a committed log, with what shows that it is one (`orion.common.protocol.merkle`)."""

    kind: Literal["committed_log"] = "committed_log"
    outer_step: Step
    start: Count
    entries: Annotated[tuple[LogEntry, ...], Field(max_length=LOG_ENTRIES_MAX)]
    proof: Annotated[tuple[Blake3, ...], Field(max_length=PROOF_NODES_MAX)]


class EvidenceRequest(Message):
    """Validator to miner: hand over the tensor that went into or came out of one logged operation; or, with the
    operation ENCODE, microbatch 0 and the side "output", the error state after the upload of that outer step."""

    kind: Literal["evidence_request"] = "evidence_request"
    outer_step: Step
    microbatch_id: Microbatch
    operation: Operation
    side: Literal["input", "output"]


class Verdict(Message):
    """A validator's finding about one miner's outer step."""

    kind: Literal["verdict"] = "verdict"
    miner: Ss58
    outer_step: Step
    passed: bool
    subject: Subject = Subject.LOG
    """What was checked. A validator gives one verdict on each subject of a miner's outer step."""
    num_operations: Count
    """Operations replayed; of a reduction, partitions that were reduced again."""
    reason: Text = ""


class Share(Message):
    """A miner's chain weight."""

    hotkey: Ss58
    uid: Annotated[int, Field(ge=0, le=65_535)]
    """Its slot on the chain when the weights were decided."""
    score: Annotated[float, Field(ge=0, allow_inf_nan=False)]
    """FLOPs-equivalents, as `orion.common.ledger.scoring` computes them."""
    weight: Annotated[float, Field(ge=0, le=1)]
    """Share of the whole."""


class ScoreSheet(Message):
    """A validator's scores and the chain weights that it makes of them, with all that is needed to compute them again.

    Signed with the digest of the ledger that it read, so that it also pins the ledger: nobody can change what was
    there before without contradicting the validators.
    """

    kind: Literal["score_sheet"] = "score_sheet"
    outer_step: Step
    """Newest of the ledger that was read."""
    num_entries: Count
    """Of that ledger."""
    ledger_digest: Blake3
    """Of that ledger."""
    owner_uid: Annotated[int, Field(ge=0, le=65_535)] | None
    """The subnet owner's slot, which gets the burn share."""
    burned: Annotated[float, Field(ge=0, le=1)]
    """Weight of the owner's slot where no miner sits on it."""
    weight_max: Annotated[float, Field(gt=0, le=1)]
    """The subnet's bound on one miner's share."""
    shares: Annotated[tuple[Share, ...], Field(max_length=MINERS_MAX)]
    """Of every miner that has a score and a slot, ordered by hotkey."""
    without_slot: Annotated[tuple[Ss58, ...], Field(max_length=MINERS_MAX)] = ()
    """Miners with a score that have no slot on the chain (any more), ordered by hotkey."""


# --- merges -----------------------------------------------------------------------------------------------------------


class ReducedCopy(Message):
    """One reducer's mean of a partition, whether or not it is the one that stands."""

    reducer: Ss58
    object: ObjectRef
    excluded: Annotated[tuple[Ss58, ...], Field(max_length=MINERS_MAX)]
    """Whom it left out."""
    excluded_late: Annotated[tuple[Ss58, ...], Field(max_length=MINERS_MAX)] = ()
    """Whose late contribution it left out."""

    @property
    def content(self) -> tuple[Digest, frozenset[Hotkey], frozenset[Hotkey]]:
        """What two copies must have in common."""
        return self.object.digest, frozenset(self.excluded), frozenset(self.excluded_late)


class PartitionRecord(Message):
    """Who was asked to reduce a partition, and what was durable when it was settled."""

    partition_index: Annotated[int, Field(ge=0, lt=PARTITIONS_MAX)]
    asked: Annotated[tuple[Ss58, ...], Field(max_length=64)]
    """In the order in which they were asked."""
    copies: Annotated[tuple[ReducedCopy, ...], Field(max_length=64)]


class MergeRecord(Message):
    """All that the result of a stage's outer step follows from. Kept as long as the objects that it names."""

    kind: Literal["merge_record"] = "merge_record"
    stage_index: StageIndex
    outer_step: Step
    contributions: Annotated[tuple[Contribution, ...], Field(max_length=CONTRIBUTIONS_MAX)]
    """In the order in which they are added, with the microbatches that they count for; the late ones first."""
    partitions: Annotated[tuple[PartitionRecord, ...], Field(max_length=PARTITIONS_MAX)]
    """Empty when there was nothing, or nobody, to reduce."""
    manifest: Manifest
    late: Annotated[tuple[Contribution, ...], Field(max_length=MINERS_MAX)] = ()
    """Announced in this outer step and not whole in the store when its upload phase closed: those that are by then go
    into the next merge."""

    def announced_by(self, hotkey: Hotkey) -> Contribution | None:
        """What a miner announced in this outer step, merged here or late; None where it counts in neither."""
        own = (each for each in self.contributions if each.voice == (hotkey, 0))
        return next(own, None) or next((each for each in self.late if each.hotkey == hotkey), None)


class MergeQuery(Message):
    """Asks for the record of a stage's merge."""

    kind: Literal["merge_query"] = "merge_query"
    stage_index: StageIndex
    outer_step: Step


# --- the public record ------------------------------------------------------------------------------------------------


class MergeShare(Message):
    """What a miner did for the merge of an outer step, by partitions."""

    num_settled: Count
    """Partitions that have a mean."""
    num_merged: Count
    """Of these, those whose mean holds the miner's contribution."""
    age: Age = 0
    """Outer steps that its contribution came late: then both counts are of the merge that it came to."""
    num_asked: Count
    """Partitions that it was to reduce, those left out in which nobody's bytes stood."""
    num_agreed: Count
    """Of these, those in which its bytes stand."""


class WorkRecord(Message):
    """Backward passes of one miner in one outer step that both ends of each transfer agree on."""

    hotkey: Ss58
    stage_index: StageIndex
    outer_step: Step
    num_microbatches: Count
    num_committed: Count
    """Backward passes that its inner steps have averaged since its log was last begun anew, as its newest commitment
    says: what can be checked, and enters its pseudo-gradient. More than this does not count."""
    merge: MergeShare | None
    """None while the merge is not settled."""
    flops: Annotated[float, Field(ge=0, allow_inf_nan=False)]
    """Of `num_microbatches`."""


class VerdictRecord(Message):
    validator: Ss58
    verdict: Verdict


class LedgerQuery(Message):
    kind: Literal["ledger_query"] = "ledger_query"
    from_outer_step: Step = 0


class Ledger(Message):
    """What follows from the entries of the public ledger up to a place (`orion.common.ledger.book`)."""

    kind: Literal["ledger"] = "ledger"
    num_entries: Count
    digest: Blake3
    """Of the ledger up to there."""
    outer_step: Step
    """The run's newest."""
    work: Annotated[tuple[WorkRecord, ...], Field(max_length=1_000_000)]
    verdicts: Annotated[tuple[VerdictRecord, ...], Field(max_length=1_000_000)]


class MinerStatus(Message):
    hotkey: Ss58
    stage_index: StageIndex
    state: MemberState
    url: Url
    heartbeat: Heartbeat | None
    last_seen_s: UnixSeconds
    num_microbatches: Count
    """Credited over the whole run."""


class LossPoint(Message):
    microbatch_id: Microbatch
    outer_step: Step
    loss: Real
    time_s: UnixSeconds


class Repairs(Message):
    """Microbatches that outlived a miner which was lost, by what saved them."""

    rerouted: Count = 0
    """Another replica took them, and they went forward anew from there on; miners say so."""
    spliced: Count = 0
    """A replacement took the lost one's place between the stages that both still held them; miners say so."""
    released: Count = 0
    """Their trip was cancelled, and their data leased again."""

    @property
    def total(self) -> int:
        return self.rerouted + self.spliced + self.released


class StageStaleness(Message):
    """Backward passes of one stage's miners by the inner steps since their forward: none, one, …"""

    counts: Annotated[tuple[Count, ...], Field(max_length=STALENESS_MAX + 1)]


class RunStatus(Message):
    """What `orion status` and the live view show. Public."""

    kind: Literal["run_status"] = "run_status"
    run_id: Annotated[str, StringConstraints(max_length=63)]
    now_s: UnixSeconds
    started_s: UnixSeconds | None
    finished: bool
    finish_reason: Text = ""
    outer_step: Step
    outer_steps: Step
    stages: Annotated[tuple[StageState, ...], Field(max_length=STAGES_MAX)]
    checkpoint: RunCheckpoint | None = None
    """The newest of the whole model."""
    miners: Annotated[tuple[MinerStatus, ...], Field(max_length=MINERS_MAX)]
    microbatches_started: Count
    microbatches_applied: Count
    microbatches_cancelled: Count
    microbatches_repaired: Repairs = Repairs()
    tokens: Count
    """Of applied microbatches."""
    anchors_equal: bool
    """In every outer step so far all replicas reported the same digest."""
    num_checks: Count
    num_verdicts_failed: Count
    staleness: Annotated[tuple[StageStaleness, ...], Field(max_length=STAGES_MAX)] = ()
    """By stage."""
    recent_losses: Annotated[tuple[LossPoint, ...], Field(max_length=BATCH_MAX)]
    """Newest last."""
    notices: Annotated[tuple[Text, ...], Field(max_length=200)]
    """What went wrong or changed: members gone, disputes, exclusions, phases cut short; newest last."""


class PathwayQuery(Message):
    """Asks for path and loss of every applied trip of an outer step, in order of arrival."""

    kind: Literal["pathway_query"] = "pathway_query"
    outer_step: Step
    offset: Count = 0


class Pathway(Message):
    """One applied trip: who ran it, and the loss that its first-stage miner reported."""

    microbatch_id: Microbatch
    loss: Real
    path: Annotated[tuple[Annotated[int, Field(ge=0, lt=MINERS_MAX)], ...], Field(max_length=STAGES_MAX)]
    """One place in `Pathways.miners` for each stage, first stage first."""


class Pathways(Message):
    """A page; empty for an outer step that is not kept (any more)."""

    kind: Literal["pathways"] = "pathways"
    outer_step: Step
    miners: Annotated[tuple[Ss58, ...], Field(max_length=MINERS_MAX)]
    """Of the whole outer step so far: a later page may have more at its end."""
    pathways: Annotated[tuple[Pathway, ...], Field(max_length=BATCH_MAX)]
    total: Count
    """Pathways of the outer step so far."""


class BoundaryQuery(Message):
    """Asks for every miner's newest report on its neighbours, in the order of hotkeys."""

    kind: Literal["boundary_query"] = "boundary_query"
    after: Ss58 | None = None
    """The last hotkey of the page before; None = from the beginning."""


class BoundaryRecord(Message):
    """One miner's report."""

    hotkey: Ss58
    stage_index: StageIndex
    report: BoundaryReport


class Boundaries(Message):
    """A page; the last one when it is empty."""

    kind: Literal["boundaries"] = "boundaries"
    records: Annotated[tuple[BoundaryRecord, ...], Field(max_length=BOUNDARY_PAGE_MAX)]


class LossQuery(Message):
    """Asks for the loss of every applied microbatch, in order of arrival."""

    kind: Literal["loss_query"] = "loss_query"
    offset: Count = 0


class Losses(Message):
    kind: Literal["losses"] = "losses"
    points: Annotated[tuple[LossPoint, ...], Field(max_length=BATCH_MAX)]
    total: Count
