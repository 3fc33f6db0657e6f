"""One attack over all seeds it was tried with: what is printed of it, and which bars it breaks. Pure.

Figures of several seeds are means over the trials that have one; a single trial is its own mean.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from statistics import fmean, stdev

from orion.simulator.adversaries.trial import Trial

EARNINGS_BEFORE_MAX = 1.0
EARNINGS_AFTER_MAX = 0.1


@dataclass(frozen=True, slots=True)
class Row:
    """The trials of one attack by one share of a stage, one a seed."""

    trials: tuple[Trial, ...]

    @property
    def name(self) -> str:
        return self.trials[0].name

    @property
    def share(self) -> float:
        """Of the replicas of the attacked stage."""
        return self.trials[0].share

    @property
    def effort(self) -> float:
        """Share of the passes that attackers claimed which they computed."""
        return fmean(trial.effort for trial in self.trials)

    @property
    def detected_after_outer_steps(self) -> int | None:
        """Until the last attacker of the slowest trial was found; None = in some trial not all were."""
        detected = [trial.detected_after_outer_steps for trial in self.trials]
        return None if None in detected else max(each for each in detected if each is not None)

    @property
    def earnings_before(self) -> float | None:
        """Of an attacker until it was found, 1 = those of an honest miner in its place; None = there was no pay day."""
        return _mean(trial.earnings_before for trial in self.trials)

    @property
    def earnings_before_error(self) -> float | None:
        """Standard error of that mean over seeds; None for fewer than two."""
        earned = [trial.earnings_before for trial in self.trials if trial.earnings_before is not None]
        return stdev(earned) / math.sqrt(len(earned)) if len(earned) > 1 else None

    @property
    def earnings_after(self) -> float | None:
        """The same from then on; None = not found, or no pay day followed."""
        return _mean(trial.earnings_after for trial in self.trials)

    @property
    def honest_spread(self) -> float | None:
        """Standard deviation of what honest miners beside the attackers earned before these were found."""
        return _mean(trial.honest_spread for trial in self.trials)

    @property
    def honest_punished(self) -> int:
        """Honest miners with a failed verdict, in all trials."""
        return sum(trial.honest_punished for trial in self.trials)

    @property
    def loss_effect(self) -> float:
        """Held-out loss above that of the same swarms without the attack."""
        return fmean(trial.loss_effect for trial in self.trials)

    def as_json(self) -> dict[str, object]:
        """The keys that others rely on."""
        return {
            "name": self.name,
            "share": round(self.share, 3),
            "num_seeds": len(self.trials),
            "computed": round(self.effort, 3),
            "detected_after_outer_steps": self.detected_after_outer_steps,
            "earnings_before": _rounded(self.earnings_before),
            "earnings_before_error": _rounded(self.earnings_before_error),
            "earnings_after": _rounded(self.earnings_after),
            "honest_spread": _rounded(self.honest_spread),
            "honest_punished": self.honest_punished,
            "loss_effect": round(self.loss_effect, 4),
        }

    def faults(self) -> tuple[str, ...]:
        """Which bars do not hold."""
        where = f"{self.name} by {self.share:.0%} of a stage"
        faults = []
        if any(trial.num_attacks == 0 for trial in self.trials):
            faults.append(f"{where} never happened")
        if (self.earnings_before or 0.0) > EARNINGS_BEFORE_MAX:
            spread = "" if self.honest_spread is None else f" (honest miners beside it: ± {self.honest_spread:.0%})"
            faults.append(f"{where} earned {self.earnings_before:.0%} of an honest miner before it was found{spread}")
        if (self.earnings_after or 0.0) > EARNINGS_AFTER_MAX:
            faults.append(f"{where} earned {self.earnings_after:.0%} of an honest miner after it was found")
        if self.honest_punished:
            faults.append(f"{where} had {self.honest_punished} honest miners punished")
        return tuple(faults)


def rows_of(trials: Sequence[Trial]) -> tuple[Row, ...]:
    """One row for each attack and share, in the order of their first trials."""
    by_attack: dict[tuple[str, float], list[Trial]] = {}
    for trial in trials:
        by_attack.setdefault((trial.name, trial.share), []).append(trial)
    return tuple(Row(tuple(each)) for each in by_attack.values())


def _mean(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return fmean(known) if known else None


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 4)
