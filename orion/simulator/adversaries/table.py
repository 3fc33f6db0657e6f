"""The table of all attacks: each made by one miner, and by 30 % of a stage, in a small swarm; and many honest checks.

It owns which swarms are tried, the bars, and what is printed. Invariant: the table is a pure function of its seed.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from random import Random

from orion.common.config import RunSpec
from orion.simulator.adversaries.catalogue import ATTACKS, Attack, attack_named, num_attackers
from orion.simulator.adversaries.copier import copier_earnings
from orion.simulator.adversaries.trial import Trial, run_trial
from orion.simulator.faults import Shape, draw_schedule
from orion.simulator.scenarios import tiny_spec
from orion.simulator.simulation import run_scenario
from orion.simulator.swarm import Scenario

NUM_STAGES = 3


@dataclass(frozen=True, slots=True)
class Setting:
    """The swarms in which attacks are tried."""

    replicas_alone: int = 4
    """Where one miner attacks."""
    replicas_many: int = 7
    """Where 30 % of a stage attack: 2 of 7."""
    outer_steps: int = 6
    whole_share: float = 0.5
    """Of the checks, those that replay a whole outer step."""
    score_window: int = 7
    """Outer steps whose work counts: all, as in a real run, whose window is longer than it takes to find anybody. The
    ledger opens one more than a run has: with a window of six the last weights forgot who was verified in the first."""
    checked_share: float = 2 / 3
    """Of all miners, drawn by the validator in each outer step: many, because a trial's window holds few outer steps.
    What counts is how often a miner is checked within a window; a real one is ten times as long."""


EARNINGS_BEFORE_MAX = 1.0
EARNINGS_AFTER_MAX = 0.1

QUICK_ATTACKS = (
    "noise_small",
    "free_rider",
    "skipped_backward",
    "poisoned_pseudo_gradient",
    "colluding_reducers",
    "forged_receipts_pair",
    "commitment_withheld",
)
FAULTY_SEEDS, FAULTY_SEEDS_QUICK = 12, 2
COPIED_TRIAL = "noise_large"
COPY_LAG_EPOCHS = 1
"""The soonest: without commit and reveal."""
COPIER_STAKE_SHARES = (0.05, 0.3)
FAULTS = 3
"""Of each honest run with faults."""


@dataclass(frozen=True, slots=True)
class Table:
    """What came of all trials."""

    trials: tuple[Trial, ...]
    honest_checks: int
    """Verdicts on honest miners: beside attackers, in swarms without any, and in swarms where things go wrong."""
    honest_failed: int

    def as_json(self) -> dict[str, object]:
        """The keys that others rely on."""
        attacks = [
            {
                "name": trial.name,
                "share": round(trial.share, 3),
                "detected_after_outer_steps": trial.detected_after_outer_steps,
                "earnings_before": _rounded(trial.earnings_before),
                "earnings_after": _rounded(trial.earnings_after),
                "honest_punished": trial.honest_punished,
                "loss_effect": round(trial.loss_effect, 4),
            }
            for trial in self.trials
        ]
        return {"attacks": attacks, "honest_checks": self.honest_checks, "honest_failed": self.honest_failed}

    def faults(self) -> tuple[str, ...]:
        """Which bars do not hold."""
        faults = [f"{self.honest_failed} checks of honest miners failed"] if self.honest_failed else []
        for trial in self.trials:
            where = f"{trial.name} by {trial.share:.0%} of a stage"
            if trial.num_attacks == 0:
                faults.append(f"{where} never happened")
            if (trial.earnings_before or 0.0) > EARNINGS_BEFORE_MAX:
                faults.append(f"{where} earned {trial.earnings_before:.0%} of an honest miner before it was found")
            if (trial.earnings_after or 0.0) > EARNINGS_AFTER_MAX:
                faults.append(f"{where} earned {trial.earnings_after:.0%} of an honest miner after it was found")
            if trial.honest_punished:
                faults.append(f"{where} had {trial.honest_punished} honest miners punished")
        return tuple(faults)


def trial_spec(setting: Setting, replicas: int, inner_steps: int | None = None) -> RunSpec:
    """The run of a trial."""
    spec = tiny_spec(
        num_stages=NUM_STAGES,
        replicas=replicas,
        outer_steps=setting.outer_steps,
        inner_steps=2 if inner_steps is None else inner_steps,
        whole_share=setting.whole_share,
        checks_per_outer_step=round(setting.checked_share * NUM_STAGES * replicas),
    )
    rules = spec.validation.model_copy(update={"score_window_outer_steps": setting.score_window})
    return spec.model_copy(update={"validation": rules, "keep_outer_steps": setting.outer_steps + 2})


class Laboratory:
    """Runs trials; swarms without an attack are run once for each shape."""

    def __init__(self, seed: int, setting: Setting | None = None) -> None:
        self._seed = seed
        self._setting = Setting() if setting is None else setting
        self._honest: dict[tuple[int, int | None], Trial] = {}

    def honest(self, replicas: int, inner_steps: int | None = None) -> Trial:
        """The swarm of this shape without an attack."""
        key = (replicas, inner_steps)
        if key not in self._honest:
            spec = trial_spec(self._setting, replicas, inner_steps)
            self._honest[key] = run_trial(None, spec, 0, self._seed, None)
        return self._honest[key]

    @property
    def honest_trials(self) -> tuple[Trial, ...]:
        """All that were run."""
        return tuple(self._honest.values())

    def trial(self, attack: Attack, *, is_many: bool = False) -> Trial:
        """The attack made by one miner, or by 30 % of a stage."""
        replicas = self._setting.replicas_many if is_many else self._setting.replicas_alone
        without = self.honest(replicas, attack.inner_steps)
        attackers = num_attackers(replicas) if is_many else 1
        spec = trial_spec(self._setting, replicas, attack.inner_steps)
        return run_trial(attack, spec, attackers, self._seed, without)


def weight_copier(laboratory: Laboratory, stake_share: float) -> Trial:
    """A validator that copies, beside two that check; in the swarm where weights move because somebody is found."""
    source = laboratory.trial(attack_named(COPIED_TRIAL))
    return replace(
        source,
        name="weight_copier",
        share=stake_share,
        num_attacks=len(source.pay) - COPY_LAG_EPOCHS,
        effort=0.0,
        detected_after_outer_steps=None,
        earnings_before=copier_earnings(source.pay, stake_share, COPY_LAG_EPOCHS),
        earnings_after=None,
        loss_effect=0.0,
    )


def measure(seed: int, *, quick: bool = False, on_trial: Callable[[Trial], None] | None = None) -> Table:
    """Runs all trials, or a few of them. Raises SimulationFailedError when an honest run breaks an invariant."""
    laboratory = Laboratory(seed)
    trials = []
    for attack, is_many in _planned(quick):
        trials.append(laboratory.trial(attack, is_many=is_many))
        if on_trial is not None:
            on_trial(trials[-1])
    for stake_share in () if quick else COPIER_STAKE_SHARES:
        trials.append(weight_copier(laboratory, stake_share))
        if on_trial is not None:
            on_trial(trials[-1])
    faulty = [_faulty_checks(seed + number) for number in range(FAULTY_SEEDS_QUICK if quick else FAULTY_SEEDS)]
    counted = (*trials, *laboratory.honest_trials)
    return Table(
        trials=tuple(trials),
        honest_checks=sum(trial.honest_checks for trial in counted) + sum(checks for checks, _ in faulty),
        honest_failed=sum(trial.honest_failed for trial in counted) + sum(failed for _, failed in faulty),
    )


def _planned(quick: bool) -> Iterator[tuple[Attack, bool]]:
    for is_many in (False,) if quick else (False, True):
        yield from ((attack, is_many) for attack in ATTACKS if not quick or attack.name in QUICK_ATTACKS)


def _faulty_checks(seed: int) -> tuple[int, int]:
    """Verdicts, and failed ones, in a swarm of honest miners in which things go wrong."""
    spec = tiny_spec(outer_steps=4, checks_per_outer_step=6)
    shape = Shape(spec.num_stages, spec.replicas, spec.outer_steps)
    faults = draw_schedule(Random(f"faults beside adversaries {seed}"), shape, FAULTS)
    status = run_scenario(Scenario("faulty", spec, virtual_s_max=600.0, faults=faults), seed).status
    return status.num_checks, status.num_verdicts_failed


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 4)
