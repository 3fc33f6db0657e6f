"""How the copies of one partition's mean become one: two equal ones settle it, differing ones call a third reducer.

Pure decisions over one partition. Knows nothing of stores or members beyond what it is told. Invariants: a partition
settles once, at its phase's deadline at the latest; a mean that is named by a minority never stands; only copies that
are durable are counted.
"""

from collections.abc import Callable, Collection
from dataclasses import dataclass, field

from orion.common.ids import Hotkey
from orion.common.protocol.entries import ReductionVote
from orion.common.protocol.messages import (
    Exclusion,
    MergedPartition,
    ObjectRef,
)

COPIES_TO_SETTLE = 2
"""Equal copies that settle a partition: no single miner decides a byte of the next anchor."""


@dataclass(frozen=True, slots=True)
class Copy:
    """One reducer's mean."""

    object: ObjectRef
    excluded: tuple[Exclusion, ...]

    @property
    def content(self) -> tuple[str, tuple[str, ...]]:
        """What two copies must have in common. Reasons hold norms, whose last digits depend on the device."""
        return self.object.digest, tuple(sorted(exclusion.hotkey for exclusion in self.excluded))


@dataclass(slots=True)
class PartitionMerge:
    """One partition on its way to a mean."""

    partition_index: int
    reducers: list[Hotkey]
    """In the order in which they were asked."""
    asked_s: dict[Hotkey, float]
    copies: dict[Hotkey, Copy] = field(default_factory=dict)
    """As reported; they count once their objects are durable."""
    outcome: MergedPartition | None = None
    """Final once it is there."""
    votes: dict[Hotkey, ReductionVote] = field(default_factory=dict)
    """What each reducer's part in it was, once there is an outcome."""


@dataclass(frozen=True, slots=True)
class Situation:
    """What a decision on a partition depends on beside the partition."""

    now_s: float
    deadline_s: float
    """Of the phase."""
    allowance_s: float
    """A reducer that takes longer is late, and another one is asked beside it."""
    candidates: Collection[Hotkey]
    """Present members that may reduce."""
    is_durable: Callable[[ObjectRef], bool]


@dataclass(frozen=True, slots=True)
class Ask:
    """Another reducer is needed, one of the candidates that were not asked yet."""

    reason: str


@dataclass(frozen=True, slots=True)
class Settle:
    """The partition is decided."""

    outcome: MergedPartition
    dissenters: tuple[Hotkey, ...]
    """Whose bytes differ from the ones that stand."""
    reason: str
    """Why there were not two equal copies; empty when there were, or when there was only one to ask."""


def decide(partition: PartitionMerge, situation: Situation) -> Ask | Settle | None:
    """What follows for an unsettled partition; None: wait. Asking is decided one reducer at a time."""
    copies = {
        hotkey: copy
        for hotkey in partition.reducers
        if (copy := partition.copies.get(hotkey)) is not None and situation.is_durable(copy.object)
    }
    groups = _groups(copies)
    if groups and len(groups[0]) >= COPIES_TO_SETTLE and (len(groups) == 1 or len(groups[0]) > len(groups[1])):
        return _settle(partition, copies, groups[0], "")
    if situation.now_s >= situation.deadline_s:
        return _conclude(partition, copies, groups, "at the deadline")
    coming = [hotkey for hotkey in partition.reducers if hotkey not in copies and hotkey in situation.candidates]
    late = [hotkey for hotkey in coming if situation.now_s >= partition.asked_s[hotkey] + situation.allowance_s]
    may_ask = any(hotkey not in partition.reducers for hotkey in situation.candidates)
    num_wanted = COPIES_TO_SETTLE if not copies else 1
    if len(coming) - len(late) < num_wanted and may_ask:
        return Ask(_why_asked(groups, late))
    if not coming:
        return _conclude(partition, copies, groups, "nobody else is there to ask")
    return None


def _groups(copies: dict[Hotkey, Copy]) -> list[list[Hotkey]]:
    """Reducers with the same content, larger groups first, then in the order in which they were asked."""
    by_content: dict[tuple[str, tuple[str, ...]], list[Hotkey]] = {}
    for hotkey, copy in copies.items():
        by_content.setdefault(copy.content, []).append(hotkey)
    return sorted(by_content.values(), key=len, reverse=True)


def _why_asked(groups: list[list[Hotkey]], late: list[Hotkey]) -> str:
    if len(groups) > 1:
        return "reducers disagree"
    return f"{', '.join(late)} late" if late else "a reducer has gone"


def _conclude(partition: PartitionMerge, copies: dict[Hotkey, Copy], groups: list[list[Hotkey]], when: str) -> Settle:
    """Decides with what there is: the largest group, or nothing when there is none or two are as large."""
    if not groups:
        return Settle(unchanged(partition.partition_index), (), f"no mean, {when}")
    if len(groups) > 1 and len(groups[0]) == len(groups[1]):
        return Settle(unchanged(partition.partition_index), tuple(copies), f"means differ and none prevails, {when}")
    is_short = len(groups[0]) < min(COPIES_TO_SETTLE, len(partition.reducers))
    return _settle(partition, copies, groups[0], f"a single copy, {when}" if is_short else "")


def _settle(partition: PartitionMerge, copies: dict[Hotkey, Copy], group: list[Hotkey], reason: str) -> Settle:
    copy = copies[group[0]]
    outcome = MergedPartition(
        partition_index=partition.partition_index,
        object=copy.object,
        reducers=tuple(group),
        excluded=copy.excluded,
    )
    return Settle(outcome, tuple(hotkey for hotkey in copies if hotkey not in group), reason)


def votes(partition: PartitionMerge, settled: Settle, situation: Situation) -> dict[Hotkey, ReductionVote]:
    """What each reducer's part in a partition was when it settled; nothing of those who still had time."""
    found: dict[Hotkey, ReductionVote] = {}
    for hotkey in partition.reducers:
        if hotkey in settled.outcome.reducers:
            found[hotkey] = ReductionVote.AGREED
        elif hotkey in settled.dissenters:
            decided = settled.outcome.object is not None
            found[hotkey] = ReductionVote.DIFFERED if decided else ReductionVote.UNDECIDED
        elif hotkey not in situation.candidates or situation.now_s >= partition.asked_s[hotkey] + situation.allowance_s:
            found[hotkey] = ReductionVote.MISSED
    return found


def unchanged(partition_index: int) -> MergedPartition:
    """The partition keeps its anchor."""
    return MergedPartition(partition_index=partition_index, object=None, reducers=())
