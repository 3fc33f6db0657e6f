"""Where a run stands, worked out from successive `RunStatus` messages. Pure; the views only draw it."""

from collections import deque
from dataclasses import dataclass, field

from orion.common.config import RunSpec
from orion.common.ids import MemberState
from orion.common.ledger.work import microbatch_flops
from orion.common.protocol.records import RunStatus

RATE_WINDOW_S = 20.0
"""Throughput is shown over this long, so that a phase without training is visible but does not make the figure jump."""
LOSS_WINDOW = 32
"""Microbatches whose mean loss is shown."""


def run_flops_per_token(spec: RunSpec) -> float:
    """Operations of a token's forward and backward through all stages."""
    return sum(microbatch_flops(spec)) / spec.tokens_per_microbatch


def _busy(status: RunStatus) -> float | None:
    shares = [
        miner.heartbeat.busy_share
        for miner in status.miners
        if miner.state is MemberState.ACTIVE and miner.heartbeat is not None
    ]
    return sum(shares) / len(shares) if shares else None


def _staleness(status: RunStatus) -> float | None:
    counts = [(steps, num) for stage in status.staleness for steps, num in enumerate(stage.counts)]
    total = sum(num for _, num in counts)
    return sum(steps * num for steps, num in counts) / total if total else None


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
    flops_per_s: float
    """Of forwards and backwards that were applied."""
    busy: float | None
    """Mean share of the time in which active miners' devices computed; None while none has said."""
    staleness: float | None
    """Mean inner steps between a microbatch's forward and its backward."""


@dataclass(slots=True)
class ProgressTracker:
    """Turns statuses into progress. `microbatches_total` is what the whole run will apply if nobody dies."""

    microbatches_total: int
    first_outer_step: int = 0
    flops_per_token: float = 0.0
    """Of all stages, forward and backward."""
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
        tokens_per_s = (status.tokens - since_tokens) / elapsed_s if elapsed_s > 0 else 0.0
        return Progress(
            fraction=fraction,
            tokens_per_s=tokens_per_s,
            flops_per_s=tokens_per_s * self.flops_per_token,
            busy=_busy(status),
            staleness=_staleness(status),
            remaining_s=self._remaining_s(status, fraction),
            loss=sum(losses) / len(losses) if losses else None,
            in_flight=status.microbatches_started - status.microbatches_applied - status.microbatches_cancelled,
        )

    @staticmethod
    def _remaining_s(status: RunStatus, fraction: float) -> float | None:
        if status.started_s is None or fraction <= 0.02:
            return None
        return (status.now_s - status.started_s) * (1 - fraction) / fraction
