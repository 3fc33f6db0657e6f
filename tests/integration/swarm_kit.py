"""Small local swarms of real processes for the integration tests."""

import asyncio
import json
import os
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

from orion.cli.local_swarm import LocalSwarm, SwarmPaths, make_keys
from orion.cli.resolve import resolve
from orion.common.clock import SystemClock
from orion.common.config import RunSpec
from orion.common.errors import TransportError
from orion.common.net.http import HttpClient
from orion.common.net.orchestrator_client import OrchestratorClient
from orion.common.protocol.records import RunStatus
from orion.common.train.data import prepare

WAIT_S = 150.0


def small_run(**changes: object) -> RunSpec:
    """2 stages × 2 replicas of the smallest model."""
    tree: dict[str, object] = {
        "run_id": "small",
        "seed": 1,
        "num_stages": 2,
        "replicas": 2,
        "outer_steps": 3,
        "inner_steps": 4,
        "microbatches_per_step": 2,
        "model": {"preset": "nano"},
        "data": {"source": "kjv", "tokenizer": "bpe:512", "sequence_length": 32, "sequences_per_microbatch": 4},
        "time_limits": {"member_s": 6.0, "transfer_grace_s": 10.0, "train_s": 60.0, "microbatch_s": 20.0},
    }
    return RunSpec.parse({**tree, **changes}, "small run")


@asynccontextmanager
async def running_swarm(
    folder: Path, data_root: Path, spec: RunSpec, *, num_miners: int | None = None
) -> AsyncIterator[LocalSwarm]:
    """A started swarm; everything is stopped at the end, and every process must have ended."""
    paths = SwarmPaths(run=folder / "run", data=data_root / spec.data.folder_name())
    paths.make()
    spec = resolve(spec, await asyncio.to_thread(prepare, spec.data, paths.data))
    paths.run_file.write_text(json.dumps(spec.model_dump(mode="json")))
    keys = make_keys(paths.wallets, spec.num_stages * spec.replicas if num_miners is None else num_miners)
    swarm = LocalSwarm(spec, paths, keys, port=0, device="cpu", clock=SystemClock(), environment=dict(os.environ))
    try:
        await swarm.start()
        yield swarm
    finally:
        await asyncio.to_thread(swarm.stop)


async def status_when(
    swarm: LocalSwarm, wanted: Callable[[RunStatus], bool], *, on_notice: Callable[[str], None] = lambda _: None
) -> RunStatus:
    """Polls until a status is as wanted; restarts an orchestrator that died, as `orion up` does."""
    status: RunStatus | None = None
    async with asyncio.timeout(WAIT_S), HttpClient() as http:
        while True:
            for line in swarm.notices():
                on_notice(line)
            try:
                status = await OrchestratorClient.status(http, swarm.url, timeout_s=2.0)
            except TransportError as error:
                on_notice(str(error))
            else:
                if wanted(status):
                    return status
            await asyncio.sleep(0.2)
