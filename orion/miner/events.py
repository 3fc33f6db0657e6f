"""What can happen to a miner (events) and what it decides to do (effects): the whole language of `MinerCore`.

Owns nothing but these types. They carry identities, digests, sizes and messages, never tensors: whoever carries out the
effects (the loop of a real miner, the simulator) keeps tensors in a cache under (microbatch id, kind).

Every effect ends as the event named in its docstring, exactly once, whatever happens, within a bound that its executor
sets; the core never waits for anything else. The exceptions end nothing: `Accept`, `Refuse`, `SendCancel` (best effort)
and `FreeTensors`.
"""

from dataclasses import dataclass
from enum import StrEnum

from orion.common.ids import Digest, Direction, Hotkey, MicrobatchId
from orion.common.protocol.messages import (
    Accepted,
    Applied,
    Cancel,
    CheckpointRef,
    CheckpointUploaded,
    Contribution,
    Exclusion,
    Feed,
    Joined,
    Lease,
    LeaseRequest,
    Manifest,
    ObjectRef,
    Reduced,
    Refusal,
    RefusalCode,
    Report,
    Transfer,
    Uploaded,
)
from orion.miner.jobs import (  # also part of the language of events, and imported from here
    Backward as Backward,
)
from orion.miner.jobs import (
    BackwardDone as BackwardDone,
)
from orion.miner.jobs import (
    BodyRef as BodyRef,
)
from orion.miner.jobs import (
    ComputeRefused as ComputeRefused,
)
from orion.miner.jobs import (
    EncodePseudoGradient as EncodePseudoGradient,
)
from orion.miner.jobs import (
    Forward as Forward,
)
from orion.miner.jobs import (
    ForwardDone as ForwardDone,
)
from orion.miner.jobs import (
    InnerStep as InnerStep,
)
from orion.miner.jobs import (
    InnerStepDone as InnerStepDone,
)
from orion.miner.jobs import (
    Job as Job,
)
from orion.miner.jobs import (
    JobResult as JobResult,
)
from orion.miner.jobs import (
    PseudoGradientEncoded as PseudoGradientEncoded,
)

Notice = Uploaded | Reduced | Applied | CheckpointUploaded
"""What a miner tells the orchestrator about its part of an outer step."""


# --- events -----------------------------------------------------------------------------------------------------------


class SendOutcome(StrEnum):
    """How an attempt to hand a tensor to a peer ended."""

    ACCEPTED = "accepted"
    BUSY = "busy"
    REFUSED = "refused"
    UNREACHABLE = "unreachable"
    """Time-out or broken connection: nothing is known about what the peer did."""


@dataclass(frozen=True, slots=True)
class Ticked:
    """Time has passed. Due at `MinerCore.next_wake_s()`; more often does no harm."""


@dataclass(frozen=True, slots=True)
class FeedArrived:
    """The newest state feed; versions in between may have been skipped, older ones are ignored."""

    feed: Feed


@dataclass(frozen=True, slots=True)
class JoinEnded:
    joined: Joined | None
    """None: refused or unreachable; the core asks again."""


@dataclass(frozen=True, slots=True)
class ForwardOffered:
    """A peer offers an activation; signature, run and size are checked, the body is not read yet.

    Answered by `ReadBody` (then `BodyEnded`), `Accept` (a duplicate: the body is not needed) or `Refuse`.
    """

    request_id: int
    """Chosen by the shell; unique in the process."""
    sender: Hotkey
    transfer: Transfer


@dataclass(frozen=True, slots=True)
class BackwardOffered:
    """A peer offers a gradient; as `ForwardOffered`."""

    request_id: int
    sender: Hotkey
    transfer: Transfer


@dataclass(frozen=True, slots=True)
class BodyEnded:
    """The body of an admitted offer: checked and in the cache, or failed and not in the cache.

    Answered by `Accept` or `Refuse`.
    """

    request_id: int
    refusal: Refusal | None
    """Why the body failed; None: it is whole."""


@dataclass(frozen=True, slots=True)
class CancelArrived:
    sender: Hotkey
    cancel: Cancel


@dataclass(frozen=True, slots=True)
class SendEnded:
    microbatch_id: MicrobatchId
    direction: Direction
    peer: Hotkey
    outcome: SendOutcome
    seconds: float
    """From the first byte to the answer."""
    code: RefusalCode | None = None
    """With REFUSED."""
    retry_after_s: float | None = None
    """With BUSY: the peer's hint."""
    queued: int = 0
    """With ACCEPTED: the peer's queue."""


@dataclass(frozen=True, slots=True)
class ComputeEnded:
    result: JobResult


@dataclass(frozen=True, slots=True)
class LeaseGranted:
    lease: Lease


@dataclass(frozen=True, slots=True)
class LeaseRefused:
    """Refused or unreachable."""

    retry_after_s: float | None


@dataclass(frozen=True, slots=True)
class AnchorLoaded:
    """The engine stands at the start of `outer_step`."""

    stage_index: int
    outer_step: int
    state_digest: Digest


@dataclass(frozen=True, slots=True)
class AnchorFailed:
    """Something could not be fetched or did not fit its digest; the engine's state is as before or void."""

    reason: str


@dataclass(frozen=True, slots=True)
class ApplyEnded:
    """The engine stands at the start of `outer_step + 1`."""

    outer_step: int
    """Of the manifest."""
    state_digest: Digest


@dataclass(frozen=True, slots=True)
class ApplyFailed:
    """A mean could not be fetched; the engine still stands at the start of `outer_step`."""

    outer_step: int
    reason: str


@dataclass(frozen=True, slots=True)
class UploadEnded:
    """The encoded pseudo-gradient lies in the store, or not."""

    outer_step: int
    succeeded: bool


@dataclass(frozen=True, slots=True)
class ReduceEnded:
    """A partition's mean lies in the store."""

    outer_step: int
    partition_index: int
    object: ObjectRef | None
    """None: every contribution was left out, so there is no mean."""
    excluded: tuple[Exclusion, ...]


@dataclass(frozen=True, slots=True)
class ReduceFailed:
    """A contribution could not be fetched or the mean not be written; worth another try."""

    outer_step: int
    partition_index: int
    reason: str


@dataclass(frozen=True, slots=True)
class CheckpointEnded:
    """The anchor lies in the store; None: it does not."""

    outer_step: int
    object: ObjectRef | None


@dataclass(frozen=True, slots=True)
class ReportEnded:
    sequence: int
    acknowledged: bool
    """False: refused or unreachable; it is sent again."""


@dataclass(frozen=True, slots=True)
class NoticeEnded:
    notice: Notice
    outcome: SendOutcome
    """REFUSED is final; BUSY and UNREACHABLE are tried again."""


Event = (
    Ticked
    | FeedArrived
    | JoinEnded
    | ForwardOffered
    | BackwardOffered
    | BodyEnded
    | CancelArrived
    | SendEnded
    | ComputeEnded
    | LeaseGranted
    | LeaseRefused
    | AnchorLoaded
    | AnchorFailed
    | ApplyEnded
    | ApplyFailed
    | UploadEnded
    | ReduceEnded
    | ReduceFailed
    | CheckpointEnded
    | ReportEnded
    | NoticeEnded
)


# --- effects ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class RequestJoin:
    """Sends `Join`. Ends as `JoinEnded`."""


@dataclass(frozen=True, slots=True)
class Compute:
    """Gives the device its next job; one at a time. Ends as `ComputeEnded`."""

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
class FreeTensors:
    """Frees all that the cache and the engine hold of a microbatch; given exactly once for each admitted one."""

    microbatch_id: MicrobatchId


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


@dataclass(frozen=True, slots=True)
class ApplyManifest:
    """Fetches the means and applies the outer step. Ends as `ApplyEnded` or `ApplyFailed`. As `LoadAnchor` with the
    device."""

    manifest: Manifest


@dataclass(frozen=True, slots=True)
class UploadPseudoGradient:
    """Writes the encoded bodies of the outbox to the store, and empties it. Ends as `UploadEnded`."""

    outer_step: int
    objects: tuple[ObjectRef, ...]


@dataclass(frozen=True, slots=True)
class ReducePartition:
    """Fetches a partition of all contributions, writes the mean. Ends as `ReduceEnded` or `ReduceFailed`."""

    stage_index: int
    outer_step: int
    partition_index: int
    contributions: tuple[Contribution, ...]
    """All of the plan, in its order; the partition's object is `objects[partition_index]`."""


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


Effect = (
    RequestJoin
    | Compute
    | ReadBody
    | Accept
    | Refuse
    | SendTensor
    | SendCancel
    | FreeTensors
    | RequestLease
    | LoadAnchor
    | ApplyManifest
    | UploadPseudoGradient
    | ReducePartition
    | UploadCheckpoint
    | SendReport
    | SendNotice
)
