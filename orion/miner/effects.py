"""What a miner decides to do.

Every effect ends as the event named in its docstring, exactly once, whatever happens, within a bound that its executor
sets; the core never waits for anything else. The exceptions end nothing: `Accept`, `Refuse`, `AnswerHolds`,
`SendCancel` (best effort), `DropGraph`, `FreeTensors` and `FreeAllButGradient`.
"""

from dataclasses import dataclass

from orion.common.ids import Digest, Hotkey, MicrobatchId
from orion.common.protocol.messages import (
    Accepted,
    Cancel,
    CheckpointRef,
    Commitment,
    Contribution,
    Holds,
    HoldsQuery,
    LeaseRequest,
    Manifest,
    ObjectRef,
    Peer,
    Refusal,
    Report,
    Transfer,
)
from orion.common.protocol.records import LogEntry
from orion.miner.events import Job, Notice


@dataclass(frozen=True, slots=True)
class RequestJoin:
    """Sends `Join`. Ends as `JoinEnded`."""


@dataclass(frozen=True, slots=True)
class Compute:
    """Gives the device a job, to do after the one that it may be at. Ends as `ComputeEnded`, in the order given."""

    job: Job


@dataclass(frozen=True, slots=True)
class ReadBody:
    """Admits an offer: the body may be read, checked and put in the cache. Ends as `BodyEnded`."""

    request_id: int


@dataclass(frozen=True, slots=True)
class Accept:
    """Answers an offer."""

    request_id: int
    accepted: Accepted


@dataclass(frozen=True, slots=True)
class Refuse:
    """Answers an offer."""

    request_id: int
    refusal: Refusal


@dataclass(frozen=True, slots=True)
class SendTensor:
    """Sends the output in the cache that `transfer` describes to a peer. Ends as `SendEnded`."""

    peer: Hotkey
    url: str
    transfer: Transfer


@dataclass(frozen=True, slots=True)
class SendCancel:
    """Tells a peer; best effort, because deadlines free what a lost one leaves."""

    peer: Hotkey
    url: str
    cancel: Cancel


@dataclass(frozen=True, slots=True)
class DropGraph:
    """Has the device let go of what it holds for a microbatch's backward, which will not come. Its bodies stay."""

    microbatch_id: MicrobatchId


@dataclass(frozen=True, slots=True)
class FreeTensors:
    """Frees all that the cache and the engine hold of a microbatch; given exactly once for each admitted one."""

    microbatch_id: MicrobatchId


@dataclass(frozen=True, slots=True)
class FreeAllButGradient:
    """Frees all that is held of a microbatch but the gradient that was returned; before `FreeTensors`, once at most."""

    microbatch_id: MicrobatchId


@dataclass(frozen=True, slots=True)
class AskHolds:
    """Asks a peer which microbatches it holds, once, and waits so long for an answer. Ends as `HoldsEnded`."""

    peer: Hotkey
    url: str
    query: HoldsQuery
    limit_s: float


@dataclass(frozen=True, slots=True)
class AnswerHolds:
    """Answers a question."""

    request_id: int
    holds: Holds


@dataclass(frozen=True, slots=True)
class RequestLease:
    """Ends as `LeaseGranted` or `LeaseRefused`."""

    request: LeaseRequest


@dataclass(frozen=True, slots=True)
class LoadAnchor:
    """Builds an anchor and loads it into the engine of that stage. Ends as `AnchorLoaded` or `AnchorFailed`.

    Never given while the device computes, and nothing is computed until it has ended.
    """

    stage_index: int
    outer_step: int
    checkpoint: CheckpointRef | None
    """Where to start; None: at the initial parameters."""
    agreed: Digest | None = None
    """The digest of the anchor, where the stage's replicas have agreed on it."""
    holders: tuple[Peer, ...] = ()
    """Replicas that hold it: it is asked of them first, in parts."""


@dataclass(frozen=True, slots=True)
class ApplyManifest:
    """Fetches the means and applies the outer step. Ends as `ApplyEnded` or `ApplyFailed`. As `LoadAnchor` with the
    device."""

    manifest: Manifest


@dataclass(frozen=True, slots=True)
class FetchMerged:
    """Fetches the means and makes of them the state after the manifest's outer step, beside the device, which goes on
    meanwhile. Ends as `MergedFetched` or `MergedNotFetched`."""

    manifest: Manifest


@dataclass(frozen=True, slots=True)
class PersistLog:
    """Makes the log durable up to a commitment, and the tensors that it names. Ends as `LogPersisted`."""

    stage_index: int
    entries: tuple[LogEntry, ...]
    """New since the last one."""
    commitment: Commitment


@dataclass(frozen=True, slots=True)
class UploadPseudoGradient:
    """Writes encoded bodies of the outbox to the store, holds them, and takes them out. Ends as `UploadEnded`."""

    outer_step: int
    objects: tuple[ObjectRef, ...]


@dataclass(frozen=True, slots=True)
class ReducePartition:
    """Makes the mean of a partition of all contributions. Ends as `ReduceEnded` or `ReduceFailed`."""

    stage_index: int
    outer_step: int
    partition_index: int
    contributions: tuple[Contribution, ...]
    """All of the plan, in its order; the partition's object is `objects[partition_index]`."""
    writes: bool = True
    """Whether the mean is written to the store, too."""


@dataclass(frozen=True, slots=True)
class FetchSlices:
    """Fetches what is there of a partition of all contributions, and holds it; once all is there, also what that makes.
    Ends as `SlicesFetched`."""

    stage_index: int
    outer_step: int
    partition_index: int
    contributions: tuple[Contribution, ...]


@dataclass(frozen=True, slots=True)
class FetchMean:
    """Fetches a mean that stands, and holds it. Ends as `MeanFetched`."""

    stage_index: int
    outer_step: int
    partition_index: int
    object: ObjectRef


@dataclass(frozen=True, slots=True)
class UploadCheckpoint:
    """Writes the anchor and momentum of `outer_step`, which the engine holds. Ends as `CheckpointEnded`."""

    stage_index: int
    outer_step: int


@dataclass(frozen=True, slots=True)
class SendReport:
    """One at a time. Ends as `ReportEnded`."""

    report: Report


@dataclass(frozen=True, slots=True)
class SendNotice:
    """Tells the orchestrator. Ends as `NoticeEnded`."""

    notice: Notice


@dataclass(frozen=True, slots=True)
class RefreshFeed:
    """Asks for the feed as it is now, beside the question that waits for its next change. Ends as `FeedArrived`, or as
    nothing when it fails."""


Effect = (
    RequestJoin
    | Compute
    | ReadBody
    | Accept
    | Refuse
    | SendTensor
    | SendCancel
    | AskHolds
    | AnswerHolds
    | DropGraph
    | FreeTensors
    | FreeAllButGradient
    | RequestLease
    | LoadAnchor
    | ApplyManifest
    | FetchMerged
    | PersistLog
    | UploadPseudoGradient
    | ReducePartition
    | FetchSlices
    | FetchMean
    | UploadCheckpoint
    | SendReport
    | SendNotice
    | RefreshFeed
)
