"""One stage of torch.distributed.pipelining's 1F1B schedule over gloo, with Orion's own stage module and inner
optimizer: `python -m orion.bench.pipeline.torch_stage TASK`, with a `TrainerTask` as JSON.

Every rank reads the step's token ids from the prepared data, so that nothing crosses but activations and gradients.
"""

import sys
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.pipelining import PipelineStage, Schedule1F1B

from orion.bench.pipeline.training import InnerSteps, StepTokens, Stopwatch, TrainerResult, TrainerTask
from orion.bench.workers import say, stop_when_stdin_closes
from orion.common.clock import Clock, SystemClock
from orion.common.model.sizes import stage_size
from orion.common.model.splits import stage_layouts
from orion.common.model.stage import Stage, token_loss
from orion.common.train.inner import clip_share

TIMEOUT_S = 300.0
"""After which a rank that hears nothing gives up."""


class _StageModule(nn.Module):
    """A stage as torch's pipeline calls it: the first one with ids alone."""

    def __init__(self, stage: Stage) -> None:
        super().__init__()
        self.stage = stage

    def forward(self, x: Tensor | None = None, *, ids: Tensor) -> Tensor:
        output: Tensor = self.stage(x, ids)
        return output


def train(task: TrainerTask, clock: Clock) -> TrainerResult:
    """Takes the steps with the other ranks."""
    spec = task.spec()
    tokens, model = StepTokens(spec, task.data_folder), task.model(spec)
    layouts = stage_layouts(model, spec.num_stages, spec.split)
    sizes = [stage_size(model, layout) for layout in layouts]
    stage = Stage(model, layouts[task.rank])
    inner = InnerSteps(stage, spec, clip_share(sizes[task.rank], sum(sizes), spec.inner.clip_norm))
    pipeline_stage = PipelineStage(_StageModule(stage), task.rank, spec.num_stages, torch.device("cpu"))
    schedule: Any = Schedule1F1B(pipeline_stage, n_microbatches=spec.microbatches_per_step, loss_fn=token_loss)
    stopwatch = Stopwatch(clock)
    losses: list[float] = []
    for step in range(task.window.num_steps):
        ids_BU = tokens.step_ids(step)
        targets: dict[str, Any] = {}
        step_losses: list[Tensor] = []
        if task.rank == spec.num_stages - 1:
            targets = {"target": ids_BU[:, 1:].contiguous(), "losses": step_losses}
        schedule.step(ids=ids_BU[:, :-1].contiguous(), return_outputs=False, **targets)
        losses += [float(loss.detach()) for loss in step_losses]
        inner.step(step)
        stopwatch.step_ended()
    return stopwatch.result(losses)


def main() -> None:
    """Trains as told."""
    stop_when_stdin_closes()
    task = TrainerTask.model_validate_json(sys.argv[1])
    torch.set_num_threads(task.num_threads)
    dist.init_process_group(
        "gloo",
        init_method=task.meeting_url,
        rank=task.rank,
        world_size=task.spec().num_stages,
        timeout=timedelta(seconds=TIMEOUT_S),
    )
    try:
        result = train(task, SystemClock())
        dist.barrier()  # a rank that leaves early would take its connections from under the others
    finally:
        dist.destroy_process_group()
    say(result.say())


if __name__ == "__main__":
    main()
