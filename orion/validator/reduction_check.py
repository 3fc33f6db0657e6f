"""Means reduced again: which partitions of an outer step, and whose bytes were wrong. Pure.

Reducers are asked two at a time, and two equal answers settle a partition; so two that collude can put any bytes into
the next anchor. Reduction is exact and cheap (elementwise fp32 in a fixed order over public objects), so a validator
draws a few partitions after the manifests are out, with its own randomness, and reduces them itself: every copy in the
record, standing or not, must have the same bytes and leave out the same contributors. First come partitions that
nobody has vouched for twice: those with a single copy, and those whose copies differ.

Must not fetch or compute. Invariants: a partition is reduced once at most; a miner gets one verdict, and a failed one
rests on an object that it wrote itself; what the validator could not do gives none.
"""

import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from orion.common.config import RunSpec
from orion.common.ids import Hotkey, Subject
from orion.common.protocol.records import MergeRecord, PartitionRecord, Verdict
from orion.validator.events import Effect, Notice, Reduce, ReductionEnded, ReductionTask, ReductionUnavailable

TRIES = 3
"""Attempts at one partition whose objects could not be had."""

RETRY_S = 5.0
"""Before the next of them."""

_REASON_CHARS_MAX = 500
"""Bound of `Text`."""


@dataclass(frozen=True, slots=True)
class Draw:
    """One partition to reduce again."""

    record: MergeRecord
    partition: PartitionRecord

    @property
    def task(self) -> ReductionTask:
        return ReductionTask(
            self.record.stage_index, self.record.outer_step, self.partition.partition_index, self.record.contributions
        )


def draw_partitions(records: Iterable[MergeRecord], num_partitions: int, rng: random.Random) -> list[Draw]:
    """Draws up to so many partitions that somebody reduced, those that are not vouched for twice first."""
    draws = [Draw(record, partition) for record in records for partition in record.partitions if partition.copies]
    rng.shuffle(draws)
    draws.sort(key=lambda draw: is_vouched_for(draw.partition))
    return draws[:num_partitions]


def is_vouched_for(partition: PartitionRecord) -> bool:
    """Whether two reducers at least delivered a mean, and all the same."""
    contents = {copy.content for copy in partition.copies}
    return len(partition.copies) > 1 and len(contents) == 1


def wrong_copies(draw: Draw, reduced: ReductionEnded) -> dict[Hotkey, str | None]:
    """What is wrong with each copy of a partition, by reducer; None: nothing."""
    where = f"stage {draw.record.stage_index}, partition {draw.partition.partition_index}"
    found: dict[Hotkey, str | None] = {}
    for copy in draw.partition.copies:
        fault = None
        if copy.object.digest != reduced.digest:
            fault = f"{where}: the mean is not that of the contributions"
        elif copy.content != (reduced.digest, frozenset(reduced.excluded), frozenset(reduced.excluded_late)):
            fault = f"{where}: left out others than the rule does"
        found[copy.reducer] = fault
    return found


@dataclass(slots=True)
class _Finding:
    """What is known of one reducer so far."""

    num_partitions: int = 0
    faults: list[str] = field(default_factory=list)


class ReductionCheck:
    """The reductions of one outer step. Feed it what arrives, then ask `pump` what to do next."""

    def __init__(self, spec: RunSpec, outer_step: int, rng: random.Random) -> None:
        self._spec = spec
        self._outer_step = outer_step
        self._rng = rng
        self._records: dict[int, MergeRecord | None] = {}
        """By stage; None: it could not be had."""
        self._left: list[Draw] | None = None
        """Still to reduce, the one under way first; None before the draw."""
        self._in_flight = False
        self._num_tries = 0
        self._not_before_s = 0.0
        self._findings: dict[Hotkey, _Finding] = {}
        self.num_reduced = 0

    @property
    def is_over(self) -> bool:
        """Whether there is nothing more to find."""
        return self._left is not None and not self._left

    def record(self, stage_index: int) -> MergeRecord | None:
        """How a stage was merged, as far as it is known."""
        return self._records.get(stage_index)

    def knows(self, stage_index: int) -> bool:
        """Whether it was told how a stage was merged, or that nobody can tell."""
        return stage_index in self._records

    def on_merge(self, stage_index: int, record: MergeRecord | None) -> None:
        """How a stage was merged; None: that could not be had. The first word counts."""
        self._records.setdefault(stage_index, record)

    def pump(self, now_s: float) -> list[Effect]:
        """What is due now. To be called once nothing more urgent is left."""
        if self._left is None:
            num_drawn = self._spec.validation.reductions_per_outer_step
            if num_drawn > 0 and len(self._records) < self._spec.num_stages:
                return []
            known = [self._records[stage_index] for stage_index in sorted(self._records)]
            self._left = draw_partitions([record for record in known if record is not None], num_drawn, self._rng)
        if not self._left or self._in_flight or now_s < self._not_before_s:
            return []
        self._in_flight = True
        self._num_tries += 1
        return [Reduce(self._left[0].task)]

    def on_reduced(self, event: ReductionEnded) -> None:
        """A partition has been reduced again."""
        draw = self._current(event.stage_index, event.outer_step, event.partition_index)
        if draw is None:
            return
        self.num_reduced += 1
        for reducer, fault in wrong_copies(draw, event).items():
            finding = self._findings.setdefault(reducer, _Finding())
            finding.num_partitions += 1
            if fault is not None:
                finding.faults.append(fault)
        self._next()

    def on_unavailable(self, event: ReductionUnavailable, now_s: float) -> list[Notice]:
        """A partition could not be reduced here."""
        if self._current(event.stage_index, event.outer_step, event.partition_index) is None:
            return []
        if event.retry and self._num_tries < TRIES:
            self._in_flight = False
            self._not_before_s = now_s + RETRY_S
            return []
        self._next()
        fields = {
            "stage_index": event.stage_index,
            "outer_step": event.outer_step,
            "partition_index": event.partition_index,
            "detail": event.detail,
        }
        return [Notice("warning", "reduction_undecided", fields)]

    def give_up(self) -> int:
        """Reduces nothing more; how many partitions are left out by that (all that would have been drawn, at most)."""
        num_left = self._spec.validation.reductions_per_outer_step if self._left is None else len(self._left)
        self._left = []
        return num_left

    def verdicts(self) -> Sequence[Verdict]:
        """One on each reducer whose means were looked at, in the order of hotkeys."""
        return [
            Verdict(
                miner=reducer,
                outer_step=self._outer_step,
                passed=not finding.faults,
                subject=Subject.REDUCTION,
                num_operations=finding.num_partitions,
                reason="; ".join(finding.faults)[:_REASON_CHARS_MAX],
            )
            for reducer, finding in sorted(self._findings.items())
        ]

    def _current(self, stage_index: int, outer_step: int, partition_index: int) -> Draw | None:
        """The partition under way, if it is this one."""
        if not self._left or not self._in_flight:
            return None
        draw = self._left[0]
        named = (stage_index, outer_step, partition_index)
        return (
            draw if named == (draw.record.stage_index, draw.record.outer_step, draw.partition.partition_index) else None
        )

    def _next(self) -> None:
        assert self._left
        self._left.pop(0)
        self._in_flight = False
        self._num_tries = 0
        self._not_before_s = 0.0
