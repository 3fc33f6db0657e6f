"""Which partitions this miner reduces in its stage's merge, and what it fetches ahead of time. Pure.

Owns the reductions of one outer step. As soon as all contributions are announced, the feed names the reducers: then
slices are fetched while others still arrive in the store, so that little is left to fetch when it is decided who is
part of the mean. Means of other reducers are fetched as soon as they stand, so that the manifest finds most of them
here. Level-triggered; what was not fetched ahead is fetched when it is needed, so nothing here can hold up a merge.

Invariants: a partition is reduced once, and once more at most for each time that it is to be written after all; what is
under way and what is fetched ahead is bounded.
"""

from dataclasses import dataclass, field

from orion.common.ids import Hotkey, Phase
from orion.common.protocol.messages import Contribution, MergePlan, PartitionPlan, Reduced
from orion.miner.effects import FetchMean, FetchSlices, ReducePartition
from orion.miner.events import MeanFetched, ReduceEnded, ReduceFailed, SlicesFetched
from orion.miner.moment import Emit
from orion.miner.notices import Backoff, Notices
from orion.miner.view import View

REDUCTIONS_MAX = 2
"""Partitions reduced at a time: one downloads while the other computes. And as many whose mean is written, too: what
others can do with a digest must not wait for them."""
FETCHES_MAX = 4
"""Partitions whose slices are fetched ahead at a time, and as many means."""
FETCH_PAUSE_S = 0.5
"""Before it is looked again for slices that were not there yet, and are not waited for."""
FETCHED_BYTES_MAX = 4 << 30
"""Slices held ahead of their reduction, beside what they make; those beyond are fetched when they are reduced."""


@dataclass(slots=True)
class _Ahead:
    """What is fetched ahead, slices or means, by partition."""

    under_way: set[int] = field(default_factory=set)
    done: set[int] = field(default_factory=set)
    again_s: dict[int, float] = field(default_factory=dict)
    """When it is tried again."""

    def may_begin(self, index: int, now_s: float) -> bool:
        if index in self.done or index in self.under_way or len(self.under_way) >= FETCHES_MAX:
            return False
        return now_s >= self.again_s.get(index, 0.0)

    def ended(self, index: int, is_complete: bool, now_s: float) -> None:
        self.under_way.discard(index)
        if is_complete:
            self.done.add(index)
        else:
            self.again_s[index] = now_s + FETCH_PAUSE_S


@dataclass(slots=True)
class _Merge:
    """Reductions of one outer step."""

    outer_step: int = -1
    under_way: dict[int, bool] = field(default_factory=dict)
    """Whether the mean is to be written, too."""
    told: set[int] = field(default_factory=set)
    """Reduced; what the mean is was told."""
    written: set[int] = field(default_factory=set)
    """Of these, those whose mean lies in the store, or that have none."""
    backoff: dict[int, Backoff] = field(default_factory=dict)
    slices: _Ahead = field(default_factory=_Ahead)
    slice_bytes: int = 0
    means: _Ahead = field(default_factory=_Ahead)

    @property
    def is_idle(self) -> bool:
        return not (self.under_way or self.slices.under_way or self.means.under_way)


class Reductions:
    """This miner's part in its stage's merges."""

    def __init__(self, hotkey: Hotkey, *, notices: Notices, emit: Emit) -> None:
        self._hotkey = hotkey
        self._notices = notices
        self._emit = emit
        self._merge = _Merge()

    def advance(self, view: View, now_s: float) -> None:
        """Starts what is missing."""
        plan = view.merge_plan
        if plan is None or view.is_merged(plan.outer_step):
            return
        if self._merge.outer_step != plan.outer_step:
            if not self._merge.is_idle:
                return  # what belongs to the last plan ends first, so that no more than the bounds are under way
            self._merge = _Merge(plan.outer_step)
        if not plan.is_final and view.is_in(Phase.UPLOAD, plan.outer_step):
            self._fetch_slices(plan, now_s)
        elif plan.is_final and view.is_in(Phase.MERGE, plan.outer_step):
            self._reduce(plan, now_s)
            self._fetch_means(plan, now_s)

    def ended(self, event: ReduceEnded | ReduceFailed | SlicesFetched | MeanFetched, now_s: float) -> None:
        """One of the effects has ended."""
        merge, index = self._merge, event.partition_index
        if event.outer_step != merge.outer_step:
            return
        match event:
            case SlicesFetched():
                merge.slices.ended(index, event.is_complete, now_s)
            case MeanFetched():
                merge.means.ended(index, event.is_complete, now_s)
            case ReduceFailed():
                merge.under_way.pop(index, None)
                merge.backoff.setdefault(index, Backoff()).failed(now_s)
            case ReduceEnded():
                merge.under_way.pop(index, None)
                merge.told.add(index)
                if event.is_stored or event.object is None:
                    merge.written.add(index)
                if event.object is not None:
                    reduced = Reduced(
                        outer_step=event.outer_step,
                        partition_index=index,
                        object=event.object,
                        excluded=event.excluded,
                        is_stored=event.is_stored,
                    )
                    self._notices.add(reduced, now_s)

    def wake_times_s(self) -> list[float]:
        """When things that failed may be tried again; times that have passed mean nothing."""
        merge = self._merge
        again = [*merge.slices.again_s.values(), *merge.means.again_s.values()]
        return again + [backoff.until_s for backoff in merge.backoff.values()]

    def check_invariants(self) -> None:
        """Raises AssertionError when anything is as it must never be."""
        merge = self._merge
        for writes in (True, False):
            assert list(merge.under_way.values()).count(writes) <= REDUCTIONS_MAX, "too many reductions"
        assert not merge.under_way.keys() & merge.written, "a partition is reduced twice"
        assert max(len(merge.slices.under_way), len(merge.means.under_way)) <= FETCHES_MAX, "too much is fetched ahead"
        assert merge.slice_bytes <= FETCHED_BYTES_MAX, "more is held ahead than there is room for"

    # --- inside -------------------------------------------------------------------------------------------------------

    def _fetch_slices(self, plan: MergePlan, now_s: float) -> None:
        merge = self._merge
        for partition in plan.partitions:
            index = partition.partition_index
            if self._hotkey not in partition.reducers or not merge.slices.may_begin(index, now_s):
                continue
            size_bytes = 0 if index in merge.slices.again_s else _slice_bytes(plan.contributions, index)
            if merge.slice_bytes + size_bytes > FETCHED_BYTES_MAX:
                return
            merge.slice_bytes += size_bytes
            merge.slices.under_way.add(index)
            self._emit(FetchSlices(plan.stage_index, plan.outer_step, index, plan.contributions))

    def _reduce(self, plan: MergePlan, now_s: float) -> None:
        merge = self._merge
        for partition in plan.partitions:
            index = partition.partition_index
            writes = not partition.writers or self._hotkey in partition.writers
            has_room = list(merge.under_way.values()).count(writes) < REDUCTIONS_MAX
            if has_room and self._may_reduce(partition, now_s):
                merge.under_way[index] = writes
                self._emit(ReducePartition(plan.stage_index, plan.outer_step, index, plan.contributions, writes))

    def _may_reduce(self, partition: PartitionPlan, now_s: float) -> bool:
        merge, index = self._merge, partition.partition_index
        if self._hotkey not in partition.reducers or partition.settled is not None:
            return False
        if index in merge.under_way or index in merge.written or index in merge.slices.under_way:
            return False
        if index in merge.told and self._hotkey not in partition.writers:
            return False
        backoff = merge.backoff.get(index)
        return backoff is None or backoff.is_over(now_s)

    def _fetch_means(self, plan: MergePlan, now_s: float) -> None:
        merge = self._merge
        for partition in plan.partitions:
            index = partition.partition_index
            if partition.settled is not None and index not in merge.told and merge.means.may_begin(index, now_s):
                merge.means.under_way.add(index)
                self._emit(FetchMean(plan.stage_index, plan.outer_step, index, partition.settled))


def _slice_bytes(contributions: tuple[Contribution, ...], index: int) -> int:
    return sum(item.objects[index].size_bytes for item in contributions if index < len(item.objects))
