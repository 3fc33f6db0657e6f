"""Where one stage is in its outer step.

Owns the record; the rules that move it are in `phases` (and `checkpoints`). What a phase needs exists exactly while the
phase lasts: it lies in the activity, not in fields that are sometimes empty.
"""

from dataclasses import dataclass, field

from orion.common.ids import Digest, Hotkey, Phase
from orion.common.protocol.messages import (
    CheckpointRef,
    CheckpointUploaded,
    Contribution,
    Manifest,
    MergePlan,
    PartitionPlan,
)
from orion.common.protocol.records import MergeRecord
from orion.orchestrator.merge import PartitionMerge

NEVER_S = 1e11
"""The latest time a message can hold: shown as the deadline of a phase that waits for members."""


@dataclass(slots=True)
class Training:
    """TRAIN: microbatches may travel once the run has opened this outer step."""


@dataclass(slots=True)
class Uploading:
    """UPLOAD: contributors write their pseudo-gradients."""

    awaited: list[Hotkey]
    """Those who trained in this outer step."""
    began_s: float
    due_s: dict[Hotkey, float] = field(default_factory=dict)
    """Until when each is waited for, once there is a quorum: by what its link has been seen to do."""
    uploads: dict[Hotkey, Contribution] = field(default_factory=dict)
    """As announced: what each stands by."""
    stored: list[Hotkey] = field(default_factory=list)
    """Whose contribution is said to lie in the store."""
    partitions: list[PartitionMerge] | None = None
    """Who will reduce what, from when on everybody who can contribute has announced what: then contributions may be
    read, and nobody can announce any more."""


@dataclass(slots=True)
class Reducing:
    """MERGE, first part: reducers write means."""

    contributions: tuple[Contribution, ...]
    partitions: list[PartitionMerge]
    allowance_s: float
    """What a reducer may take before another one is asked beside it, over the slowest link that is waited for."""
    allowances_s: dict[Hotkey, float] = field(default_factory=dict)
    """The same of those whose links are known."""


@dataclass(slots=True)
class Applying:
    """MERGE, second part: the manifest of this outer step is out, members apply it."""

    awaited: list[Hotkey]
    """Those who were ready or active when it came out; nobody who comes later can hold the phase up."""
    digests: dict[Hotkey, Digest] = field(default_factory=dict)


@dataclass(slots=True)
class Finishing:
    """MERGE, after the last outer step: the final anchor is being uploaded."""


@dataclass(slots=True)
class Ended:
    """DONE."""


MERGING = (Uploading, Reducing, Applying)
"""What a stage does between two anchors."""


@dataclass(slots=True)
class Late:
    """A contribution that was announced in time and that no merge has yet: it goes into the next one, once it is
    durable."""

    outer_step: int
    """That it was trained in."""
    contribution: Contribution
    """As announced."""
    is_left: bool = False
    """Its miner's process has begun anew, so that nothing more of it will be written."""


Activity = Training | Uploading | Reducing | Applying | Finishing | Ended


@dataclass(slots=True)
class CheckpointTask:
    """Who was asked for the whole anchor of the outer step under way."""

    hotkey: Hotkey
    due_s: float
    """Then somebody else is asked."""
    tried: list[Hotkey]
    """All that were asked so far, this one included."""
    upload: CheckpointUploaded | None = None
    """What it says it has written; counts once it is durable."""


@dataclass(slots=True)
class StageProgress:
    """One stage. `outer_step` only grows."""

    stage_index: int
    activity: Activity = field(default_factory=Training)
    outer_step: int = 0
    deadline_s: float = NEVER_S
    anchor_digest: Digest | None = None
    """What its replicas agreed on at the start of `outer_step`; None at the start of the run, or when nobody told."""
    manifests: dict[int, Manifest] = field(default_factory=dict)
    """By outer step, without gaps up to the newest."""
    merges: dict[int, MergeRecord] = field(default_factory=dict)
    """How each of these manifests came about."""
    checkpoints: list[CheckpointRef] = field(default_factory=list)
    """The durable ones, oldest first."""
    task: CheckpointTask | None = None
    late: dict[Hotkey, Late] = field(default_factory=dict)
    """From the end of an upload phase to that of the next."""

    @property
    def phase(self) -> Phase:
        match self.activity:
            case Training():
                return Phase.TRAIN
            case Uploading():
                return Phase.UPLOAD
            case Reducing() | Applying() | Finishing():
                return Phase.MERGE
            case Ended():
                return Phase.DONE

    @property
    def plan(self) -> MergePlan | None:
        """What the reducers do, from when on contributions may be read."""
        match self.activity:
            case Uploading(uploads=uploads, partitions=[*partitions]):
                announced = (uploads[hotkey] for hotkey in sorted(uploads))
                contributions, is_final = (*self.aged(), *announced), False
            case Reducing(contributions=contributions, partitions=[*partitions]):
                is_final = True
            case _:
                return None
        return MergePlan(
            stage_index=self.stage_index,
            outer_step=self.outer_step,
            is_final=is_final,
            contributions=contributions,
            partitions=tuple(
                PartitionPlan(
                    partition_index=partition.partition_index,
                    reducers=tuple(partition.reducers),
                    writers=tuple(partition.writers),
                    settled=None if partition.outcome is None else partition.outcome.object,
                )
                for partition in partitions
            ),
        )

    def aged(self) -> tuple[Contribution, ...]:
        """What is late, as it counts in the merge of this outer step, by hotkey."""
        return tuple(
            late.contribution.model_copy(update={"age": self.outer_step - late.outer_step})
            for _, late in sorted(self.late.items())
        )

    @property
    def newest_manifest(self) -> Manifest | None:
        return self.manifests[max(self.manifests)] if self.manifests else None

    @property
    def newest_checkpoint(self) -> CheckpointRef | None:
        return self.checkpoints[-1] if self.checkpoints else None

    def rebuildable_from(self, outer_step: int) -> int:
        """The oldest outer step whose objects are needed to build the anchor of `outer_step` and all later ones."""
        before = [checkpoint.outer_step for checkpoint in self.checkpoints if checkpoint.outer_step <= outer_step]
        return max(before, default=0)
