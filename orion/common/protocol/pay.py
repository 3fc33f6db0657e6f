"""What a miner is paid, and why: the public answer about one hotkey."""

from typing import Annotated, Literal

from pydantic import Field

from orion.common.protocol.fields import MINERS_MAX, Count, Ss58, StageIndex, Step
from orion.common.protocol.messages import Message
from orion.common.protocol.records import MergeShare, VerdictRecord

STEPS_MAX = 1_024
VERDICTS_PER_STEP_MAX = 256

Amount = Annotated[float, Field(ge=0, allow_inf_nan=False)]


class PaidStep(Message):
    """One outer step of a miner."""

    outer_step: Step
    stage_index: StageIndex | None
    """None when nothing was credited."""
    num_credited: Count
    """Backward passes that both ends agree on."""
    num_committed: Count
    """Those that its inner steps have averaged since its log was last begun anew, as its newest commitment says."""
    counted_flops: Amount
    """What they count: `num_committed` at most, weighed by its part in the merge, before any failed check, and once
    they are verified."""
    num_receipts: Count
    num_matched: Count
    """Of these, those that the other end confirms; the rest is one-sided and earns nothing."""
    num_contradictions: Count
    """Of its receipts with others', or with its own."""
    merge: MergeShare | None
    """None while it is not settled."""
    verdicts: Annotated[tuple[VerdictRecord, ...], Field(max_length=VERDICTS_PER_STEP_MAX)]
    waiting: bool
    """Whether the work waits for verification, and counts little until then: no replay of a whole outer step from about
    here on has passed yet."""
    failed: bool
    """Whether a failed check of it stands: then nothing counts until it leaves the window."""


class GivenScore(Message):
    """A validator's newest score of the miner."""

    validator: Ss58
    outer_step: Step
    score: Amount
    weight: Annotated[float, Field(ge=0, le=1)]
    sequence: Count
    """Of the ledger entry that holds the signed score sheet."""


class MinerPay(Message):
    """A miner's whole pay within the score window."""

    kind: Literal["miner_pay"] = "miner_pay"
    hotkey: Ss58
    outer_step: Step
    """The run's newest."""
    window_start: Step
    """First outer step that counts now."""
    score: Amount
    """By the ledger as it is now."""
    verified_outer_step: Step | None
    """The newest of the window of which a replay of the whole has passed; None when none has."""
    counted_flops: Amount
    """What all the work of the window counts once it is verified, failed checks apart."""
    waiting_flops: Amount
    """Of that, what waits for verification."""
    unverified_factor: Annotated[float, Field(gt=0, le=1)]
    """What waiting work counts."""
    paid_again_from: Step | None
    """First outer step from which on no failed check is in the window any more; None when there is none now."""
    steps: Annotated[tuple[PaidStep, ...], Field(max_length=STEPS_MAX)]
    """Newest last."""
    scores: Annotated[tuple[GivenScore, ...], Field(max_length=MINERS_MAX)]
    """By validator."""
