"""A miner with a paced device: `python -m orion.bench.churn.miners TASK`.

Computes what every miner computes, and lets the device's thread wait until the pass has taken its time. Ends when its
standard input closes. Each time the first stage ends a backward, a microbatch has been applied on every stage, and its
miner writes the time, in seconds since the epoch, to standard output.
"""

import asyncio
import sys
import time
from functools import partial

import structlog
from pydantic import BaseModel, ConfigDict

from orion.bench.churn.plan import Pace
from orion.bench.workers import say, stop_when_stdin_closes
from orion.common.clock import SystemClock
from orion.common.protocol.signing import keypair_from_uri
from orion.miner import service
from orion.miner.config import MinerConfig
from orion.miner.events import Backward, BackwardDone, Forward, Job, JobResult
from orion.miner.worker import DeviceWorker


class MinerTask(BaseModel):
    """What the process is told on its command line."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    config: MinerConfig
    key_uri: str
    forward_s: float
    backward_s: float
    num_stages: int


class PacedWorker(DeviceWorker):
    """A device that takes a fixed time for each pass, and tells when the last pass of a microbatch has ended."""

    def __init__(self, pace: Pace, num_stages: int, *arguments: object, **options: object) -> None:
        super().__init__(*arguments, **options)  # type: ignore[arg-type]
        self._pace = pace
        self._num_stages = num_stages
        self._clock = SystemClock()

    def run(self, job: Job) -> JobResult:
        began_s = self._clock.monotonic_s()
        result = super().run(job)
        time.sleep(max(0.0, self._least_s(job) - (self._clock.monotonic_s() - began_s)))
        if isinstance(result, BackwardDone) and self._stage_index == 0:
            say(f"{self._clock.now_s():.4f}")
        return result

    def _least_s(self, job: Job) -> float:
        is_last = self._stage_index == self._num_stages - 1
        match job:
            case Forward():
                return self._pace.forward_s + self._pace.backward_s * is_last
            case Backward():
                return self._pace.backward_s
            case _:
                return 0.0


def main() -> None:
    """Runs the miner."""
    stop_when_stdin_closes()
    structlog.configure(logger_factory=structlog.PrintLoggerFactory(sys.stderr))
    task = MinerTask.model_validate_json(sys.argv[1])
    make_worker = partial(PacedWorker, Pace(task.forward_s, task.backward_s), task.num_stages)
    asyncio.run(service.serve(task.config, keypair_from_uri(task.key_uri), make_worker=make_worker))


if __name__ == "__main__":
    main()
