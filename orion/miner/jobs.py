"""What a miner's device is given to do, and what comes of it. Types only; ids, digests and sizes, never tensors."""

from dataclasses import dataclass

from orion.common.ids import DataId, Digest, MicrobatchId
from orion.common.protocol.messages import ObjectRef


@dataclass(frozen=True, slots=True)
class BodyRef:
    """A tensor body that lies in the cache, encoded."""

    digest: Digest
    size_bytes: int


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


Job = Forward | Backward | InnerStep | EncodePseudoGradient


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


JobResult = ForwardDone | BackwardDone | ComputeRefused | InnerStepDone | PseudoGradientEncoded
