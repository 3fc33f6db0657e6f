"""How many inner steps pass between a microbatch's forward and its backward, counted for each stage.

Owns the counts, as miners tell them in heartbeats; each process of a miner counts from zero. For people and alerts
only: nothing is decided by it, and a lie spoils a figure. Invariant: counts only grow, within what a message may carry.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

COUNT_MAX = 2**53


@dataclass(slots=True)
class StalenessBook:
    """By stage, and then by the number of inner steps: none, one, …"""

    num_stages: int
    counts: list[list[int]] = field(init=False)

    def __post_init__(self) -> None:
        self.counts = [[] for _ in range(self.num_stages)]

    def add(self, stage_index: int, before: Sequence[int], now: Sequence[int]) -> None:
        """A miner of the stage has counted `now`, and `before` when it was last heard of."""
        has_started_anew = len(now) < len(before) or any(new < old for old, new in zip(before, now, strict=False))
        known = () if has_started_anew else before
        counts = self.counts[stage_index]
        counts.extend([0] * (len(now) - len(counts)))
        for steps, num in enumerate(now):
            num_new = num - (known[steps] if steps < len(known) else 0)
            counts[steps] = min(COUNT_MAX, counts[steps] + num_new)
