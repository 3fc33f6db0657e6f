"""The table of all attacks: each made by one miner, and by 30 % of a stage, in a small swarm; and many honest checks.

It owns which swarms are tried, the bars, and what is printed. Invariant: the table is a pure function of its seeds.
"""

from collections.abc import Callable, Collection, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import product
from multiprocessing import get_context
from random import Random
from typing import Any

import torch

from orion.common.config import FlowLimits, RunSpec
from orion.simulator.adversaries.catalogue import ATTACKS, Attack, attack_named, num_attackers
from orion.simulator.adversaries.copier import copier_earnings
from orion.simulator.adversaries.rows import Row, rows_of
from orion.simulator.adversaries.trial import Trial, run_trial
from orion.simulator.faults import Shape as FaultShape
from orion.simulator.faults import draw_schedule
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
    replay_s: float = 0.02
    """What a check's replay takes the validator: so little that it gets to every one of the trial's few and short outer
    steps. With half a second its checks of an outer step last for several of them, and it leaves those out."""


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

    @property
    def rows(self) -> tuple[Row, ...]:
        """One for each attack and share of a stage."""
        return rows_of(self.trials)

    def as_json(self) -> dict[str, object]:
        """The keys that others rely on."""
        attacks = [row.as_json() for row in self.rows]
        return {"attacks": attacks, "honest_checks": self.honest_checks, "honest_failed": self.honest_failed}

    def faults(self) -> tuple[str, ...]:
        """Which bars do not hold."""
        of_honest = (f"{self.honest_failed} checks of honest miners failed",) if self.honest_failed else ()
        return (*of_honest, *(fault for row in self.rows for fault in row.faults()))


@dataclass(frozen=True, slots=True)
class Shape:
    """What an attack's swarm and the honest one that it is compared with have in common."""

    replicas: int
    inner_steps: int | None
    in_flight_max: int | None


def trial_spec(setting: Setting, shape: Shape) -> RunSpec:
    """The run of a trial."""
    spec = tiny_spec(
        num_stages=NUM_STAGES,
        replicas=shape.replicas,
        outer_steps=setting.outer_steps,
        inner_steps=2 if shape.inner_steps is None else shape.inner_steps,
        whole_share=setting.whole_share,
        checks_per_outer_step=round(setting.checked_share * NUM_STAGES * shape.replicas),
    )
    rules = spec.validation.model_copy(update={"score_window_outer_steps": setting.score_window})
    flow = spec.flow if shape.in_flight_max is None else FlowLimits(in_flight_max=shape.in_flight_max)
    return spec.model_copy(update={"validation": rules, "flow": flow, "keep_outer_steps": setting.outer_steps + 2})


class Laboratory:
    """Runs trials; swarms without an attack are run once for each shape."""

    def __init__(self, seed: int, setting: Setting | None = None) -> None:
        self._seed = seed
        self._setting = Setting() if setting is None else setting
        self._honest: dict[Shape, Trial] = {}

    def honest(self, shape: Shape) -> Trial:
        """The swarm of this shape without an attack."""
        if shape not in self._honest:
            spec = trial_spec(self._setting, shape)
            self._honest[shape] = run_trial(None, spec, 0, self._seed, None, replay_s=self._setting.replay_s)
        return self._honest[shape]

    def shape(self, attack: Attack | None = None, *, is_many: bool = False) -> Shape:
        """Of the swarm in which an attack is tried; of the usual one."""
        replicas = self._setting.replicas_many if is_many else self._setting.replicas_alone
        if attack is None:
            return Shape(replicas, None, None)
        return Shape(replicas, attack.inner_steps, attack.in_flight_max)

    def trial(self, attack: Attack, *, is_many: bool = False, without: Trial | None = None) -> Trial:
        """The attack made by one miner, or by 30 % of a stage; `without` is the honest swarm's trial if known."""
        shape = self.shape(attack, is_many=is_many)
        attackers = num_attackers(shape.replicas) if is_many else 1
        spec = trial_spec(self._setting, shape)
        honest = self.honest(shape) if without is None else without
        return run_trial(attack, spec, attackers, self._seed, honest, replay_s=self._setting.replay_s)


def weight_copier(source: Trial, stake_share: float) -> Trial:
    """A validator that copies, beside two that check; in a swarm where weights move because somebody is found."""
    return replace(
        source,
        name="weight_copier",
        share=stake_share,
        num_attacks=len(source.pay) - COPY_LAG_EPOCHS,
        effort=0.0,
        detected_after_outer_steps=None,
        earnings_before=copier_earnings(source.pay, stake_share, COPY_LAG_EPOCHS),
        earnings_after=None,
        honest_spread=None,
        honest_checks=0,
        honest_failed=0,
        loss_effect=0.0,
    )


@dataclass(frozen=True, slots=True)
class _Task:
    """One trial of the table, such that another process can be asked for it."""

    setting: Setting
    seed: int
    attack_name: str
    is_many: bool

    @property
    def attack(self) -> Attack:
        return attack_named(self.attack_name)


def measure(
    seeds: Sequence[int],
    *,
    quick: bool = False,
    only: Collection[str] = (),
    num_processes: int = 1,
    setting: Setting | None = None,
    on_trial: Callable[[Trial], None] | None = None,
) -> Table:
    """Runs all trials, or a few of them, with each seed; `only` names attacks, without which all are tried and honest
    swarms with faults too. Raises SimulationFailedError when an honest run breaks an invariant."""
    setting = Setting() if setting is None else setting
    tasks = [
        _Task(setting, seed, attack.name, is_many)
        for is_many, attack, seed in product((False,) if quick else (False, True), ATTACKS, seeds)
        if (attack.name in only if only else not quick or attack.name in QUICK_ATTACKS)
    ]
    num_faulty = 0 if only else FAULTY_SEEDS_QUICK if quick else FAULTY_SEEDS
    with _mapping(num_processes) as each:
        shapes = [(task.seed, setting, _laboratory(task).shape(task.attack, is_many=task.is_many)) for task in tasks]
        honest = dict(zip(dict.fromkeys(shapes), each(_honest, dict.fromkeys(shapes)), strict=True))
        trials = []
        for trial in each(_tried, [(task, honest[shape]) for task, shape in zip(tasks, shapes, strict=True)]):
            trials.append(trial)
            if on_trial is not None:
                on_trial(trial)
        faulty = list(each(_faulty_checks, [seeds[0] + number for number in range(num_faulty)]))
    if not quick and not only:
        copied = [trial for task, trial in zip(tasks, trials, strict=True) if task.attack_name == COPIED_TRIAL]
        trials += [weight_copier(trial, share) for share in COPIER_STAKE_SHARES for trial in copied[: len(seeds)]]
        for copier in trials[len(tasks) :]:
            if on_trial is not None:
                on_trial(copier)
    counted = (*trials, *honest.values())
    return Table(
        trials=tuple(trials),
        honest_checks=sum(trial.honest_checks for trial in counted) + sum(checks for checks, _ in faulty),
        honest_failed=sum(trial.honest_failed for trial in counted) + sum(failed for _, failed in faulty),
    )


@contextmanager
def _mapping(num_processes: int) -> Iterator[Callable[..., Iterator[Any]]]:
    """`map`, in this process or in so many others; results come in order."""
    if num_processes == 1:
        yield map
        return
    # Spawned: a forked process would inherit whatever PyTorch's threads held just then.
    with ProcessPoolExecutor(num_processes, get_context("spawn"), torch.set_num_threads, (1,)) as pool:
        yield pool.map


def _laboratory(task: _Task) -> Laboratory:
    return Laboratory(task.seed, task.setting)


def _honest(place: tuple[int, Setting, Shape]) -> Trial:
    seed, setting, shape = place
    return Laboratory(seed, setting).honest(shape)


def _tried(task_and_honest: tuple[_Task, Trial]) -> Trial:
    task, without = task_and_honest
    return _laboratory(task).trial(task.attack, is_many=task.is_many, without=without)


def _faulty_checks(seed: int) -> tuple[int, int]:
    """Verdicts, and failed ones, in a swarm of honest miners in which things go wrong."""
    spec = tiny_spec(outer_steps=4, checks_per_outer_step=6)
    shape = FaultShape(spec.num_stages, spec.replicas, spec.outer_steps)
    faults = draw_schedule(Random(f"faults beside adversaries {seed}"), shape, FAULTS)
    status = run_scenario(Scenario("faulty", spec, virtual_s_max=600.0, faults=faults), seed).status
    return status.num_checks, status.num_verdicts_failed
