"""Every message that crosses a process boundary. One file, so that a reader sees the whole protocol.

All are frozen, strict and closed (unknown fields are refused), and every field is bounded. `docs/PROTOCOL.md` says
which route carries which, who may send it and what is answered. Tensors do not travel in messages: a message describes
a body (digest, size) or names an object in the store.
"""

from enum import StrEnum
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, JsonValue, model_validator

from orion.common.ids import Direction, Hotkey, MemberState, Outcome, Phase
from orion.common.protocol.fields import (
    BATCH_MAX,
    BOUNDARY_PEERS_MAX,
    CONTRIBUTIONS_MAX,
    LOG_ENTRIES_MAX,
    MINERS_MAX,
    OBJECT_PARTS_MAX,
    PART_URLS_MAX,
    PARTITIONS_MAX,
    STAGES_MAX,
    STALENESS_MAX,
    STATE_PARTS_MAX,
    UPLOADS_MAX,
    VALIDATORS_MAX,
    Age,
    Blake3,
    Cosine,
    Count,
    Data,
    Duration,
    GrantedUrl,
    Header,
    Microbatch,
    ObjectKey,
    Rate,
    Real,
    Share,
    Ss58,
    StageIndex,
    Step,
    Text,
    UnixSeconds,
    Url,
)


class Message(BaseModel):
    """Base of all messages."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


class RefusalCode(StrEnum):
    """Why a request was refused. The HTTP status follows from the code (`protocol/refusals.py`)."""

    MALFORMED = "malformed"
    BAD_SIGNATURE = "bad_signature"
    FORBIDDEN = "forbidden"
    RUN_MISMATCH = "run_mismatch"
    PROTOCOL_MISMATCH = "protocol_mismatch"
    NOT_MEMBER = "not_member"
    WRONG_STAGE = "wrong_stage"
    WRONG_PHASE = "wrong_phase"
    NOT_FOUND = "not_found"
    NO_WORK = "no_work"
    BUSY = "busy"
    TOO_LARGE = "too_large"
    BAD_TENSOR = "bad_tensor"
    DIGEST_MISMATCH = "digest_mismatch"
    NOT_FINITE = "not_finite"
    CONFLICT = "conflict"


class Refusal(Message):
    """The typed body of every 4xx answer."""

    code: RefusalCode
    message: Text
    retry_after_s: Duration | None = None
    """When to try again; None = not worth it without a change on the caller's side."""
    queued: Count | None = None
    """Of a miner that has no credit left: the passes that its device has before it."""


class Done(Message):
    """The answer to a request that has nothing else to say."""

    kind: Literal["done"] = "done"


# --- the run ----------------------------------------------------------------------------------------------------------


class RunInfo(Message):
    """What anyone may ask for, unsigned, before taking part."""

    kind: Literal["run_info"] = "run_info"
    orchestrator: Ss58
    """Whom requests to the orchestrator are signed for."""
    spec: dict[str, JsonValue]
    """The RunSpec as JSON (`orion.common.config`)."""


# --- objects in the store ---------------------------------------------------------------------------------------------


class ObjectRef(Message):
    """An object and what it must contain."""

    key: ObjectKey
    digest: Blake3
    size_bytes: Count


class GrantRequest(Message):
    """Asks for signed, expiring URLs to read objects; each allows any range of its object."""

    kind: Literal["grant_request"] = "grant_request"
    keys: Annotated[tuple[ObjectKey, ...], Field(min_length=1, max_length=PARTITIONS_MAX)]


class Grants(Message):
    """One URL per asked key, in the same order; relative to the orchestrator unless absolute."""

    kind: Literal["grants"] = "grants"
    urls: Annotated[tuple[GrantedUrl, ...], Field(max_length=PARTITIONS_MAX)]
    expires_s: UnixSeconds


class UploadRequest(Message):
    """Asks how these very objects are to be written, or what of them is still missing: it may be asked at any time."""

    kind: Literal["upload_request"] = "upload_request"
    objects: Annotated[tuple[ObjectRef, ...], Field(min_length=1, max_length=UPLOADS_MAX)]


class PartUrl(Message):
    """Where one part of an object is sent by PUT."""

    index: Annotated[int, Field(ge=0, lt=OBJECT_PARTS_MAX)]
    url: GrantedUrl


class UploadGrant(Message):
    """What is still to be sent of one object."""

    is_durable: bool = False
    """It is there already, as asked for."""
    part_bytes: Count
    """Size of each part but the last, which is what remains."""
    in_parts: bool = False
    """The parts make an object only once that is asked for (`CompleteUpload`); else the one part is the object."""
    parts: Annotated[tuple[PartUrl, ...], Field(max_length=PART_URLS_MAX)] = ()
    """The first of the parts that are missing; as many as the bound: there may be more, ask again."""
    headers: Annotated[tuple[tuple[Header, Header], ...], Field(max_length=8)] = ()
    """Names and values that must be sent with each part."""


class UploadGrants(Message):
    """One for each asked object, in the same order; URLs are relative to the orchestrator unless absolute."""

    kind: Literal["upload_grants"] = "upload_grants"
    grants: Annotated[tuple[UploadGrant, ...], Field(max_length=UPLOADS_MAX)]
    expires_s: UnixSeconds


class CompleteUpload(Message):
    """All parts of an object were sent: it is made of them. Asking again changes nothing. Refused with NOT_FOUND when
    parts are missing: `UploadRequest` says which."""

    kind: Literal["complete_upload"] = "complete_upload"
    object: ObjectRef


# --- membership -------------------------------------------------------------------------------------------------------


class Join(Message):
    """A miner asks to take part. Asking again from the same hotkey returns the same assignment."""

    kind: Literal["join"] = "join"
    url: Url
    """Where its peer server listens, as others reach it."""
    device: Text
    memory_bytes: Count
    stage_index: StageIndex | None = None
    """A wish, followed when that stage lacks miners."""


class Joined(Message):
    """Membership and assignment."""

    kind: Literal["joined"] = "joined"
    stage_index: StageIndex
    state: MemberState


class PeerStatistics(Message):
    """What a miner was sent by one neighbour in one direction, averaged exponentially over its tensors.

    An alarm at most: nothing in it earns or costs anything.
    """

    peer: Ss58
    direction: Direction
    num_tensors: Count
    """Taken in since the process started."""
    num_refused: Count
    """Admitted and then refused because they were not finite, not as described or not as digested."""
    log_rms: Annotated[float, Field(ge=-100, le=100, allow_inf_nan=False)]
    """Natural logarithm of the root mean square of a tensor's values."""
    log_rms_excess: Annotated[float, Field(ge=-200, le=200, allow_inf_nan=False)]
    """How far it was above what all neighbours sent in that direction at about that time: so that a sender of whom
    little came lately can be compared, although activations and gradients grow or shrink."""
    cosine_mean: Cosine
    """Between a tensor and the mean direction of those before it."""
    cosine_previous: Cosine
    """Between a tensor and the one before it."""
    repeated_share: Share
    """Of tensors whose bytes were those of one of the last few."""


class BoundaryReport(Message):
    """What a miner has seen of its neighbours up to the end of an outer step's training."""

    outer_step: Step
    peers: Annotated[tuple[PeerStatistics, ...], Field(max_length=BOUNDARY_PEERS_MAX)]


class Heartbeat(Message):
    """Renews a membership. Says how the miner is doing; nothing in it earns anything."""

    kind: Literal["heartbeat"] = "heartbeat"
    outer_step: Step
    phase: Phase
    ready_outer_step: Step | None
    """The outer step whose anchor this miner holds, None while it is fetching one."""
    inner_step: Step
    queued: Count
    in_flight: Count
    applied: Count
    """Microbatches applied since the process started."""
    tokens_per_s: Annotated[float, Field(ge=0, le=1e12, allow_inf_nan=False)]
    busy_share: Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)]
    """Share of the last interval in which the device thread was computing."""
    staleness_max: Count = 0
    """Of what is in flight now."""
    staleness: Annotated[tuple[Count, ...], Field(max_length=STALENESS_MAX + 1)] = ()
    """Backward passes since the process started by the inner steps since their forward: none, one, …"""
    rerouted: Count = 0
    """Microbatches that got past a lost miner of the next stage through another one, from there on forward anew; since
    the process started."""
    spliced: Count = 0
    """Microbatches with which this miner took the place of a lost one, between the stages that both still held them."""
    upload_bytes_per_s: Rate | None = None
    """What the miner's transfers to the object store have reached lately, all together; None: not measured yet."""
    download_bytes_per_s: Rate | None = None
    """The same of its transfers from there."""
    boundary: BoundaryReport | None = None
    """What it was sent; at most once or twice an outer step, None between."""


class Leave(Message):
    """A miner goes on purpose; its peers stop sending at once."""

    kind: Literal["leave"] = "leave"
    reason: Text


# --- the state feed ---------------------------------------------------------------------------------------------------


class Peer(Message):
    """A member as the others see it."""

    hotkey: Ss58
    url: Url
    stage_index: StageIndex
    state: MemberState


class CheckpointRef(Message):
    """A whole anchor and outer momentum of one stage, as agreed by its replicas."""

    stage_index: StageIndex
    outer_step: Step
    """The outer step at whose start this anchor stands: 0 is the start of the run."""
    object: ObjectRef
    state_digest: Blake3
    """`orion.common.train.outer.state_digest` of the loaded state, as most replicas reported it."""


class RunCheckpoint(Message):
    """A durable checkpoint of the whole model: every stage at the same outer step."""

    outer_step: Step
    next_data_id: Data
    """Data ids below it were leased before this outer step: a run that goes on from here leases none of them again."""
    stages: Annotated[tuple[CheckpointRef, ...], Field(min_length=1, max_length=STAGES_MAX)]
    """In order."""


class StageState(Message):
    """Where a stage is in its outer step."""

    stage_index: StageIndex
    phase: Phase
    outer_step: Step
    deadline_s: UnixSeconds
    checkpoint: CheckpointRef | None
    """The newest durable one; None = the anchor of outer step 0, which follows from the run's seed."""
    checkpoint_by: Ss58 | None
    """Who is asked to upload the anchor of this outer step now."""
    anchor_digest: Blake3 | None = None
    """`state_digest` of this outer step's anchor, as the replicas agreed on it; None at the start of a run."""
    trains_ahead: bool = False
    """Overlapped runs: work of the next outer step is taken while this one is uploaded and merged."""

    @property
    def training_step(self) -> int | None:
        """The outer step of which the stage takes work; None while it takes none."""
        if self.phase is Phase.TRAIN:
            return self.outer_step
        return self.outer_step + 1 if self.trains_ahead else None


class Contribution(Message):
    """One replica's pseudo-gradient: an object per partition, and its weight in the mean."""

    hotkey: Ss58
    num_microbatches: Annotated[int, Field(ge=1, le=2**31)]
    objects: Annotated[tuple[ObjectRef, ...], Field(min_length=1, max_length=PARTITIONS_MAX)]
    error_digest: Blake3 | None = None
    """Of the miner's error state after this upload (`codec.error_spec`), where the run's codec has one."""
    age: Age = 0
    """Outer steps between the one that it was trained in and the one that it is merged in; 0 in what its miner says.
    Who is slow may have two in one plan, of two ages."""

    @property
    def voice(self) -> tuple[Hotkey, int]:
        """What tells it from all others of a plan."""
        return self.hotkey, self.age


class PartitionPlan(Message):
    """Who reduces a partition. A third reducer appears when two disagree, another when one is late."""

    partition_index: Annotated[int, Field(ge=0, lt=PARTITIONS_MAX)]
    reducers: Annotated[tuple[Ss58, ...], Field(min_length=1, max_length=64)]
    writers: Annotated[tuple[Ss58, ...], Field(max_length=64)] = ()
    """Those of them that write their mean to the store; the others only say what it is."""
    settled: ObjectRef | None = None
    """The mean that stands, once it does: everybody may fetch it already."""


class MergePlan(Message):
    """What the reducers of a stage do. Contributions are summed in the order given here."""

    stage_index: StageIndex
    outer_step: Step
    is_final: bool = True
    """False while contributions are still on their way to the store: reducers may fetch what is there, and reduce
    nothing, because who is part of it, and with what weight, is not decided."""
    contributions: Annotated[tuple[Contribution, ...], Field(min_length=1, max_length=CONTRIBUTIONS_MAX)]
    """The late ones first: they were announced before any of the others."""
    partitions: Annotated[tuple[PartitionPlan, ...], Field(min_length=1, max_length=PARTITIONS_MAX)]


class Exclusion(Message):
    """A contribution that was left out of a partition's mean."""

    hotkey: Ss58
    reason: Text
    age: Age = 0
    """Of the contribution."""

    @property
    def voice(self) -> tuple[Hotkey, int]:
        """Which contribution of the plan it is."""
        return self.hotkey, self.age


class MergedPartition(Message):
    """The agreed mean pseudo-gradient of one partition; `object` is None when nobody delivered: it stays unchanged."""

    partition_index: Annotated[int, Field(ge=0, lt=PARTITIONS_MAX)]
    object: ObjectRef | None
    reducers: Annotated[tuple[Ss58, ...], Field(max_length=64)]
    """Those whose bytes these are."""
    excluded: Annotated[tuple[Exclusion, ...], Field(max_length=CONTRIBUTIONS_MAX)] = ()


class Manifest(Message):
    """The result of a stage's outer step: applied to the anchor of `outer_step` it gives that of `outer_step + 1`."""

    kind: Literal["manifest"] = "manifest"
    stage_index: StageIndex
    outer_step: Step
    partitions: Annotated[tuple[MergedPartition, ...], Field(min_length=1, max_length=PARTITIONS_MAX)]
    contributors: Annotated[tuple[Ss58, ...], Field(max_length=MINERS_MAX)]
    """Whose contribution of this outer step is in it."""
    total_microbatches: Count
    """Of all contributions in it, late ones too."""
    late: Annotated[tuple[Ss58, ...], Field(max_length=MINERS_MAX)] = ()
    """Whose contribution of this outer step goes into the next merge instead, if it lies in the store by then."""

    def takes(self, hotkey: Hotkey) -> bool:
        """Whether a miner's contribution of this outer step is in this merge, or may be in the next."""
        return hotkey in self.contributors or hotkey in self.late


class Feed(Message):
    """All that a member must know; the caller's own stage in full, the others in brief."""

    kind: Literal["feed"] = "feed"
    version: Count
    """Grows with every change; ask again with it and the answer waits for the next."""
    now_s: UnixSeconds
    finished: bool
    assignment: Joined | None
    """The caller's own; None for validators and onlookers."""
    stages: Annotated[tuple[StageState, ...], Field(max_length=STAGES_MAX)]
    peers: Annotated[tuple[Peer, ...], Field(max_length=MINERS_MAX)]
    merge_plan: MergePlan | None
    """Of the caller's stage, from the end of the upload phase until the manifest."""
    manifest: Manifest | None
    """The newest of the caller's stage."""
    validators: Annotated[tuple[Ss58, ...], Field(max_length=VALIDATORS_MAX)]
    """Who has a validator permit on the chain, as the orchestrator last saw it: who may ask miners for logs and
    evidence."""


class ManifestQuery(Message):
    """Asks for the manifests of a stage from one outer step on (to rebuild an anchor)."""

    kind: Literal["manifest_query"] = "manifest_query"
    stage_index: StageIndex
    from_outer_step: Step


class Manifests(Message):
    """In order, without gaps, as far as they exist."""

    kind: Literal["manifests"] = "manifests"
    manifests: Annotated[tuple[Manifest, ...], Field(max_length=BATCH_MAX)]


# --- work -------------------------------------------------------------------------------------------------------------


class LeaseRequest(Message):
    """A first-stage miner asks for microbatches to start."""

    kind: Literal["lease_request"] = "lease_request"
    outer_step: Step
    next_microbatch_id: Microbatch
    """Lowest id that this process has not been granted. Live trips of the miner from there on were granted in an answer
    that was lost, or to an earlier process: they are granted again before anything else."""
    num_microbatches: Annotated[int, Field(ge=1, le=256)]


class LeasedMicrobatch(Message):
    """A right to start one microbatch."""

    microbatch_id: Microbatch
    data_id: Data


class Lease(Message):
    """What was granted; refused with NO_WORK when the outer step's share has been given out."""

    kind: Literal["lease"] = "lease"
    outer_step: Step
    microbatches: Annotated[tuple[LeasedMicrobatch, ...], Field(min_length=1, max_length=256)]
    deadline_s: UnixSeconds


class Transfer(Message):
    """Describes the tensor body of a request between two miners. Travels in the signed query.

    An activation's body holds `z` (the narrow tensor, B×T×C) and `ids` (int32, B×(T+1)); a gradient's holds `g`, shaped
    as `z`.
    """

    kind: Literal["transfer"] = "transfer"
    direction: Direction
    microbatch_id: Microbatch
    data_id: Data
    outer_step: Step
    to_stage: StageIndex
    path: Annotated[tuple[Ss58, ...], Field(min_length=1, max_length=STAGES_MAX)]
    """Who has run this microbatch forward so far, first stage first; for a gradient the whole path."""
    deadline_s: UnixSeconds
    digest: Blake3
    size_bytes: Count
    loss: Real | None = None
    """With a gradient: the microbatch's mean loss per token."""
    continues_at: Ss58 | None = None
    """With an activation for the replacement of a miner that was lost: who, in the stage after the receiver's, still
    holds what the lost one sent on, and with it perhaps the gradient that is to be returned."""
    waited_s: Duration = 0.0
    """With a gradient: how long the sender and the stages after it kept the microbatch only waiting, for a device or
    for credits. The first stage paces itself by it; nothing is earned or checked by it."""


class Accepted(Message):
    """The receiver holds the tensor and will work on it (or already had it: a duplicate changes nothing)."""

    kind: Literal["accepted"] = "accepted"
    credits: Count
    """How many more microbatches the receiver would admit now."""
    queued: Count
    adopted: bool = False
    """The receiver holds the microbatch from a miner that was lost, and takes the sender in its place: it goes on with
    what it has, and returns the gradient to the sender."""


class Cancel(Message):
    """A microbatch ends without being applied; goes both ways along its path."""

    kind: Literal["cancel"] = "cancel"
    microbatch_id: Microbatch
    outer_step: Step
    reason: Text


class StateQuery(Message):
    """Asks a replica for the anchor and momentum that it stands on: for the outline, or for one part.

    An outline is a `StateOutline`; a part is raw bytes (`orion.common.train.outer.part_bytes`). Refused with NOT_FOUND
    by who stands elsewhere.
    """

    kind: Literal["state_query"] = "state_query"
    stage_index: StageIndex
    outer_step: Step
    state_digest: Blake3
    part_index: Annotated[int, Field(ge=0, lt=STATE_PARTS_MAX)] | None = None
    """None: the outline."""


class StateOutline(Message):
    """The digests of a state's parts, in order; they add up to the state's digest."""

    kind: Literal["state_outline"] = "state_outline"
    parts: Annotated[tuple[Blake3, ...], Field(min_length=1, max_length=STATE_PARTS_MAX)]


class HoldsQuery(Message):
    """Asks a miner of the next stage which microbatches it holds from the sender, or, where `lost` is given, one of the
    stage after it which it holds from `lost`, to whom the sender had given them."""

    kind: Literal["holds_query"] = "holds_query"
    outer_step: Step
    microbatch_ids: Annotated[tuple[Microbatch, ...], Field(max_length=BATCH_MAX)] = ()
    """None: the answer alone is of interest, as a sign of life."""
    lost: Ss58 | None = None
    """A miner that the sender has given up: whoever holds one of them from it waits for a replacement from here on, and
    whoever does not takes none of them from it any more."""


class Holds(Message):
    """Those of the asked microbatches that are held."""

    kind: Literal["holds"] = "holds"
    microbatch_ids: Annotated[tuple[Microbatch, ...], Field(max_length=BATCH_MAX)] = ()


class MicrobatchEnd(Message):
    """How a leased microbatch ended, told by the first-stage miner that leased it."""

    microbatch_id: Microbatch
    outcome: Outcome
    reason: Text = ""
    loss: Real | None = None
    path: Annotated[tuple[Ss58, ...], Field(max_length=STAGES_MAX)] = ()


class Receipt(Message):
    """One end's record of an accepted transfer."""

    direction: Direction
    microbatch_id: Microbatch
    outer_step: Step
    sender: Ss58
    receiver: Ss58
    to_stage: StageIndex
    digest: Blake3
    size_bytes: Count


class Commitment(Message):
    """Merkle root over a miner's ordered log of one outer step so far, made before anyone knows what will be checked.

    A miner makes one every few seconds while it works; each continues the one before. What it names is on the miner's
    disk when it is made.
    """

    outer_step: Step
    num_entries: Annotated[int, Field(ge=0, le=LOG_ENTRIES_MAX)]
    num_applied: Count
    """Backward passes in the log."""
    num_contributed: Count
    """Of these, those that the inner steps since the log last began anew have averaged: the most that the
    pseudo-gradient may weigh, and the most that can be paid."""
    num_kept: Count
    """Leading entries whose tensors the miner keeps: only they can be replayed."""
    root: Blake3
    is_final: bool
    """Nothing comes after it in this outer step; it comes before the upload."""

    @model_validator(mode="after")
    def _is_possible(self) -> "Commitment":
        if not self.num_contributed <= self.num_applied <= self.num_entries or self.num_kept > self.num_entries:
            raise ValueError("a commitment claims more than its log has entries")
        return self


class Report(Message):
    """A miner's batch of records. Numbered per hotkey without gaps, so that a repeated one changes nothing."""

    kind: Literal["report"] = "report"
    sequence: Count
    ends: Annotated[tuple[MicrobatchEnd, ...], Field(max_length=BATCH_MAX)] = ()
    receipts: Annotated[tuple[Receipt, ...], Field(max_length=BATCH_MAX)] = ()
    commitment: Commitment | None = None


# --- the outer step ---------------------------------------------------------------------------------------------------


class Uploaded(Message):
    """A miner's pseudo-gradient is encoded and on its way to the store, or lies there.

    Said twice. The first time commits the miner to its digests: only after all of a stage have done so can anybody read
    a contribution, so nobody can copy another one's. The second time may come an outer step late.
    """

    kind: Literal["uploaded"] = "uploaded"
    outer_step: Step
    contribution: Contribution
    is_stored: bool = True
    """All its objects lie in the store."""


class Reduced(Message):
    """A reducer's mean of one partition: what it is, and whether it lies in the store."""

    kind: Literal["reduced"] = "reduced"
    outer_step: Step
    partition_index: Annotated[int, Field(ge=0, lt=PARTITIONS_MAX)]
    object: ObjectRef
    excluded: Annotated[tuple[Exclusion, ...], Field(max_length=CONTRIBUTIONS_MAX)] = ()
    is_stored: bool = True
    """False of a reducer that the plan does not name as a writer: two that agree need one copy in the store."""


class Applied(Message):
    """A replica has applied a manifest and stands at the next outer step's anchor."""

    kind: Literal["applied"] = "applied"
    outer_step: Step
    """Of the manifest."""
    state_digest: Blake3


class CheckpointUploaded(Message):
    """The anchor that `StageState.checkpoint_by` asked for lies in the store."""

    kind: Literal["checkpoint_uploaded"] = "checkpoint_uploaded"
    outer_step: Step
    object: ObjectRef
    state_digest: Blake3
