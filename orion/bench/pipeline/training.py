"""What plain training and torch's pipeline share: the run's tokens, and the inner step, both as Orion has them.

Letters in names: B sequences of a microbatch, T tokens, U = T + 1, M microbatches of a step.
"""

import json
import os
from collections.abc import Sequence
from pathlib import Path

import torch
from pydantic import BaseModel, ConfigDict
from torch import Tensor

from orion.bench.pipeline.plan import Window
from orion.bench.workers import machine_idle_s
from orion.common.clock import Clock
from orion.common.config import RunSpec
from orion.common.model.config import ModelConfig
from orion.common.model.params import init_params, matrix_params
from orion.common.model.stage import Pipeline
from orion.common.train.data import TokenDataset
from orion.common.train.inner import build_inner_optimizer, clip_in_place
from orion.common.train.schedule import learning_rate_factor


class TrainerTask(BaseModel):
    """What a process is told on its command line."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    spec_path: Path
    data_folder: Path
    num_warm_up: int
    num_measured: int
    num_threads: int
    with_boundary: bool = False
    rank: int = 0
    """Stage of a pipeline."""
    meeting_url: str = ""
    """Where the ranks of a pipeline find each other, `tcp://ADDRESS:PORT`."""

    @property
    def window(self) -> Window:
        return Window(self.num_warm_up, self.num_measured)

    def spec(self) -> RunSpec:
        """The run that is trained."""
        return RunSpec.load(self.spec_path)

    def model(self, spec: RunSpec) -> ModelConfig:
        """Its model, with or without boundary."""
        return spec.model if self.with_boundary else spec.model.with_boundary("none")


class TrainerResult(BaseModel):
    """What it prints in the end."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    step_ends_s: tuple[float, ...]
    """Seconds since the epoch, at which each inner step had been taken."""
    cpu_s: tuple[float, ...]
    """Processor time that the process had used by then."""
    idle_s: tuple[float, ...]
    """Time that the machine's processors had idled by then."""
    losses: tuple[float, ...]
    """Of each microbatch in order, where losses are computed."""

    def say(self) -> str:
        """The line for standard output."""
        return json.dumps(self.model_dump(mode="json"))


class Stopwatch:
    """Notes when inner steps end."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._step_ends_s: list[float] = []
        self._cpu_s: list[float] = []
        self._idle_s: list[float] = []

    def step_ended(self) -> None:
        """Now."""
        self._step_ends_s.append(self._clock.now_s())
        times = os.times()
        self._cpu_s.append(times.user + times.system)
        self._idle_s.append(machine_idle_s())

    def result(self, losses: Sequence[float]) -> TrainerResult:
        """What was noted, and the losses."""
        return TrainerResult(
            step_ends_s=tuple(self._step_ends_s),
            cpu_s=tuple(self._cpu_s),
            idle_s=tuple(self._idle_s),
            losses=tuple(losses),
        )


class StepTokens:
    """The microbatches of each step, as Orion's first stage would lease them: data ids 0, 1, 2 …"""

    def __init__(self, spec: RunSpec, data_folder: Path) -> None:
        self._spec = spec
        self._dataset = TokenDataset.open(data_folder, spec.data_digest)

    def step_ids(self, step: int) -> Tensor:
        """ids [M × B, U] of a step."""
        first_id = step * self._spec.microbatches_per_step
        data_ids = range(first_id, first_id + self._spec.microbatches_per_step)
        return torch.cat([torch.from_numpy(self._dataset.microbatch(self._spec.seed, index)) for index in data_ids])


class InnerSteps:
    """The inner optimizer over a module's own gradients."""

    def __init__(self, module: Pipeline, spec: RunSpec, norm_bound: float) -> None:
        init_params(module, spec.seed)
        self._schedule = spec.inner.schedule
        self._norm_bound = norm_bound
        self._params = dict(module.named_parameters())
        master = {name: param.data for name, param in self._params.items()}
        self._optimizer = build_inner_optimizer(master, matrix_params(module), spec.inner)

    def step(self, index: int) -> None:
        """Uses up the gradients, which must be means over the step's tokens."""
        gradients = {
            name: torch.zeros_like(param) if param.grad is None else param.grad for name, param in self._params.items()
        }
        norm = clip_in_place(list(gradients.values()), self._norm_bound)
        assert norm.is_finite, f"the gradient of step {index} is not finite"
        self._optimizer.step(gradients, learning_rate_factor(self._schedule, index))
        for param in self._params.values():
            param.grad = None
