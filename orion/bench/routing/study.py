"""Every rule through every world, and whether the production router holds its bars."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from statistics import median

from orion.bench.routing.race import Race, RaceResult
from orion.bench.routing.rules import RULES
from orion.bench.routing.world import EPOCH_ACTIVATIONS, World, draw_world

OURS, BASELINE = "orion", "uniform"
GAIN_MIN = 0.25
"""Share of the baseline's median time that ours must save."""


@dataclass(frozen=True, slots=True)
class WorldTimes:
    """What each rule needed in one world."""

    world: World
    results: dict[str, RaceResult]

    @property
    def gain(self) -> float:
        """Share of the baseline's time that ours saved here."""
        return 1.0 - self.results[OURS].total_s / self.results[BASELINE].total_s


@dataclass(slots=True)
class RoutingStudy:
    """All worlds. Times are virtual seconds of all epochs of a world together, merging left out."""

    worlds: list[WorldTimes] = field(default_factory=list)

    def times_s(self, rule: str) -> list[float]:
        """One for each world."""
        return [times.results[rule].total_s for times in self.worlds]

    @property
    def gain(self) -> float:
        """1 − our median time ÷ the baseline's."""
        return 1.0 - median(self.times_s(OURS)) / median(self.times_s(BASELINE))

    def faults(self) -> list[str]:
        """The bars that do not hold."""
        faults = []
        for rule in RULES:
            if rule != OURS and median(self.times_s(OURS)) >= median(self.times_s(rule)):
                faults.append(f"on the median, {OURS} is no better than {rule}")
            if rule != OURS and max(self.times_s(OURS)) >= max(self.times_s(rule)):
                faults.append(f"in the worst case, {OURS} is no better than {rule}")
        if self.gain < GAIN_MIN:
            faults.append(f"{OURS} saves {self.gain:.1%} of {BASELINE}'s time, less than {GAIN_MIN:.0%}")
        return faults

    def summary(self) -> list[str]:
        """For people."""
        lines = [
            f"{rule}: median {median(self.times_s(rule)):.0f} s, worst {max(self.times_s(rule)):.0f} s, "
            f"activations lost {sum(times.results[rule].num_lost for times in self.worlds)}"
            for rule in RULES
        ]
        return [*lines, f"{OURS} saves {self.gain:.1%} of {BASELINE}'s median time", *self.faults()]

    def as_json(self) -> dict[str, object]:
        """For machines."""
        rules = {
            rule: {
                "median": median(self.times_s(rule)),
                "worst": max(self.times_s(rule)),
                "lost": sum(times.results[rule].num_lost for times in self.worlds),
                "unreached": sum(times.results[rule].num_unreached for times in self.worlds),
            }
            for rule in RULES
        }
        worlds = [
            {
                "seed": times.world.seed,
                "stages": times.world.num_stages,
                "seconds": {rule: result.total_s for rule, result in times.results.items()},
                "gain_over_uniform": times.gain,
            }
            for times in self.worlds
        ]
        return {
            "rules": rules,
            "gain_over_uniform": self.gain,
            "gain_over_uniform_by_world": {
                "median": median(times.gain for times in self.worlds),
                "worst": min(times.gain for times in self.worlds),
            },
            "faults": self.faults(),
            "worlds": worlds,
        }


def routing_study(
    seeds: Iterable[int],
    num_activations: int = EPOCH_ACTIVATIONS,
    on_world: Callable[[WorldTimes], None] | None = None,
) -> RoutingStudy:
    """Runs every rule through the world of each seed; `on_world` hears of each when it is done."""
    study = RoutingStudy()
    for seed in seeds:
        world = draw_world(seed, num_activations=num_activations)
        times = WorldTimes(world, {name: Race(world, make_rule).run() for name, make_rule in RULES.items()})
        study.worlds.append(times)
        if on_world is not None:
            on_world(times)
    return study


def format_world(times: WorldTimes) -> str:
    """One line."""
    seconds = ", ".join(f"{rule} {result.total_s:.0f} s" for rule, result in times.results.items())
    return f"seed {times.world.seed}, {times.world.num_stages} stages: {seconds}; gain {times.gain:.1%}"
