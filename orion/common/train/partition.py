"""Who reduces which part of a stage's flat vector, and whose contributions count. The mean itself is in `outer`.

Pure: everybody computes the same answer from the same arguments, so nobody has to be told it. Must not import torch:
the orchestrator plans with it and carries no tensors.

Invariants: partitions cover [0, N) exactly once; each has two different reducers where two exist, so that no single
miner decides a byte of the next anchor; reducers carry the same load to within one partition.

The draw of reducers uses blake3 of (seed, purpose, hotkey) rather than a random generator: it is the same in every
language and Python version, and nobody can predict or bend it before the seed of the outer step is known.
"""

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

from blake3 import blake3

from orion.common.ids import Hotkey

NameT = TypeVar("NameT", Hotkey, int)
"""What a contribution is called: by its contributor, or by its place among others."""

MEDIAN_RULE_CONTRIBUTORS_MIN = 3
"""With fewer contributors a median says nothing about who is out of line."""


@dataclass(frozen=True, slots=True)
class Partition:
    """The parameters in [start, end) of a stage's flat vector."""

    index: int
    start: int
    end: int

    @property
    def num_params(self) -> int:
        return self.end - self.start


@dataclass(frozen=True, slots=True)
class ReducerAssignment:
    """The miners that reduce one partition independently: two different ones, or the only one there is."""

    partition: Partition
    reducers: tuple[Hotkey, ...]


@dataclass(frozen=True, slots=True)
class Selection(Generic[NameT]):
    """Which contributions enter the mean. Every one is either accepted or rejected."""

    accepted: tuple[NameT, ...]
    """In order."""
    rejected: Mapping[NameT, str]
    """With the reason."""
    scales: Mapping[NameT, float]
    """What an accepted contribution is multiplied by, below 1; those that are not here count as they are."""


def partition_bounds(num_params: int, num_partitions: int) -> tuple[Partition, ...]:
    """Cuts [0, num_params) into ranges whose lengths differ by one at most, the longer ones first.

    Raises ValueError unless 1 ≤ num_partitions ≤ num_params: a partition is never empty.
    """
    if not 1 <= num_partitions <= num_params:
        raise ValueError(f"{num_params} parameters cannot be cut into {num_partitions} partitions")
    base, num_longer = divmod(num_params, num_partitions)
    starts = [index * base + min(index, num_longer) for index in range(num_partitions + 1)]
    return tuple(Partition(index, starts[index], starts[index + 1]) for index in range(num_partitions))


def assign_reducers(
    partitions: Sequence[Partition], reducers: Sequence[Hotkey], seed: int
) -> tuple[ReducerAssignment, ...]:
    """Draws two different reducers for each partition; with a single reducer, that one.

    Depends on the set of reducers and the seed, not on their order. Each reducer gets as many partitions as any
    other, to within one. Raises ValueError when there is no reducer or one is named twice.
    """
    if not reducers or len(set(reducers)) != len(reducers):
        raise ValueError(f"reducers must be distinct and at least one, not {list(reducers)}")
    if len(reducers) == 1:
        return tuple(ReducerAssignment(partition, (reducers[0],)) for partition in partitions)
    assignments: list[ReducerAssignment] = []
    # In each round every reducer is first for one partition and second for another, `stride` places further on. A
    # last, shorter round of r partitions has the stride r, so that its 2r places fall on as many reducers as can be.
    for round_start in range(0, len(partitions), len(reducers)):
        in_round = partitions[round_start : round_start + len(reducers)]
        order = _shuffled(reducers, seed, f"round {round_start}")
        stride = len(in_round)
        if stride == len(reducers):
            stride = 1 + _draw(seed, f"stride {round_start}") % (len(reducers) - 1)
        for place, partition in enumerate(in_round):
            second = order[(place + stride) % len(order)]
            assignments.append(ReducerAssignment(partition, (order[place], second)))
    return tuple(assignments)


def third_reducer(assignment: ReducerAssignment, reducers: Sequence[Hotkey], seed: int) -> Hotkey | None:
    """Who decides when an assignment's two reducers disagree: a draw among the others; None when there is no other."""
    others = [hotkey for hotkey in reducers if hotkey not in assignment.reducers]
    if not others:
        return None
    return _shuffled(others, seed, f"dispute {assignment.partition.index}")[0]


def select_contributions(
    norms: Mapping[NameT, float], ratio_max: float, clip_ratio: float = math.inf
) -> Selection[NameT]:
    """Excludes what is not finite and, among three or more finite contributions, what exceeds ratio_max × the median;
    what exceeds clip_ratio × the median is scaled down to that.

    `norms` are Euclidean norms by contribution (`orion.common.train.outer.contribution_norm`), the same to the last bit
    for all who decide.
    """
    finite = {name: norm for name, norm in norms.items() if math.isfinite(norm)}
    rejected = {name: "not finite" for name in norms if name not in finite}
    scales: dict[NameT, float] = {}
    if len(finite) >= MEDIAN_RULE_CONTRIBUTORS_MIN:
        median = statistics.median(finite.values())
        for name, norm in finite.items():
            if norm > ratio_max * median:
                rejected[name] = f"norm {norm:.6g} exceeds {ratio_max:g} times the median"
            elif norm > clip_ratio * median:
                scales[name] = clip_ratio * median / norm
    accepted = tuple(sorted(name for name in norms if name not in rejected))
    return Selection(accepted, rejected, scales)


def _shuffled(hotkeys: Sequence[Hotkey], seed: int, purpose: str) -> list[Hotkey]:
    return sorted(hotkeys, key=lambda hotkey: (_draw(seed, f"{purpose} {hotkey}"), hotkey))


def _draw(seed: int, purpose: str) -> int:
    return int.from_bytes(blake3(f"{seed} {purpose}".encode()).digest(length=8), "little")
