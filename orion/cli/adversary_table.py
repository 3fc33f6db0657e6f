"""Prints the table of attacks for people, a line as soon as its trial is through."""

import sys
from collections.abc import Callable

import torch

from orion.simulator.adversaries.rows import Row
from orion.simulator.adversaries.table import Table
from orion.simulator.adversaries.trial import Trial

_HEADER = (
    f"{'attack':26} {'share':>6} {'times':>6} {'computed':>8} {'found after':>11} {'before':>7} {'after':>7} "
    f"{'spread':>6} {'punished':>8} {'loss':>7}"
)


def printer(*, is_quiet: bool) -> Callable[[Trial], None]:
    """What prints each trial; on standard error when standard output is for machines."""
    torch.set_num_threads(1)  # tensors of a few kilobytes: more threads only cost
    stream = sys.stderr if is_quiet else sys.stdout
    print(_HEADER, file=stream, flush=True)
    return lambda trial: print(_line(trial), file=stream, flush=True)


def print_end(table: Table, *, is_quiet: bool) -> None:
    """How honest miners fared, and what does not hold."""
    stream = sys.stderr if is_quiet else sys.stdout
    for row in table.rows if any(len(row.trials) > 1 for row in table.rows) else ():
        print(_mean_line(row), file=stream)
    print(f"checks of honest miners: {table.honest_checks}, failed: {table.honest_failed}", file=stream)
    for fault in table.faults():
        print(f"bar: {fault}", file=stream)


def _line(trial: Trial) -> str:
    found = "-" if trial.detected_after_outer_steps is None else str(trial.detected_after_outer_steps)
    return (
        f"{trial.name:26} {trial.share:6.0%} {trial.num_attacks:6} {trial.effort:8.0%} {found:>11} "
        f"{_percent(trial.earnings_before):>7} {_percent(trial.earnings_after):>7} "
        f"{_percent(trial.honest_spread):>6} {trial.honest_punished:8} {trial.loss_effect:+7.3f}"
    )


def _mean_line(row: Row) -> str:
    found = row.detected_after_outer_steps
    return (
        f"mean over {len(row.trials)} seeds: {row.name} by {row.share:.0%} of a stage, "
        f"{'not always found' if found is None else f'found after {found} outer steps at most'}, before "
        f"{_percent(row.earnings_before)} ± {_percent(row.earnings_before_error)}, after "
        f"{_percent(row.earnings_after)}, honest spread {_percent(row.honest_spread)}, "
        f"{row.honest_punished} honest punished, loss {row.loss_effect:+.3f}"
    )


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{value:.0%}"
