"""Bounded histories of a run: samples that cover all of it at a falling resolution, and the loss in bins. Pure.

Owns only how much is kept: a ring never holds more than its capacity, whatever a run's length. Nothing here reads the
orchestrator's state.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

SAMPLE_S = 1.0
"""Between two samples, at first."""
SAMPLES_MAX = 360
"""When there are as many, every second one goes and the time between two doubles."""
BINS_MAX = 480
"""Points of the loss curve at most; then every two become one."""


@dataclass(frozen=True, slots=True)
class Sample:
    """The run at one moment. Rates are differences of two samples' counts, so they stay right when some are dropped."""

    time_s: float
    tokens: int
    """Of applied microbatches, since the run began."""
    applied: int
    """Microbatches."""
    busy: float | None
    """Mean share of the time in which devices computed; None while no active miner has said."""
    num_active: int


@dataclass(slots=True)
class SampleRing:
    """Samples from the beginning on, evenly spaced; the newest may be younger."""

    samples_max: int = SAMPLES_MAX
    interval_s: float = SAMPLE_S
    samples: list[Sample] = field(default_factory=list)

    def is_due(self, now_s: float) -> bool:
        """Whether the next sample is to be taken."""
        return not self.samples or now_s >= self.samples[-1].time_s + self.interval_s

    def add(self, sample: Sample) -> None:
        """Takes a sample that is due."""
        self.samples.append(sample)
        if len(self.samples) > self.samples_max:
            del self.samples[1::2]
            self.interval_s *= 2


@dataclass(slots=True)
class LossBin:
    """Consecutive applied microbatches."""

    num: int = 0
    total: float = 0.0
    total_squares: float = 0.0
    step: float = 0.0
    """Inner steps done, of the last of them: outer step × inner steps + how far it had got."""
    time_s: float = 0.0
    """Of the last of them."""

    def add(self, loss: float, step: float, time_s: float) -> None:
        self.num += 1
        self.total += loss
        self.total_squares += loss * loss
        self.step, self.time_s = max(self.step, step), time_s

    def absorb(self, later: "LossBin") -> None:
        """Becomes one with the bin after it."""
        self.num += later.num
        self.total += later.total
        self.total_squares += later.total_squares
        self.step, self.time_s = max(self.step, later.step), later.time_s

    @property
    def mean(self) -> float:
        return self.total / self.num

    @property
    def deviation(self) -> float:
        """Standard deviation of the losses in it."""
        return math.sqrt(max(0.0, self.total_squares / self.num - self.mean**2))


@dataclass(slots=True)
class LossCurve:
    """The mean loss over the whole run in at most `bins_max` bins of the same number of microbatches."""

    inner_steps: int
    usual_share: int
    """Microbatches of an outer step, as far as the run's specification says; after the first one, what that had."""
    bins_max: int = BINS_MAX
    bin_size: int = 1
    bins: list[LossBin] = field(default_factory=list)
    num_points: int = 0
    """Points taken; the next one has this number."""
    _outer_step: int = -1
    _num_in_step: int = 0

    def add(self, outer_steps: Sequence[int], losses: Sequence[float], times_s: Sequence[float]) -> None:
        """Takes further points in order of arrival."""
        for outer_step, loss, time_s in zip(outer_steps, losses, times_s, strict=True):
            if outer_step > self._outer_step:
                if self._num_in_step:
                    self.usual_share = self._num_in_step
                self._outer_step, self._num_in_step = outer_step, 0
            self._num_in_step += 1
            within = min(1.0, self._num_in_step / max(1, self.usual_share))
            if not self.bins or self.bins[-1].num >= self.bin_size:
                self._open()
            self.bins[-1].add(loss, self.inner_steps * (self._outer_step + within), time_s)
            self.num_points += 1

    def _open(self) -> None:
        if len(self.bins) >= self.bins_max:
            for former, later in zip(self.bins[::2], self.bins[1::2], strict=False):
                former.absorb(later)
            self.bins = self.bins[::2]
            self.bin_size *= 2
            if self.bins[-1].num < self.bin_size:
                return  # an odd one was left over: it is filled up first
        self.bins.append(LossBin())
