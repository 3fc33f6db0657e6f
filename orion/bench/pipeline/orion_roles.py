"""Orion's real roles, a process each: `python -m orion.bench.pipeline.orion_roles TASK`.

The orchestrator keeps its chain in memory, with everybody registered: a chain takes no part in what is timed, and a
validator would. Each line on the orchestrator's standard input asks for the losses of so many microbatches, and is
answered with one on its standard output. Miners tell of their inner steps in their log, a JSON line for each event.
"""

import asyncio
import json
import signal
import sys
from collections.abc import Sequence
from itertools import zip_longest
from pathlib import Path
from typing import Literal

import structlog
from pydantic import BaseModel, ConfigDict

from orion.bench.workers import say
from orion.common.config import RunSpec
from orion.common.net.http import HttpClient
from orion.common.net.memory_chain import ChainLedger, MemoryChain
from orion.common.net.orchestrator_client import OrchestratorClient
from orion.common.protocol.records import LossPoint
from orion.common.protocol.signing import hotkey_of, keypair_from_uri
from orion.miner import service as miner_service
from orion.miner.config import MinerConfig
from orion.orchestrator import service as orchestrator_service
from orion.orchestrator.config import OrchestratorConfig

_POLL_S = 0.1
ORCHESTRATOR_URI = "//orion bench/orchestrator"


def miner_uri(index: int) -> str:
    """The development key of a miner; where there is one for each stage, of that stage's."""
    return f"//orion bench/miner/{index}"


class OrchestratorTask(BaseModel):
    """What the orchestrator's process is told on its command line."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: Literal["orchestrator"] = "orchestrator"
    spec_path: Path
    config: OrchestratorConfig
    num_miners: int | None = None
    """Keys that may take part; None: one for each stage."""


class MinerTask(BaseModel):
    """What a miner's process is told on its command line."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: Literal["miner"] = "miner"
    config: MinerConfig
    key_uri: str


class _AnyTask(BaseModel):
    task: OrchestratorTask | MinerTask


class LossAnswer(BaseModel):
    """What the orchestrator says when it is asked for losses."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    losses: tuple[float, ...]
    """Of the first microbatches, in the order of their ids."""
    num_cancelled: int
    """Trips so far that came to nothing."""
    staleness: float | None
    """Inner steps between a microbatch's forward and its backward, in the mean of all stages but the last, which makes
    both at once; None: nobody has told any yet."""


async def _orchestrate(task: OrchestratorTask) -> None:
    spec = RunSpec.load(task.spec_path)
    ledger = ChainLedger()
    for index in range(task.num_miners or spec.num_stages):
        ledger.register(hotkey_of(keypair_from_uri(miner_uri(index))))
    url: asyncio.Future[str] = asyncio.get_running_loop().create_future()
    serving = orchestrator_service.serve(
        task.config, spec, keypair_from_uri(ORCHESTRATOR_URI), MemoryChain(ledger), on_listening=url.set_result
    )
    async with asyncio.TaskGroup() as tasks:
        tasks.create_task(serving)
        tasks.create_task(_answer_questions(url))


async def _answer_questions(url: asyncio.Future[str]) -> None:
    reader = asyncio.StreamReader()
    await asyncio.get_running_loop().connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), sys.stdin)
    async with HttpClient() as http:
        while line := await reader.readline():
            say((await _losses(http, await url, int(line))).model_dump_json())
    raise KeyboardInterrupt  # whoever asked is gone


async def _losses(http: HttpClient, url: str, wanted: int) -> LossAnswer:
    while True:
        points: list[LossPoint] = []
        while (batch := await OrchestratorClient.losses(http, url, len(points))).points:
            points.extend(batch.points)
        if len(points) >= wanted:
            status = await OrchestratorClient.status(http, url)
            points.sort(key=lambda point: point.microbatch_id)
            losses = tuple(point.loss for point in points[:wanted])
            return LossAnswer(
                losses=losses,
                num_cancelled=status.microbatches_cancelled,
                staleness=_mean_staleness([stage.counts for stage in status.staleness]),
            )
        await asyncio.sleep(_POLL_S)


def _mean_staleness(counts_by_stage: Sequence[Sequence[int]]) -> float | None:
    counts = [sum(at_once) for at_once in zip_longest(*counts_by_stage, fillvalue=0)]
    num_passes = sum(counts)
    return sum(steps * count for steps, count in enumerate(counts)) / num_passes if num_passes else None


async def _mine(task: MinerTask) -> None:
    mining = asyncio.create_task(miner_service.serve(task.config, keypair_from_uri(task.key_uri)))
    reader = asyncio.StreamReader()
    await asyncio.get_running_loop().connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), sys.stdin)
    until_alone = asyncio.create_task(reader.read())
    done, _ = await asyncio.wait({mining, until_alone}, return_when=asyncio.FIRST_COMPLETED)
    if mining not in done:
        mining.cancel()
    await mining


def log_json() -> None:
    """A JSON line for each event, with the time in seconds since the epoch."""
    structlog.configure(
        processors=[
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt=None),
            structlog.processors.format_exc_info,
            structlog.processors.JSONRenderer(),
        ],
        cache_logger_on_first_use=True,
    )


async def _run(task: OrchestratorTask | MinerTask) -> None:
    this = asyncio.current_task()
    assert this is not None
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, this.cancel)
    await (_orchestrate(task) if isinstance(task, OrchestratorTask) else _mine(task))


def main() -> None:
    """Plays the role."""
    log_json()
    task = _AnyTask.model_validate({"task": json.loads(sys.argv[1])}).task
    try:
        asyncio.run(_run(task))
    except (asyncio.CancelledError, KeyboardInterrupt):
        sys.exit(0)


if __name__ == "__main__":
    main()
