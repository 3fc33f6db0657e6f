"""How far the inner learning rate is turned up at each inner step.

A pure function of the step's number, which counts from the start of the run:
outer_step × inner steps per outer step + inner steps taken in this outer step. Nothing is remembered, so that
a miner that joins late, one that was restarted and a validator that replays all use the same rate.
"""

import math
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator


class InnerSchedule(BaseModel):
    """Shape of the learning rate over the inner steps of a run."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    shape: Literal["cosine", "constant"] = "cosine"
    """What follows the warm-up: half a cosine down to `floor`, or the full rate for ever."""
    num_warmup_steps: Annotated[int, Field(ge=0)] = 10
    """Inner steps over which the rate rises linearly to its full value; 0 = none."""
    num_total_steps: Annotated[int, Field(ge=1)] = 1000
    """Inner steps after which a cosine has reached `floor`, where it stays; counted from the start of the run."""
    floor: Annotated[float, Field(ge=0, le=1)] = 0.1
    """Least factor after the warm-up, as a share of the full rate."""

    @model_validator(mode="after")
    def _check(self) -> "InnerSchedule":
        if self.shape == "cosine" and self.num_warmup_steps >= self.num_total_steps:
            raise ValueError(
                f"num_warmup_steps {self.num_warmup_steps} must be below num_total_steps {self.num_total_steps}"
            )
        return self


def learning_rate_factor(schedule: InnerSchedule, inner_step_index: int) -> float:
    """Share of the full learning rate at an inner step, in (0, 1] during the warm-up and in [floor, 1] after it.

    `inner_step_index` counts from 0 at the start of the run. Raises ValueError when it is negative.
    """
    if inner_step_index < 0:
        raise ValueError(f"inner_step_index {inner_step_index} is negative")
    if inner_step_index < schedule.num_warmup_steps:
        return (inner_step_index + 1) / schedule.num_warmup_steps
    if schedule.shape == "constant":
        return 1.0
    num_decay_steps = schedule.num_total_steps - schedule.num_warmup_steps
    progress = min(1.0, (inner_step_index - schedule.num_warmup_steps) / num_decay_steps)
    return schedule.floor + (1.0 - schedule.floor) * 0.5 * (1.0 + math.cos(math.pi * progress))
