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
    next_merges: dict[int, MergeRecord | None] = field(default_factory=dict)
    """By stage, of the outer step after: whose contribution came late is in there. None: it could not be had."""

    def on_merge(self, stage_index: int, outer_step: int, record: MergeRecord | None) -> None:
        """How a stage was merged, in this outer step or the one after it; None: that could not be had."""
        if outer_step == self.outer_step:
            self.reductions.on_merge(stage_index, record)
        elif outer_step == self.outer_step + 1:
            self.next_merges.setdefault(stage_index, record)

    def is_late(self, miner: Hotkey, stage_index: int) -> bool:
        """Whether the next merge will say what became of a miner's contribution."""
        record = self.reductions.record(stage_index)
        return record is not None and miner in record.manifest.late

    def knows_contribution(self, miner: Hotkey, stage_index: int) -> bool:
        """Whether it is known what entered a merge of what a miner uploaded in this outer step."""
        if self.is_late(miner, stage_index):
            return stage_index in self.next_merges
        return self.reductions.knows(stage_index)

    def contribution_of(self, miner: Hotkey, stage_index: int) -> Contribution | None:
        """What entered a merge of what a miner uploaded in this outer step, in time or late."""
        own = _find(self.reductions.record(stage_index), miner, age=0)
        return own or _find(self.next_merges.get(stage_index), miner, age=1)


def _find(record: MergeRecord | None, miner: Hotkey, age: int) -> Contribution | None:
    contributions = () if record is None else record.contributions
    return next((each for each in contributions if each.voice == (miner, age)), None)


def target_of(record: CommitmentRecord, draw: Draw, outer_step: int) -> Target:
    commitments = (*record.earlier, record.commitment)
    return Target(record.hotkey, record.stage_index, outer_step, commitments, verifies=draw.verifies)
