"""A miner is killed, stopped or cut off while it has a microbatch in hand, in one running swarm of real processes.

Each blow falls at a chosen stand of a microbatch, and every microbatch that stood there must be applied all the same.
"""

import asyncio
import itertools
import json
import os
import signal
import sys
import time
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

import psutil
import pytest
from swarm_kit import WAIT_S, small_run

from orion.bench.churn.proxy import CutProxy, free_port
from orion.bench.nursery import Nursery
from orion.bench.pipeline.orion_roles import OrchestratorTask, miner_uri
from orion.bench.workers import Worker, Workers
from orion.common.clock import SystemClock
from orion.common.config import RunSpec
from orion.common.errors import TransportError
from orion.common.ids import MemberState
from orion.common.net.http import HttpClient
from orion.common.net.orchestrator_client import OrchestratorClient
from orion.common.protocol.records import RunStatus
from orion.common.train.data import prepare
from orion.miner.config import MinerConfig
from orion.orchestrator.config import OrchestratorConfig

pytestmark = [pytest.mark.slow, pytest.mark.timeout(400), pytest.mark.xdist_group("processes")]

HOST = "127.0.0.1"
NUM_STAGES, REPLICAS = 3, 2
STRUCK = 2
"""The first miner of the middle stage."""
STANDS = {
    "waiting for forward": ["receiving", "forward_queued"],
    "forwarding": ["forwarding"],
    "waiting for gradient": ["awaiting_gradient"],
    "sending gradient": ["returning"],
}
ENVIRONMENT = {
    **os.environ,
    "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *sys.path]),
    "OMP_NUM_THREADS": "1",
}
MEMBER_S = 45.0
"""Longer than any blow: what is repaired is not repaired because a membership ended."""


@dataclass
class Struck:
    """The miner that is struck, and its neighbours."""

    folder: Path
    data_folder: Path
    url: str
    workers: Workers
    proxy: CutProxy
    http: HttpClient
    processes: dict[int, Worker] = field(default_factory=dict)

    @property
    def orders(self) -> Path:
        return self.folder / f"orders-{STRUCK}"

    def start(self, index: int) -> None:
        config = MinerConfig(
            orchestrator_url=self.url,
            data_folder=self.data_folder,
            state_folder=self.folder / "miners",
            stage_index=index // REPLICAS,
            host=HOST,
            port=self.proxy.target_port if index == STRUCK else 0,
            public_url=f"http://{HOST}:{self.proxy.port}" if index == STRUCK else None,
            heartbeat_s=0.5,
        )
        orders = self.folder / f"orders-{index}"
        orders.mkdir(exist_ok=True)
        argument = json.dumps(
            {"config": config.model_dump(mode="json"), "key": miner_uri(index), "orders": str(orders)}
        )
        self.processes[index] = self.workers.start(f"miner-{index}", "struck_miner", argument, environment=ENVIRONMENT)

    async def status_when(self, wanted: Callable[[RunStatus], bool]) -> RunStatus:
        async with asyncio.timeout(WAIT_S):
            while True:
                try:
                    status = await OrchestratorClient.status(self.http, self.url)
                except TransportError:
                    pass  # it is not up yet
                else:
                    if wanted(status):
                        return status
                await asyncio.sleep(0.1)

    async def when_working(self) -> RunStatus:
        """Waits until both replicas of the struck stage have work."""

        def works(status: RunStatus) -> bool:
            stage = [miner for miner in status.miners if miner.stage_index == STRUCK // REPLICAS]
            return [miner.state for miner in stage] == [MemberState.ACTIVE] * REPLICAS

        return await self.status_when(works)

    async def applied_from(self, offset: int) -> set[int]:
        """Microbatches whose loss was reported after so many others."""
        losses = await OrchestratorClient.losses(self.http, self.url, offset)
        return {point.microbatch_id for point in losses.points}


@asynccontextmanager
async def struck_swarm(folder: Path) -> AsyncIterator[Struck]:
    limits = {"member_s": MEMBER_S, "transfer_grace_s": 60.0, "train_s": 240.0, "microbatch_s": 120.0}
    # Inner steps take milliseconds here: what waits for a replacement must not be let go as too stale.
    spec = small_run(
        num_stages=NUM_STAGES,
        replicas=REPLICAS,
        outer_steps=1000,
        inner_steps=8,
        time_limits=limits,
        flow={"staleness_max": 64},
    )
    data_folder = folder / "data"
    digest = (await asyncio.to_thread(prepare, spec.data, data_folder)).digest
    spec = RunSpec.parse({**spec.model_dump(mode="json"), "data_digest": digest}, "test")
    (folder / "spec.json").write_text(json.dumps(spec.model_dump(mode="json")))
    config = OrchestratorConfig(
        state_folder=folder / "orchestrator", data_folder=data_folder, host=HOST, port=free_port(HOST)
    )
    task = OrchestratorTask(spec_path=folder / "spec.json", config=config, num_miners=NUM_STAGES * REPLICAS)
    async with AsyncExitStack() as stack:
        http = await stack.enter_async_context(HttpClient())
        proxy = await stack.enter_async_context(CutProxy(HOST, free_port(HOST)).running())
        # Eleven processes are started, and each would import for seconds.
        nursery = stack.enter_context(Nursery(["struck_miner", "orion.bench.pipeline.orion_roles"], ENVIRONMENT))
        workers = stack.enter_context(Workers(folder, SystemClock(), nursery))
        workers.start(
            "orchestrator", "orion.bench.pipeline.orion_roles", task.model_dump_json(), environment=ENVIRONMENT
        )
        struck = Struck(folder, data_folder, f"http://{HOST}:{config.port}", workers, proxy, http)
        for index in range(NUM_STAGES * REPLICAS):
            struck.start(index)
        yield struck


async def strike(struck: Struck, blow: str, stands: list[str]) -> None:
    """One blow, at one stand, and what must come of it."""
    # Of those before, the struck miner may still hold some that were taken from it when it was struck last.
    before = await struck.when_working()
    orders = struck.orders
    for name in ("fired", "cut"):
        (orders / name).unlink(missing_ok=True)
    order = {"blow": blow, "stands": stands, "first_id": before.microbatches_started}
    (orders / "order.part").write_text(json.dumps(order))
    (orders / "order.part").rename(orders / "order")
    await asyncio.to_thread(_wait_for, orders / "fired")
    if blow == "cut":
        struck.proxy.cut()
        (orders / "cut").touch()
    fired = json.loads((orders / "fired").read_text())
    waiting = set(fired["microbatch_ids"])
    assert waiting and fired["stands"] == stands
    async with asyncio.timeout(WAIT_S):
        while waiting:
            await asyncio.sleep(0.2)
            waiting -= await struck.applied_from(before.microbatches_applied)
        if blow == "cut":
            await struck.proxy.held_back.wait()  # what it sends itself still gets through
    await _recover(struck, blow)


def _wait_for(path: Path) -> None:
    """Waits for a file that another process writes. Polled quickly: that process stands still meanwhile."""
    until_s = time.monotonic() + WAIT_S
    while not path.exists():
        assert time.monotonic() < until_s, f"{path} was not written"
        time.sleep(0.002)


def _is_stopped(pid: int) -> bool:
    return psutil.Process(pid).status() == psutil.STATUS_STOPPED


async def _recover(struck: Struck, blow: str) -> None:
    process = struck.processes[STRUCK].process
    match blow:
        case "kill":
            assert await asyncio.to_thread(process.wait) == -signal.SIGKILL
            struck.workers.started.remove(struck.processes[STRUCK])
            assert process.stdin is not None
            process.stdin.close()
            struck.start(STRUCK)
        case "stop":
            assert _is_stopped(process.pid), "it was not stopped"
            process.send_signal(signal.SIGCONT)
        case "cut":
            struck.proxy.heal()


async def test_nothing_is_lost_with_a_miner_whatever_it_was_doing(tmp_path: Path) -> None:
    async with struck_swarm(tmp_path) as struck:
        await struck.status_when(lambda status: status.microbatches_applied >= 8)
        # Kills come last: each costs the start of a process.
        for blow, stand in itertools.product(["stop", "cut", "kill"], STANDS):
            await strike(struck, blow, STANDS[stand])
        status = await struck.when_working()
    repaired = status.microbatches_repaired
    assert repaired.rerouted + repaired.spliced >= 6, repaired
    # Every microbatch that stood where a blow fell was applied under its own id (`strike`). Of those beside it, whose
    # end nobody waits for before the next blow falls, two may come to nothing: then their data is leased again.
    assert status.microbatches_cancelled == repaired.released <= 2, status.notices
    assert status.anchors_equal
