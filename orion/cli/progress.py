"""Where a run stands, worked out from successive `RunStatus` messages. Pure; the views only draw it."""

from collections import deque
from dataclasses import dataclass, field

from orion.common.config import RunSpec
from orion.common.protocol.records import RunStatus

RATE_WINDOW_S = 20.0
"""Throughput is shown over this long, so that a phase without training is visible but does not make the figure jump."""
LOSS_WINDOW = 32
"""Microbatches whose mean loss is shown."""


def run_microbatches(spec: RunSpec) -> int:
    """Microbatches of the whole run when every stage keeps all its replicas."""
    return (spec.outer_steps - spec.first_outer_step) * spec.inner_steps * spec.microbatches_per_step * spec.replicas


@dataclass(frozen=True, slots=True)
class Progress:
    """What a view shows in one line."""

    fraction: float
    tokens_per_s: float
    remaining_s: float | None
    loss: float | None
    in_flight: int


@dataclass(slots=True)
class ProgressTracker:
    """Turns statuses into progress. `microbatches_total` is what the whole run will apply if nobody dies."""

    microbatches_total: int
    first_outer_step: int = 0
    _history: deque[tuple[float, int]] = field(default_factory=deque)

    def update(self, status: RunStatus) -> Progress:
        """Takes the next status in time order."""
        self._history.append((status.now_s, status.tokens))
        while len(self._history) > 2 and status.now_s - self._history[0][0] > RATE_WINDOW_S:
            self._history.popleft()
        since_s, since_tokens = self._history[0]
        if status.started_s is not None and len(self._history) == 1:
            since_s, since_tokens = status.started_s, 0  # the first look: the mean over the run so far
        elapsed_s = status.now_s - since_s
        by_steps = (status.outer_step - self.first_outer_step) / (status.outer_steps - self.first_outer_step)
        by_work = status.microbatches_applied / self.microbatches_total
        fraction = 1.0 if status.finished else min(1.0, max(by_steps, by_work))
        losses = [point.loss for point in status.recent_losses[-LOSS_WINDOW:]]
        return Progress(
            fraction=fraction,
            tokens_per_s=(status.tokens - since_tokens) / elapsed_s if elapsed_s > 0 else 0.0,
            remaining_s=self._remaining_s(status, fraction),
            loss=sum(losses) / len(losses) if losses else None,
            in_flight=status.microbatches_started - status.microbatches_applied - status.microbatches_cancelled,
        )

    @staticmethod
    def _remaining_s(status: RunStatus, fraction: float) -> float | None:
        if status.started_s is None or fraction <= 0.02:
            return None
        return (status.now_s - status.started_s) * (1 - fraction) / fraction
