"""What a validator can afford to replay in one round. Pure.

Invariant: a round is never cut before its first check, so that a small budget slows checking down and does not end it.
"""

import math
from dataclasses import dataclass

from orion.validator.config import Budget


@dataclass(slots=True)
class Spending:
    """Compute spent in the round under way, and what an operation has cost so far."""

    budget: Budget
    spent_s: float = 0.0
    operation_s: float | None = None
    """Of the replay before, None before the first. Loading an anchor is in it: a short replay says too much rather
    than too little."""

    def begin_round(self) -> None:
        """Nothing is spent yet."""
        self.spent_s = 0.0

    @property
    def is_exhausted(self) -> bool:
        """Whether the round's seconds are spent."""
        return self.spent_s >= self.budget.compute_s

    def spend(self, compute_s: float, num_operations: int = 0) -> None:
        """A replay of so many operations (0: something else) took so long."""
        self.spent_s += compute_s
        if num_operations > 0:
            self.operation_s = compute_s / num_operations

    def operations_max(self, body_bytes: int) -> int:
        """How many operations of a log the next replay may have, at least one, when each side of an operation has a
        body of `body_bytes`."""
        by_memory = math.inf if body_bytes == 0 else self.budget.evidence_bytes // (2 * body_bytes)
        left_s = max(0.0, self.budget.compute_s - self.spent_s)
        by_time = math.inf if not self.operation_s else left_s / self.operation_s
        return max(1, int(min(by_memory, by_time, _OPERATIONS_MAX)))


_OPERATIONS_MAX = 1_000_000
"""Bound of a log."""
