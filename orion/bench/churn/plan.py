"""What the churn benchmark does and how its figures are read. Pure.

Every device is paced: a forward and a backward take a fixed time, whatever the machine. Nine devices that shared two
processors would lose nothing when one of them goes, so there would be no surviving capacity to compare with.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from enum import StrEnum
from itertools import pairwise
from random import Random
from typing import Any

from orion.common.config import RunSpec

LOST_BAR, RATIO_BAR, STALL_BAR_S = 0, 0.9, 2.0
STALL_WINDOW_S = 10.0
"""After a kill, in which the longest time without a microbatch is its stall."""


class Blow(StrEnum):
    """What befalls a miner."""

    KILL = "kill"
    """SIGKILL."""
    STOP = "stop"
    """SIGSTOP; killed when the next blow falls."""
    CUT = "cut"
    """Nothing reaches it from other miners any more, until the next blow falls; it can still reach others."""


@dataclass(frozen=True, slots=True)
class Pace:
    """How long a paced device takes for a microbatch."""

    forward_s: float = 0.2
    backward_s: float = 0.4


@dataclass(frozen=True, slots=True)
class Sample:
    """The swarm at one moment."""

    at_s: float
    trains: bool
    """All stages do."""
    working: tuple[int, ...]
    """Active miners of each stage that are not under a blow."""


@dataclass(frozen=True, slots=True)
class Course:
    """What was seen of a run, from its first microbatch on."""

    began_s: float
    ended_s: float
    applied_at_s: tuple[float, ...]
    """When each microbatch was reported as applied."""
    samples: tuple[Sample, ...] = ()
    kills_at_s: tuple[float, ...] = ()

    @property
    def rate_per_s(self) -> float:
        """Microbatches applied in each second."""
        count = sum(self.began_s <= at_s <= self.ended_s for at_s in self.applied_at_s)
        return count / (self.ended_s - self.began_s)


@dataclass(frozen=True, slots=True)
class Churn:
    """The benchmark's figures."""

    started: int
    applied: int
    repaired: dict[str, int]
    cancelled: int
    lost: int
    """Microbatches whose trip was cancelled and whose data was not leased again."""
    throughput_ratio: float
    """Tokens a second, against the undisturbed run's times the surviving share of capacity."""
    surviving_share: float
    longest_stall_s: float
    """Without any microbatch applied, within `STALL_WINDOW_S` after a kill; what the merges of outer steps take there
    is in it."""
    longest_stall_in_training_s: float
    """The same without the time in which stages merged: what the data path lost, and not what the end of an outer step
    waited for."""
    longest_undisturbed_s: float
    """The same of the undisturbed run, at any time."""
    faults_fired: dict[str, int]
    tokens_per_s: dict[str, float]

    def faults(self) -> list[str]:
        """Bars that do not hold."""
        found = []
        if self.lost > LOST_BAR:
            found.append(f"{self.lost} microbatches were lost")
        if self.throughput_ratio < RATIO_BAR:
            found.append(f"{self.throughput_ratio:.2f} of the surviving throughput, below {RATIO_BAR}")
        if self.longest_stall_s > STALL_BAR_S:
            found.append(f"a stall of {self.longest_stall_s:.1f} s after a kill, above {STALL_BAR_S} s")
        if not all(self.faults_fired.values()):
            found.append(f"not every kind of fault fired: {self.faults_fired}")
        return found

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


def churn_spec(num_stages: int, replicas: int, outer_step_s: float, pace: Pace) -> RunSpec:
    """A run of the smallest model whose outer steps take about so long."""
    in_step = outer_step_s * replicas / (pace.forward_s + pace.backward_s)
    microbatches_per_step = 4
    tree = {
        "run_id": "churn",
        "seed": 1,
        "num_stages": num_stages,
        "replicas": replicas,
        "outer_steps": 100_000,
        "inner_steps": max(1, round(in_step / replicas / microbatches_per_step)),
        "microbatches_per_step": microbatches_per_step,
        "model": {"preset": "nano"},
        "data": {"source": "kjv", "tokenizer": "bpe:512", "sequence_length": 32, "sequences_per_microbatch": 4},
        "time_limits": {"member_s": 3.0, "transfer_grace_s": 10.0, "train_s": 600.0, "microbatch_s": 60.0},
        "flow": {"in_flight_max": 8},
        "validation": {"checks_per_outer_step": 0, "whole_share": 0.0},
    }
    return RunSpec.parse(tree, "churn benchmark")


def choose_victim(rng: Random, working: Mapping[int, Sequence[str]]) -> str | None:
    """Somebody of a stage in which others go on; None when there is nobody."""
    candidates = [name for _, names in sorted(working.items()) if len(names) >= 2 for name in sorted(names)]
    return rng.choice(candidates) if candidates else None


def surviving_share(course: Course, replicas: int) -> float:
    """Mean over the time in which all stages train of the weakest stage's share of working miners."""
    shares = [min(sample.working) / replicas for sample in course.samples if sample.trains]
    return sum(shares) / len(shares) if shares else 0.0


def longest_gap_s(course: Course) -> float:
    """Longest time between two applied microbatches."""
    times = sorted(at_s for at_s in course.applied_at_s if course.began_s <= at_s <= course.ended_s)
    times = [course.began_s, *times, course.ended_s]
    return max(later - earlier for earlier, later in pairwise(times))


def training_s(course: Course, from_s: float, to_s: float) -> float:
    """How much of a stretch of time all stages trained, as far as the samples tell."""
    total_s = 0.0
    for sample, following in pairwise(course.samples):
        if sample.trains:
            total_s += max(0.0, min(to_s, following.at_s) - max(from_s, sample.at_s))
    return total_s


def longest_stall_s(course: Course, *, in_training: bool = False) -> float:
    """Longest time between two applied microbatches that begins within `STALL_WINDOW_S` after a kill, or spans it.

    `in_training`: of each such time only what all stages spent training.
    """
    times = [*sorted(course.applied_at_s), course.ended_s]
    longest = 0.0
    for earlier, later in pairwise(times):
        for kill_s in course.kills_at_s:
            if later > kill_s and earlier < kill_s + STALL_WINDOW_S:
                from_s = max(earlier, kill_s)
                longest = max(longest, training_s(course, from_s, later) if in_training else later - from_s)
    return longest
