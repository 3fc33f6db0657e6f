"""One round of a validator: what is known of an outer step while it is checked. Data, and what is read off it.

Decides nothing: the core does (`core.py`).
"""

from dataclasses import dataclass, field

from orion.common.ids import Hotkey, Subject
from orion.common.protocol.messages import Contribution
from orion.common.protocol.records import CommitmentRecord, Commitments, Ledger, MergeRecord, Verdict
from orion.validator.check import Check, Target
from orion.validator.reduction_check import ReductionCheck
from orion.validator.sampling import Draw


@dataclass(slots=True)
class Round:
    """The checks of one outer step."""

    outer_step: int
    reductions: ReductionCheck
    commitments: Commitments | None = None
    ledger: Ledger | None = None
    targets: list[Target] | None = None
    """Still to check; None before the draw."""
    check: Check | None = None
    silent_since_s: float | None = None
    """When the check under way ended in silence, which waits for a feed to be settled; None = it has not."""
    verdicts: dict[tuple[Hotkey, Subject], Verdict] = field(default_factory=dict)
    has_judged_reductions: bool = False


def contribution_of(record: MergeRecord | None, miner: Hotkey) -> Contribution | None:
    """What a miner's stage merged of it."""
    contributions = () if record is None else record.contributions
    return next((contribution for contribution in contributions if contribution.hotkey == miner), None)


def target_of(record: CommitmentRecord, draw: Draw, outer_step: int) -> Target:
    commitments = (*record.earlier, record.commitment)
    return Target(record.hotkey, record.stage_index, outer_step, commitments, verifies=draw.verifies)
