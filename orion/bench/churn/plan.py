"""What the churn benchmark does and how its figures are read. Pure.

Every device is paced: a forward and a backward take a fixed time, whatever the machine. Nine devices that shared two
processors would lose nothing when one of them goes, so there would be no surviving capacity to compare with.
"""

from bisect import bisect_left
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
    """How long a paced device takes for a microbatch. Nine of them with these times keep about one processor busy."""

    forward_s: float = 0.1
    backward_s: float = 0.2


@dataclass(frozen=True, slots=True)
class Sample:
    """The swarm at one moment."""

    at_s: float
    trains: bool
    """All stages do."""
    outer_step: int
    working: tuple[int, ...]
    """Active miners of each stage that are not under a blow."""


@dataclass(frozen=True, slots=True)
class Stretch:
    """Part of the run, from the opening of one outer step to that of another."""

    is_calm: bool
    began_s: float
    ended_s: float


@dataclass(frozen=True, slots=True)
class Course:
    """What was seen of a run: calm stretches and ones under blows take turns, and the last one is calm."""

    stretches: tuple[Stretch, ...]
    applied_at_s: tuple[float, ...]
    """When each microbatch had been applied on every stage, by the clock of the miner that did it last; sorted."""
    samples: tuple[Sample, ...]
    kills_at_s: tuple[float, ...] = ()

    def rate_per_s(self, stretch: Stretch) -> float:
        """Microbatches applied in each second of a stretch."""
        num_before = bisect_left(self.applied_at_s, stretch.began_s)
        num_until = bisect_left(self.applied_at_s, stretch.ended_s)
        return (num_until - num_before) / (stretch.ended_s - stretch.began_s)

    def rates_per_s(self, *, calm: bool) -> float:
        """The same of all calm stretches, or of all others, taken together."""
        stretches = [stretch for stretch in self.stretches if stretch.is_calm is calm]
        total_s = sum(stretch.ended_s - stretch.began_s for stretch in stretches)
        return sum(self.rate_per_s(each) * (each.ended_s - each.began_s) for each in stretches) / total_s


@dataclass(frozen=True, slots=True)
class Stall:
    """What one kill cost."""

    kill_s: float
    """After the first stretch began."""
    stall_s: float
    """Longest time without any microbatch applied that ends after the kill and begins within `STALL_WINDOW_S` after it;
    what the merge of an outer step takes there is in it."""
    in_training_s: float
    """Of it, without the time in which stages merged: what the data path lost."""


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
    """Tokens a second under blows, against those of the calm stretches around times the surviving share of capacity."""
    surviving_share: float
    longest_stall_s: float
    """Of `stalls`."""
    stalls: tuple[Stall, ...]
    """What each kill cost."""
    longest_undisturbed_s: float
    """Longest time without any microbatch applied in the calm stretches: what the end of an outer step costs anyway."""
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


def churn_spec(num_stages: int, replicas: int, outer_step_s: float, pace: Pace, sync: str = "blocking") -> RunSpec:
    """A run of the smallest model whose outer steps take about so long. `sync` as in the run's specification."""
    in_step = outer_step_s * replicas / (pace.forward_s + pace.backward_s)
    microbatches_per_step = 4
    tree = {
        "run_id": "churn",
        "seed": 1,
        "num_stages": num_stages,
        "replicas": replicas,
        "outer_steps": 100_000,
        "sync": sync,
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


def surviving_share(course: Course, stretch: Stretch, replicas: int) -> float:
    """Mean over a stretch, as far as all stages train, of the weakest stage's share of working miners; at most 1."""
    shares = [
        min(1.0, min(sample.working) / replicas)
        for sample in course.samples
        if sample.trains and stretch.began_s <= sample.at_s < stretch.ended_s
    ]
    return sum(shares) / len(shares) if shares else 0.0


def mean_surviving_share(course: Course, replicas: int) -> float:
    """The same over all stretches under blows."""
    stretches = [stretch for stretch in course.stretches if not stretch.is_calm]
    total_s = sum(stretch.ended_s - stretch.began_s for stretch in stretches)
    return sum(surviving_share(course, each, replicas) * (each.ended_s - each.began_s) for each in stretches) / total_s


def throughput_ratio(course: Course, replicas: int) -> float:
    """Microbatches applied under blows ÷ those that the surviving capacity allows.

    Each stretch is held against the calm ones before and after it, so that a machine that slows down meanwhile, or has
    other work, changes little.
    """
    num_applied, num_possible = 0.0, 0.0
    for before, stretch, after in zip(course.stretches, course.stretches[1:], course.stretches[2:], strict=False):
        if stretch.is_calm:
            continue
        seconds = stretch.ended_s - stretch.began_s
        calm_rate = (course.rate_per_s(before) + course.rate_per_s(after)) / 2
        num_applied += course.rate_per_s(stretch) * seconds
        num_possible += calm_rate * surviving_share(course, stretch, replicas) * seconds
    return num_applied / num_possible if num_possible else 0.0


def longest_calm_gap_s(course: Course) -> float:
    """Longest time between two applied microbatches that lies in a calm stretch."""
    return max(
        (
            later - earlier
            for earlier, later in pairwise(course.applied_at_s)
            for stretch in course.stretches
            if stretch.is_calm and stretch.began_s <= earlier and later <= stretch.ended_s
        ),
        default=0.0,
    )


def training_s(course: Course, from_s: float, to_s: float) -> float:
    """How much of a time all stages trained, as far as the samples tell."""
    total_s = 0.0
    for sample, following in pairwise(course.samples):
        if sample.trains:
            total_s += max(0.0, min(to_s, following.at_s) - max(from_s, sample.at_s))
    return total_s


def stall_after(course: Course, kill_s: float) -> Stall:
    """What a kill at that time cost."""
    began_s = course.stretches[0].began_s
    gaps = [
        (max(earlier, kill_s), later)
        for earlier, later in pairwise([*course.applied_at_s, course.stretches[-1].ended_s])
        if later > kill_s and earlier < kill_s + STALL_WINDOW_S
    ]
    from_s, to_s = max(gaps, key=lambda gap: gap[1] - gap[0], default=(kill_s, kill_s))
    return Stall(kill_s - began_s, to_s - from_s, training_s(course, from_s, to_s))
