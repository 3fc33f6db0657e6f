"""One rank of gloo's all_reduce over as many bytes: `python -m orion.bench.sync.gloo_peer TASK`."""

import sys
from datetime import timedelta

import torch
import torch.distributed as dist
from pydantic import BaseModel, ConfigDict

from orion.bench.workers import say, stop_when_stdin_closes
from orion.common.clock import SystemClock


class GlooTask(BaseModel):
    """What a rank is told on its command line."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    rank: int
    num_ranks: int
    meeting_url: str
    num_values: int
    """In fp32."""
    repetitions: int


class GlooResult(BaseModel):
    """What it says in the end."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    seconds: tuple[float, ...]
    """Of each repetition after the first, from a barrier to the sum."""


def main() -> None:
    """Sums, again and again."""
    stop_when_stdin_closes()
    task = GlooTask.model_validate_json(sys.argv[1])
    clock = SystemClock()
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=task.meeting_url,
        rank=task.rank,
        world_size=task.num_ranks,
        timeout=timedelta(seconds=300),
    )
    values_N = torch.full((task.num_values,), 1e-3)
    seconds: list[float] = []
    for _ in range(task.repetitions + 1):
        dist.barrier()
        began_s = clock.monotonic_s()
        dist.all_reduce(values_N)
        seconds.append(clock.monotonic_s() - began_s)
    dist.destroy_process_group()
    say(GlooResult(seconds=tuple(seconds[1:])).model_dump_json())


if __name__ == "__main__":
    main()
