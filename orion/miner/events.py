"""What can happen to a miner, and the jobs that its device is given. What it decides to do is in `effects`.

Owns nothing but these types. They carry identities, digests, sizes and messages, never tensors: whoever carries out the
effects (the loop of a real miner, the simulator) keeps tensors in a cache under the microbatch's id.
"""

from dataclasses import dataclass
from enum import StrEnum

from orion.common.ids import DataId, Digest, Direction, Hotkey, MicrobatchId
from orion.common.protocol.messages import (
    Applied,
    Cancel,
    CheckpointUploaded,
    Commitment,
    Exclusion,
    Feed,
    HoldsQuery,
    Joined,
    Lease,
    ObjectRef,
    Reduced,
    Refusal,
    RefusalCode,
    Transfer,
    Uploaded,
)

Notice = Uploaded | Reduced | Applied | CheckpointUploaded
"""What a miner tells the orchestrator about its part of an outer step."""


@dataclass(frozen=True, slots=True)
class BodyRef:
    """A tensor body that lies in the cache, encoded."""

    digest: Digest
    size_bytes: int


# --- what the device does ---------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Forward:
    """Runs the stage forward; on the last stage loss and backward too. Ends as `ForwardDone` or `ComputeRefused`."""

    microbatch_id: MicrobatchId
    data_id: DataId


@dataclass(frozen=True, slots=True)
class Backward:
    """Runs the stage backward from the gradient in the cache. Ends as `BackwardDone` or `ComputeRefused`."""

    microbatch_id: MicrobatchId


@dataclass(frozen=True, slots=True)
class InnerStep:
    """Averages what was accumulated and steps the inner optimizer. Ends as `InnerStepDone`."""

    inner_step_index: int
    """From the start of the run: it sets the learning rate."""
    share: float
    """Of a full batch, in (0, 1]; scales the learning rate."""


@dataclass(frozen=True, slots=True)
class EncodePseudoGradient:
    """Encodes anchor minus parameters, one body per partition, into the outbox. Ends as `PseudoGradientEncoded`."""

    outer_step: int
    adds_error: bool = False
    """What the upload of the outer step before has lost is added: that upload was merged."""


@dataclass(frozen=True, slots=True)
class TakeMerged:
    """Adds what was merged, which lies beside the device, to the outer step that was begun ahead of it. Ends as
    `MergedTaken`."""

    outer_step: int
    """That was merged."""


Job = Forward | Backward | InnerStep | EncodePseudoGradient | TakeMerged


@dataclass(frozen=True, slots=True)
class ForwardDone:
    microbatch_id: MicrobatchId
    output: BodyRef | None
    """The activation; on the last stage the input gradient; None where the stage is first and last."""
    loss: float | None
    """Mean per token; on the last stage only."""


@dataclass(frozen=True, slots=True)
class BackwardDone:
    microbatch_id: MicrobatchId
    output: BodyRef | None
    """The input gradient; None on the first stage."""


@dataclass(frozen=True, slots=True)
class ComputeRefused:
    """The device could not use what it was given (not finite, no longer held); nothing was accumulated or changed."""

    microbatch_id: MicrobatchId
    reason: str


@dataclass(frozen=True, slots=True)
class InnerStepDone:
    num_microbatches: int
    refused_reason: str | None
    """Why the step was not taken (gradient not finite); what was accumulated is gone all the same."""


@dataclass(frozen=True, slots=True)
class PseudoGradientEncoded:
    outer_step: int
    objects: tuple[ObjectRef, ...]
    """In the order of the partitions; empty when it cannot be encoded because it is not finite."""
    error_digest: Digest | None = None
    """Of the error state that it leaves behind, which is on disk; None where the codec has none."""
    goes_on: bool = False
    """Overlapped runs: the engine stands at the beginning of the next outer step, less what was encoded."""


@dataclass(frozen=True, slots=True)
class MergedTaken:
    outer_step: int
    """That was merged."""


JobResult = ForwardDone | BackwardDone | ComputeRefused | InnerStepDone | PseudoGradientEncoded | MergedTaken


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
    queued: int | None = None
    """The passes that the peer's device has before it, when it answered so."""
    credits: int | None = None
    """How many more microbatches the peer would admit, when it answered so; 0 with BUSY for want of them."""
    adopted: bool = False
    """With ACCEPTED: the peer held the microbatch from a lost miner and takes us in its place."""


@dataclass(frozen=True, slots=True)
class HoldsAsked:
    """A miner of a stage before asks which microbatches are held here. Answered by `AnswerHolds` or `Refuse`."""

    request_id: int
    """As an offer's."""
    sender: Hotkey
    query: HoldsQuery


@dataclass(frozen=True, slots=True)
class HoldsEnded:
    """A question which microbatches a peer holds has ended: ACCEPTED, REFUSED (BUSY too) or UNREACHABLE."""

    peer: Hotkey
    query: HoldsQuery
    outcome: SendOutcome
    seconds: float
    held: tuple[MicrobatchId, ...] = ()
    """With ACCEPTED."""


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
class MergedFetched:
    """The state after `outer_step` lies beside the device, for `TakeMerged`."""

    outer_step: int
    """Of the manifest."""
    state_digest: Digest


@dataclass(frozen=True, slots=True)
class MergedNotFetched:
    """A mean could not be fetched."""

    outer_step: int
    reason: str


@dataclass(frozen=True, slots=True)
class LogPersisted:
    """A log and its tensors are durable up to a commitment, which now says how many entries' tensors are kept."""

    commitment: Commitment


@dataclass(frozen=True, slots=True)
class UploadEnded:
    """The encoded pseudo-gradient lies in the store, or not."""

    outer_step: int
    succeeded: bool


@dataclass(frozen=True, slots=True)
class ReduceEnded:
    """A partition's mean is known, and lies in the store if it was to be written."""

    outer_step: int
    partition_index: int
    object: ObjectRef | None
    """None: every contribution was left out, so there is no mean."""
    excluded: tuple[Exclusion, ...]
    is_stored: bool = True


@dataclass(frozen=True, slots=True)
class SlicesFetched:
    """It was tried to fetch a partition's slices ahead."""

    outer_step: int
    partition_index: int
    is_complete: bool
    """All of them are held."""


@dataclass(frozen=True, slots=True)
class MeanFetched:
    """It was tried to fetch a partition's mean ahead."""

    outer_step: int
    partition_index: int
    is_complete: bool


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


@dataclass(frozen=True, slots=True)
class StrangerAsked:
    """Somebody asked for a log or evidence who has no permit as far as the feed says; it was told to come again."""


Event = (
    Ticked
    | FeedArrived
    | JoinEnded
    | ForwardOffered
    | BackwardOffered
    | BodyEnded
    | CancelArrived
    | SendEnded
    | HoldsAsked
    | HoldsEnded
    | ComputeEnded
    | LeaseGranted
    | LeaseRefused
    | AnchorLoaded
    | AnchorFailed
    | ApplyEnded
    | ApplyFailed
    | MergedFetched
    | MergedNotFetched
    | LogPersisted
    | UploadEnded
    | ReduceEnded
    | ReduceFailed
    | SlicesFetched
    | MeanFetched
    | CheckpointEnded
    | ReportEnded
    | NoticeEnded
    | StrangerAsked
)
