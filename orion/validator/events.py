"""What can happen to a validator, and what it can decide to do. No behaviour.

Every effect ends as exactly one event of the list beside it; feeds and ticks come unasked. Whoever runs the core (the
loop, the simulator) carries out its effects and hands the events back; what comes late, twice or unasked changes
nothing.

| effect | ends as |
| --- | --- |
| FetchCommitments | CommitmentsArrived, OrchestratorFailed |
| FetchLedger | LedgerArrived, OrchestratorFailed |
| FetchMerge | MergeArrived, OrchestratorFailed |
| FetchSigns | SignsArrived, OrchestratorFailed |
| SendVerdict | VerdictSent, OrchestratorFailed |
| SendScores | ScoresSent, OrchestratorFailed |
| FetchLog | LogArrived, LogFailed |
| FetchEvidence | EvidenceArrived, EvidenceFailed |
| Replay | ReplayEnded, ReplayUnavailable |
| Reduce | ReductionEnded, ReductionUnavailable |
| FetchMetagraph | MetagraphArrived, ChainFailed |
| SetWeights | WeightsSet, WeightsRefused, ChainFailed |
| Notice | nothing: it is a line for the log |

Shapes: B sequences, T tokens, C boundary width, U = T + 1 token ids.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Literal

from torch import Tensor

from orion.common.ids import Digest, Direction, Hotkey
from orion.common.protocol.messages import (
    CheckpointRef,
    Commitment,
    Contribution,
    Feed,
    Receipt,
)
from orion.common.protocol.records import (
    BoundaryRecord,
    Commitments,
    CommittedLog,
    EvidenceRequest,
    Ledger,
    LogEntry,
    LogRequest,
    MergeRecord,
    Pathways,
    ScoreSheet,
    Verdict,
)

TensorBody = Mapping[str, Tensor]
"""A decoded body: `z` [B, T, C] and `ids` [B, U] of an activation, `g` [B, T, C] of a gradient."""


@dataclass(frozen=True, slots=True, eq=False)
class ReplayOperation:
    """One logged operation with the tensors its miner handed over, both already checked against the log's digests."""

    entry: LogEntry
    input: TensorBody | None
    output: TensorBody | None


@dataclass(frozen=True, slots=True, eq=False)
class LogProof:
    """A log as it was handed over, and what it was checked against."""

    commitments: tuple[Commitment, ...]
    request: LogRequest
    log: CommittedLog


@dataclass(frozen=True, slots=True, eq=False)
class ErrorStates:
    """What a miner's uploads had lost before and after an outer step; checked against what it told with them."""

    before_N: Tensor | None
    """fp32, of the stage's length; None: nothing was added, as nothing of the miner's entered the merge before."""
    after_N: Tensor


@dataclass(frozen=True, slots=True, eq=False)
class ReplayTask:
    """A prefix of a committed log, to be replayed from the public anchor of its outer step."""

    miner: Hotkey
    stage_index: int
    outer_step: int
    checkpoint: CheckpointRef | None
    """Newest known checkpoint of the stage at or before the outer step; None = start from the initial parameters."""
    operations: tuple[ReplayOperation, ...]
    proof: "LogProof | None" = None
    """That this is the committed log, for others to check; None where nobody needs it."""
    contribution: Contribution | None = None
    """What the miner uploaded; with it the operations are its whole log, and the pseudo-gradient is compared too."""
    url: str | None = None
    """Where the miner is asked for its error states, if the run's codec has them."""
    was_late: bool = False
    """The merge before names the miner as late: its log may take that in, even where its upload never came."""


@dataclass(frozen=True, slots=True)
class ReplayResult:
    """What a replay found. The miner passes when `failure` is None."""

    num_operations: int
    """Replayed, up to and including the one that failed."""
    num_compared: int
    """Of these, operations whose output could be compared (an inner step, for example, has none)."""
    num_bit_equal: int
    """Of the compared ones, those whose output had the very same bits."""
    cosine_least: float
    norm_ratio_least: float
    num_partitions: int
    """Of the pseudo-gradient, compared."""
    pseudo_gradient_cosine_least: float
    pseudo_gradient_norm_ratio_least: float
    num_foreign_inputs: int
    """Inputs whose token ids are not those of their data id. Somebody before this miner changed them."""
    failure: str | None


@dataclass(frozen=True, slots=True)
class ReductionTask:
    """A partition to reduce again."""

    stage_index: int
    outer_step: int
    partition_index: int
    contributions: tuple[Contribution, ...]
    """In the order in which they are added."""


@dataclass(frozen=True, slots=True)
class ChainView:
    """What the validator needs to know of the subnet, read at one block."""

    block: int
    block_s: float
    """Seconds between blocks."""
    uids: Mapping[Hotkey, int]
    owner_uid: int | None
    """Slot of the subnet owner's hotkey, to which the burn share goes; None when it has none."""
    has_permit: bool
    """Whether this validator may set weights."""
    next_epoch_s: float | None
    """Seconds until the next epoch, when permits change; None = there are no epochs."""
    last_update_block: int | None
    """When this validator last set weights; None = never."""
    weights_rate_limit_blocks: int
    weight_max: float
    """Largest share that the chain lets one slot have, in (0, 1]."""


class FetchProblem(StrEnum):
    """Why a miner did not hand over what was asked for."""

    UNREACHABLE = "unreachable"
    """No answer, or the connection broke: asked again until the deadline."""
    BUSY = "busy"
    """Told to come again: asked again until the deadline."""
    NOT_FOUND = "not_found"
    """The miner answers, and says that it has no such thing."""
    REFUSED = "refused"
    """The miner answers, and refuses."""
    BAD_BODY = "bad_body"
    """What came is no such message or tensor: too large, malformed, wrong shape or type, not finite."""


# --- events -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Ticked:
    """Time passed. Needed about once a second; carries nothing, the time is an argument."""


@dataclass(frozen=True, slots=True)
class FeedArrived:
    """The long-poll answered, be it with an unchanged version."""

    feed: Feed


@dataclass(frozen=True, slots=True)
class CommitmentsArrived:
    outer_step: int
    commitments: Commitments


@dataclass(frozen=True, slots=True)
class LedgerArrived:
    ledger: Ledger


@dataclass(frozen=True, slots=True)
class MergeArrived:
    """How a stage's outer step was merged."""

    record: MergeRecord


@dataclass(frozen=True, slots=True)
class SignsArrived:
    """What the public record shows of who may do harm."""

    asked: "FetchSigns"
    pathways: tuple[Pathways, ...]
    """Pages of the outer steps that were asked for; none for one that is not kept any more."""
    boundaries: tuple[BoundaryRecord, ...]


@dataclass(frozen=True, slots=True)
class LogArrived:
    miner: Hotkey
    outer_step: int
    """That was asked for."""
    log: CommittedLog
    agreed: tuple[Receipt, ...] = ()
    """The miner's transfers on which both ends agree."""


@dataclass(frozen=True, slots=True)
class LogFailed:
    miner: Hotkey
    outer_step: int
    problem: FetchProblem
    detail: str


@dataclass(frozen=True, slots=True, eq=False)
class EvidenceArrived:
    miner: Hotkey
    request: EvidenceRequest
    digest: Digest
    """Of the body as it came, computed by the receiver."""
    body: TensorBody


@dataclass(frozen=True, slots=True)
class EvidenceFailed:
    miner: Hotkey
    request: EvidenceRequest
    problem: FetchProblem
    detail: str


@dataclass(frozen=True, slots=True)
class ReplayEnded:
    miner: Hotkey
    outer_step: int
    result: ReplayResult
    compute_s: float
    """Time that it took on the device."""


@dataclass(frozen=True, slots=True)
class ReplayUnavailable:
    """The validator itself could not replay: no anchor, no data, no memory. Not the miner's fault."""

    miner: Hotkey
    outer_step: int
    detail: str
    retry: bool
    """Whether it may well go better in a while."""


@dataclass(frozen=True, slots=True)
class ReductionEnded:
    """What an honest reducer delivers for a partition."""

    stage_index: int
    outer_step: int
    partition_index: int
    digest: Digest | None
    """Of the mean's object; None: no contribution was fit to enter it."""
    excluded: tuple[Hotkey, ...]
    compute_s: float
    """Time that it took."""
    excluded_late: tuple[Hotkey, ...] = ()
    """Whose late contribution was left out."""


@dataclass(frozen=True, slots=True)
class ReductionUnavailable:
    """The validator itself could not reduce: an object was not to be had. Nobody's fault."""

    stage_index: int
    outer_step: int
    partition_index: int
    detail: str
    retry: bool
    """Whether it may well go better in a while."""


@dataclass(frozen=True, slots=True)
class ScoresSent:
    sheet: ScoreSheet


@dataclass(frozen=True, slots=True)
class VerdictSent:
    verdict: Verdict


@dataclass(frozen=True, slots=True)
class MetagraphArrived:
    view: ChainView


@dataclass(frozen=True, slots=True)
class WeightsSet:
    """The chain has taken the weights."""


@dataclass(frozen=True, slots=True)
class WeightsRefused:
    detail: str
    retry_after_s: float | None
    """None: asking again changes nothing."""


# --- effects ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class FetchCommitments:
    outer_step: int


@dataclass(frozen=True, slots=True)
class FetchLedger:
    from_outer_step: int


@dataclass(frozen=True, slots=True)
class FetchMerge:
    stage_index: int
    outer_step: int


@dataclass(frozen=True, slots=True)
class FetchSigns:
    """Read the pathways of some outer steps, and every miner's report on its neighbours."""

    outer_steps: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class FetchLog:
    miner: Hotkey
    url: str
    request: LogRequest
    size_bytes_max: int
    """Of the answer."""
    timeout_s: float
    """Of this attempt."""


@dataclass(frozen=True, slots=True)
class FetchEvidence:
    miner: Hotkey
    url: str
    request: EvidenceRequest
    direction: Direction
    """Layout of the body: an activation's or a gradient's."""
    timeout_s: float


@dataclass(frozen=True, slots=True)
class Replay:
    task: ReplayTask


@dataclass(frozen=True, slots=True)
class Reduce:
    task: ReductionTask


@dataclass(frozen=True, slots=True)
class SendVerdict:
    verdict: Verdict


@dataclass(frozen=True, slots=True)
class SendScores:
    """Publish what the weights are made of."""

    sheet: ScoreSheet


@dataclass(frozen=True, slots=True)
class FetchMetagraph:
    """Read the subnet's slots and hyperparameters into a ChainView."""


@dataclass(frozen=True, slots=True)
class SetWeights:
    weights: Mapping[int, float]
    """uid to share; they add up to 1."""


@dataclass(frozen=True, slots=True)
class Notice:
    """Something a person or a monitor should be able to find in the log."""

    level: Literal["info", "warning"]
    event: str
    fields: Mapping[str, object]


OrchestratorErrand = FetchCommitments | FetchLedger | FetchMerge | FetchSigns | SendVerdict | SendScores
"""What the orchestrator is asked."""


# --- failures that are nobody's fault ---------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class OrchestratorFailed:
    """The orchestrator was not reached, or refused."""

    effect: OrchestratorErrand
    detail: str
    retry: bool
    """False when it refused for good."""


@dataclass(frozen=True, slots=True)
class ChainFailed:
    """The chain was not reached."""

    effect: FetchMetagraph | SetWeights
    detail: str


Event = (
    Ticked
    | FeedArrived
    | CommitmentsArrived
    | LedgerArrived
    | MergeArrived
    | SignsArrived
    | LogArrived
    | LogFailed
    | EvidenceArrived
    | EvidenceFailed
    | ReplayEnded
    | ReplayUnavailable
    | ReductionEnded
    | ReductionUnavailable
    | VerdictSent
    | ScoresSent
    | MetagraphArrived
    | WeightsSet
    | WeightsRefused
    | OrchestratorFailed
    | ChainFailed
)

Effect = (
    FetchCommitments
    | FetchLedger
    | FetchMerge
    | FetchSigns
    | FetchLog
    | FetchEvidence
    | Replay
    | Reduce
    | SendVerdict
    | SendScores
    | FetchMetagraph
    | SetWeights
    | Notice
)
