"""What follows from the times at which stages ended their inner steps. Pure."""

from collections.abc import Sequence
from dataclasses import dataclass

from orion.bench.pipeline.plan import Window


@dataclass(frozen=True, slots=True)
class Measurement:
    """One system's training under one setting, once."""

    tokens_per_s: float
    cpu_s: float
    """Processor time of all processes for 1,000 tokens: what the machine's other load changes least."""
    idle_share: float
    """Of the machine's processors, while it was timed; whatever else ran then was not idle."""
    loss: float | None
    """Mean training loss over the tokens of the last step, in nats per token; None where fewer steps than usual were
    taken, after which no other system's loss compares."""
    staleness: float | None = None
    """Inner steps between a microbatch's forward and its backward, in the mean of all stages; None: 0 by design."""


def tokens_per_s(step_ends_s: Sequence[Sequence[float]], window: Window, tokens_per_step: int) -> float:
    """Tokens that were applied between two inner steps, optimizer included.

    `step_ends_s`: for each stage, when it ended its first, second, … inner step. A step counts as ended when the last
    stage has ended it, in every system alike. Raises ValueError when there are too few.
    """
    if any(len(ends_s) < window.num_steps for ends_s in step_ends_s):
        raise ValueError(f"not every stage took {window.num_steps} inner steps: {[len(ends) for ends in step_ends_s]}")
    first_s = max(ends_s[window.num_warm_up - 1] for ends_s in step_ends_s)
    last_s = max(ends_s[window.num_steps - 1] for ends_s in step_ends_s)
    return window.num_measured * tokens_per_step / (last_s - first_s)


def last_step_loss(losses: Sequence[float], window: Window, microbatches_per_step: int) -> float:
    """The mean over the microbatches of the last measured step; `losses` in the order of the data."""
    last = losses[(window.num_steps - 1) * microbatches_per_step : window.num_steps * microbatches_per_step]
    if len(last) < microbatches_per_step:
        raise ValueError(f"{len(losses)} losses do not reach the end of step {window.num_steps}")
    return sum(last) / len(last)
