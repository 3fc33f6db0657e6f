"""Plain training in one process: `python -m orion.bench.pipeline.plain TASK`, with a `TrainerTask` as JSON."""

import sys

import torch

from orion.bench.pipeline.training import InnerSteps, StepTokens, Stopwatch, TrainerResult, TrainerTask
from orion.bench.workers import say, stop_when_stdin_closes
from orion.common.clock import Clock, SystemClock
from orion.common.model.stage import Transformer, token_loss


def train(task: TrainerTask, clock: Clock) -> TrainerResult:
    """Takes the steps, microbatch by microbatch."""
    spec = task.spec()
    tokens = StepTokens(spec, task.data_folder)
    model = Transformer(task.model(spec), 1)
    inner = InnerSteps(model, spec, spec.inner.clip_norm)
    stopwatch, losses = Stopwatch(clock), []
    for step in range(task.window.num_steps):
        for ids_BU in tokens.step_ids(step).chunk(spec.microbatches_per_step):
            loss = token_loss(model(ids_BU[:, :-1]), ids_BU[:, 1:])
            torch.autograd.backward(loss / spec.microbatches_per_step)
            losses.append(float(loss.detach()))
        inner.step(step)
        stopwatch.step_ended()
    return stopwatch.result(losses)


def main() -> None:
    """Trains as told."""
    stop_when_stdin_closes()
    task = TrainerTask.model_validate_json(sys.argv[1])
    torch.set_num_threads(task.num_threads)
    say(train(task, SystemClock()).say())


if __name__ == "__main__":
    main()
