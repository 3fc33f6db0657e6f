"""How long a simulated device takes. What it computes is computed by the role's real worker.

It owns durations only. A model of more than one number (FLOPs, memory) can take its place without anybody noticing.
"""

import math
from dataclasses import dataclass, field
from random import Random

from orion.miner.events import Backward, EncodePseudoGradient, Forward, InnerStep, Job, TakeMerged


@dataclass(frozen=True, slots=True)
class DeviceProfile:
    """Seconds of each kind of job on a device of usual speed."""

    forward_s: float = 0.1
    backward_s: float = 0.2
    inner_step_s: float = 0.05
    encode_s: float = 0.1
    take_merged_s: float = 0.01
    spread: float = 0.2
    """Each job takes up to this share more or less, evenly drawn."""


@dataclass(slots=True, eq=False)
class Device:
    """One miner's device."""

    profile: DeviceProfile
    rng: Random
    is_last_stage: bool = False
    """Its forwards include the backward."""
    slowdowns: list[float] = field(default_factory=list)
    """Factors by which everything takes longer now."""
    num_slowed: int = 0
    """Jobs that took longer because of them."""
    busy_s: float = 0.0
    """Seconds of all jobs so far, those that were given a moment ago included."""

    def duration_s(self, job: Job) -> float:
        """Draws how long this job takes."""
        self.num_slowed += bool(self.slowdowns)
        seconds = self._usual_s(job) * math.prod(self.slowdowns)
        seconds *= 1.0 + self.profile.spread * self.rng.uniform(-1.0, 1.0)
        self.busy_s += seconds
        return seconds

    def _usual_s(self, job: Job) -> float:
        profile = self.profile
        match job:
            case Forward():
                return profile.forward_s + profile.backward_s * self.is_last_stage
            case Backward():
                return profile.backward_s
            case InnerStep():
                return profile.inner_step_s
            case EncodePseudoGradient():
                return profile.encode_s
            case TakeMerged():
                return profile.take_merged_s
