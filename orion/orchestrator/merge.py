"""How the copies of one partition's mean become one: two equal ones settle it, differing ones call a third reducer.

Pure decisions over one partition. Knows nothing of stores or members beyond what it is told. Two reducers that name the
same digest need one object in the store, so of the first two only one writes. Invariants: a partition settles once, at
its phase's deadline at the latest; a mean that is named by a minority never stands; a mean that stands is durable.
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
    def content(self) -> tuple[str, tuple[tuple[Hotkey, int], ...]]:
        """What two copies must have in common. Reasons hold norms, whose last digits depend on the device."""
        return self.object.digest, tuple(sorted(exclusion.voice for exclusion in self.excluded))


@dataclass(slots=True)
class PartitionMerge:
    """One partition on its way to a mean."""

    partition_index: int
    reducers: list[Hotkey]
    """In the order in which they were asked."""
    asked_s: dict[Hotkey, float]
    writers: dict[Hotkey, float]
    """Those of them that write their mean, and when they were asked to."""
    copies: dict[Hotkey, Copy] = field(default_factory=dict)
    """As reported."""
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
    allowance_of: Callable[[Hotkey], float]
    """Seconds; a reducer that takes longer is late, and another one is asked beside it."""
    candidates: Collection[Hotkey]
    """Present members that may reduce."""
    is_durable: Callable[[ObjectRef], bool]


@dataclass(frozen=True, slots=True)
class Ask:
    """Another reducer is needed, one of the candidates that were not asked yet."""

    reason: str


@dataclass(frozen=True, slots=True)
class Write:
    """A reducer that has said what its mean is shall write it, too."""

    hotkey: Hotkey


@dataclass(frozen=True, slots=True)
class Settle:
    """The partition is decided."""

    outcome: MergedPartition
    dissenters: tuple[Hotkey, ...]
    """Whose bytes differ from the ones that stand."""
    reason: str
    """Why there were not two equal copies; empty when there were, or when there was only one to ask."""


def decide(partition: PartitionMerge, situation: Situation) -> Ask | Write | Settle | None:
    """What follows for an unsettled partition; None: wait. Asking is decided one reducer at a time."""
    copies = {hotkey: partition.copies[hotkey] for hotkey in partition.reducers if hotkey in partition.copies}
    groups = _groups(copies)
    first = groups[0] if groups and (len(groups) == 1 or len(groups[0]) > len(groups[1])) else []
    """What more name than anything else."""
    is_agreed = len(first) >= COPIES_TO_SETTLE
    if is_agreed and _stored(first, copies, situation):
        return _settle(partition, copies, first, situation, "")
    if situation.now_s >= situation.deadline_s:
        return _conclude(partition, copies, groups, situation, "at the deadline")
    if is_agreed:
        writing = _to_write(partition, first, situation)
        if writing is not None:
            return writing.decision
    coming = [hotkey for hotkey in partition.reducers if hotkey not in copies and hotkey in situation.candidates]
    late = [
        hotkey for hotkey in coming if situation.now_s >= partition.asked_s[hotkey] + situation.allowance_of(hotkey)
    ]
    may_ask = any(hotkey not in partition.reducers for hotkey in situation.candidates)
    num_wanted = COPIES_TO_SETTLE if not copies else 1
    if len(coming) - len(late) < num_wanted and may_ask:
        return Ask(_why_asked(groups, late))
    if coming:
        return None
    if first and not _stored(first, copies, situation):
        writing = _to_write(partition, first, situation)
        if writing is not None:
            return writing.decision
        if any(hotkey in situation.candidates for hotkey in first):
            return None  # late, and still writing perhaps
    return _conclude(partition, copies, groups, situation, "nobody else is there to ask")


@dataclass(frozen=True, slots=True)
class _Writing:
    """Somebody writes a group's mean, or shall: what to decide then."""

    decision: Write | None


def _to_write(partition: PartitionMerge, group: list[Hotkey], situation: Situation) -> _Writing | None:
    """How a group's mean gets into the store; None when nobody of it can be expected to write it."""
    present = [hotkey for hotkey in group if hotkey in situation.candidates]
    writers = partition.writers
    if any(
        hotkey in writers and situation.now_s < writers[hotkey] + situation.allowance_of(hotkey) for hotkey in present
    ):
        return _Writing(None)
    fresh = [hotkey for hotkey in present if hotkey not in writers]
    return _Writing(Write(fresh[0])) if fresh else None


def _stored(group: list[Hotkey], copies: dict[Hotkey, Copy], situation: Situation) -> list[Hotkey]:
    """Those of a group whose copy is durable."""
    return [hotkey for hotkey in group if situation.is_durable(copies[hotkey].object)]


def _groups(copies: dict[Hotkey, Copy]) -> list[list[Hotkey]]:
    """Reducers with the same content, larger groups first, then in the order in which they were asked."""
    by_content: dict[tuple[str, tuple[tuple[Hotkey, int], ...]], list[Hotkey]] = {}
    for hotkey, copy in copies.items():
        by_content.setdefault(copy.content, []).append(hotkey)
    return sorted(by_content.values(), key=len, reverse=True)


def _why_asked(groups: list[list[Hotkey]], late: list[Hotkey]) -> str:
    if len(groups) > 1:
        return "reducers disagree"
    return f"{', '.join(late)} late" if late else "a reducer has gone"


def _conclude(
    partition: PartitionMerge,
    copies: dict[Hotkey, Copy],
    groups: list[list[Hotkey]],
    situation: Situation,
    when: str,
) -> Settle:
    """Decides with what there is: the largest group, or nothing when there is none, two are as large, or it is not in
    the store."""
    if not groups:
        return Settle(unchanged(partition.partition_index), (), f"no mean, {when}")
    if len(groups) > 1 and len(groups[0]) == len(groups[1]):
        return Settle(unchanged(partition.partition_index), tuple(copies), f"means differ and none prevails, {when}")
    if not _stored(groups[0], copies, situation):
        return Settle(unchanged(partition.partition_index), (), f"what the mean is was told, but not stored, {when}")
    is_short = len(groups[0]) < min(COPIES_TO_SETTLE, len(partition.reducers))
    return _settle(partition, copies, groups[0], situation, f"a single copy, {when}" if is_short else "")


def _settle(
    partition: PartitionMerge, copies: dict[Hotkey, Copy], group: list[Hotkey], situation: Situation, reason: str
) -> Settle:
    copy = copies[_stored(group, copies, situation)[0]]
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
        elif hotkey not in situation.candidates or situation.now_s >= partition.asked_s[
            hotkey
        ] + situation.allowance_of(hotkey):
            found[hotkey] = ReductionVote.MISSED
    return found


def unchanged(partition_index: int) -> MergedPartition:
    """The partition keeps its anchor."""
    return MergedPartition(partition_index=partition_index, object=None, reducers=())
