"""How long a simulated device takes. What it computes is computed by the role's real worker.

It owns durations only. A model of more than one number (FLOPs, memory) can take its place without anybody noticing.
"""

from dataclasses import dataclass
from random import Random

from orion.miner.events import Backward, EncodePseudoGradient, Forward, InnerStep, Job


@dataclass(frozen=True, slots=True)
class DeviceProfile:
    """Seconds of each kind of job on a device of usual speed."""

    forward_s: float = 0.1
    backward_s: float = 0.2
    inner_step_s: float = 0.05
    encode_s: float = 0.1
    spread: float = 0.2
    """Each job takes up to this share more or less, evenly drawn."""


@dataclass(slots=True, eq=False)
class Device:
    """One miner's device."""

    profile: DeviceProfile
    rng: Random
    is_last_stage: bool = False
    """Its forwards include the backward."""
    slowdown: float = 1.0
    num_slowed: int = 0
    """Jobs that took longer because of `slowdown`."""

    def duration_s(self, job: Job) -> float:
        """Draws how long this job takes."""
        self.num_slowed += self.slowdown != 1.0
        seconds = self._usual_s(job) * self.slowdown
        return seconds * (1.0 + self.profile.spread * self.rng.uniform(-1.0, 1.0))

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
