"""Runs a swarm of real processes twice, undisturbed and under blows, and reads what came of it.

Miners are processes with real sockets; other miners reach each of them through a proxy in this process, which can cut
it off. The orchestrator's chain is in memory. Nothing but `orion.bench.workers` starts or ends processes.
"""

import asyncio
import json
import random
import signal
from collections.abc import AsyncIterator, Mapping
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory

from orion.bench.churn.miners import MinerTask
from orion.bench.churn.plan import (
    Blow,
    Churn,
    Course,
    Pace,
    Sample,
    choose_victim,
    churn_spec,
    longest_gap_s,
    longest_stall_s,
    surviving_share,
)
from orion.bench.churn.proxy import CutProxy, free_port
from orion.bench.pipeline.orion_roles import OrchestratorTask, miner_uri
from orion.bench.workers import BenchError, Worker, Workers
from orion.common.clock import Clock
from orion.common.config import RunSpec
from orion.common.errors import TransportError
from orion.common.ids import MemberState, Phase
from orion.common.net.http import HttpClient
from orion.common.net.orchestrator_client import OrchestratorClient
from orion.common.protocol.records import LossPoint, RunStatus
from orion.common.protocol.signing import hotkey_of, keypair_from_uri
from orion.common.train.data import prepare
from orion.miner.config import MinerConfig
from orion.orchestrator.config import OrchestratorConfig

HOST = "127.0.0.1"
SAMPLE_S = 0.2
START_LIMIT_S = 300.0
SETTLE_LIMIT_S = 90.0


@dataclass(frozen=True, slots=True)
class Settings:
    """How long, how often, how many."""

    num_stages: int = 3
    replicas: int = 3
    num_blows: int = 6
    every_s: float = 20.0
    undisturbed_s: float = 60.0
    outer_step_s: float = 15.0
    pace: Pace = field(default_factory=Pace)
    seed: int = 0


@dataclass(slots=True)
class _Miner:
    worker: Worker
    proxy: CutProxy
    hotkey: str
    blow: Blow | None = None


@dataclass(slots=True)
class _Swarm:
    """One run of real processes."""

    settings: Settings
    spec: RunSpec
    workers: Workers
    folder: Path
    data_folder: Path
    url: str
    clock: Clock
    environment: Mapping[str, str]
    stack: AsyncExitStack
    http: HttpClient
    miners: dict[str, _Miner] = field(default_factory=dict)

    async def start_miner(self, stage_index: int | None) -> None:
        """One more, with a key of its own."""
        index = len(self.miners)
        uri = miner_uri(index)
        proxy = await self.stack.enter_async_context(CutProxy(HOST, free_port(HOST)).running())
        config = MinerConfig(
            orchestrator_url=self.url,
            data_folder=self.data_folder,
            host=HOST,
            port=proxy.target_port,
            public_url=f"http://{HOST}:{proxy.port}",
            stage_index=stage_index,
            device="cpu",
            state_folder=self.folder / "miners",
            heartbeat_s=0.5,
        )
        pace = self.settings.pace
        task = MinerTask(
            config=config,
            key_uri=uri,
            forward_s=pace.forward_s,
            backward_s=pace.backward_s,
            num_stages=self.settings.num_stages,
        )
        worker = self.workers.start(
            f"miner-{index}", "orion.bench.churn.miners", task.model_dump_json(), environment=self.environment
        )
        self.miners[f"miner-{index}"] = _Miner(worker, proxy, hotkey_of(keypair_from_uri(uri)))

    async def status(self) -> RunStatus:
        return await OrchestratorClient.status(self.http, self.url)

    async def losses(self) -> list[LossPoint]:
        """All that were reported."""
        points: list[LossPoint] = []
        while (batch := await OrchestratorClient.losses(self.http, self.url, len(points))).points:
            points.extend(batch.points)
        return points

    async def when_training(self) -> None:
        """Waits for the first microbatches. Raises BenchError."""
        deadline_s = self.clock.monotonic_s() + START_LIMIT_S
        while self.clock.monotonic_s() < deadline_s:
            try:
                if (await self.status()).microbatches_applied > self.settings.replicas * self.settings.num_stages:
                    return
            except TransportError:
                pass  # the orchestrator is not up yet
            await asyncio.sleep(SAMPLE_S)
        raise BenchError(f"nothing was trained within {START_LIMIT_S:.0f} s")

    def working(self, status: RunStatus) -> dict[int, list[str]]:
        """Active miners of each stage that are not under a blow."""
        names = {miner.hotkey: name for name, miner in self.miners.items() if miner.blow is None}
        found: dict[int, list[str]] = {stage_index: [] for stage_index in range(self.settings.num_stages)}
        for member in status.miners:
            if member.state is MemberState.ACTIVE and member.hotkey in names:
                found[member.stage_index].append(names[member.hotkey])
        return found

    def sample(self, status: RunStatus) -> Sample:
        trains = all(stage.phase is Phase.TRAIN for stage in status.stages)
        working = self.working(status)
        return Sample(self.clock.now_s(), trains, tuple(len(working[index]) for index in sorted(working)))


async def run_study(settings: Settings, data_root: Path, clock: Clock, environment: Mapping[str, str]) -> Churn:
    """Both runs, one after the other. Raises BenchError."""
    spec = churn_spec(settings.num_stages, settings.replicas, settings.outer_step_s, settings.pace)
    data_folder = data_root / spec.data.folder_name()
    digest = (await asyncio.to_thread(prepare, spec.data, data_folder)).digest
    spec = RunSpec.parse({**spec.model_dump(mode="json"), "data_digest": digest}, "churn benchmark")
    environment = {**environment, "OMP_NUM_THREADS": "1"}
    async with _running(settings, spec, data_folder, clock, environment) as swarm:
        calm = await _observe(swarm, settings.undisturbed_s)
    async with _running(settings, spec, data_folder, clock, environment) as swarm:
        blows: list[tuple[Blow, float]] = []
        course = await _observe(swarm, settings.num_blows * settings.every_s, blows)
        status = await _settled(swarm)
    return _figures(settings, calm, course, blows, status)


@asynccontextmanager
async def _running(
    settings: Settings, spec: RunSpec, data_folder: Path, clock: Clock, environment: Mapping[str, str]
) -> AsyncIterator[_Swarm]:
    async with AsyncExitStack() as stack:
        folder = Path(stack.enter_context(TemporaryDirectory(prefix="orion-churn-")))
        workers = stack.enter_context(Workers(folder, clock))
        (folder / "spec.json").write_text(json.dumps(spec.model_dump(mode="json")))
        port = free_port(HOST)
        config = OrchestratorConfig(state_folder=folder / "orchestrator", data_folder=data_folder, host=HOST, port=port)
        num_miners = settings.num_stages * settings.replicas
        task = OrchestratorTask(
            spec_path=folder / "spec.json", config=config, num_miners=num_miners + settings.num_blows
        )
        workers.start(
            "orchestrator", "orion.bench.pipeline.orion_roles", task.model_dump_json(), environment=environment
        )
        http = await stack.enter_async_context(HttpClient())
        url = f"http://{HOST}:{port}"
        swarm = _Swarm(settings, spec, workers, folder, data_folder, url, clock, environment, stack, http)
        for index in range(num_miners):
            await swarm.start_miner(index // settings.replicas)
        await swarm.when_training()
        yield swarm


async def _observe(swarm: _Swarm, seconds: float, blows: list[tuple[Blow, float]] | None = None) -> Course:
    """Watches for so long; with `blows`, strikes somebody every `every_s` and lets another one join, and notes it."""
    rng = random.Random(f"churn {swarm.settings.seed}")
    kinds = list(Blow) * swarm.settings.num_blows
    samples: list[Sample] = []
    began_s = swarm.clock.now_s()
    next_blow_s = began_s
    while swarm.clock.now_s() < began_s + seconds:
        status = await swarm.status()
        if blows is not None and swarm.clock.now_s() >= next_blow_s and len(blows) < swarm.settings.num_blows:
            next_blow_s += swarm.settings.every_s
            await _strike(swarm, rng, kinds[len(blows)], status, blows)
        samples.append(swarm.sample(status))
        await asyncio.sleep(SAMPLE_S)
    ended_s = swarm.clock.now_s()
    applied = tuple(point.time_s for point in await swarm.losses())
    kills = tuple(at_s for blow, at_s in blows or () if blow is Blow.KILL)
    return Course(began_s, ended_s, applied, tuple(samples), kills)


async def _strike(
    swarm: _Swarm, rng: random.Random, blow: Blow, status: RunStatus, blows: list[tuple[Blow, float]]
) -> None:
    _recover(swarm)
    name = choose_victim(rng, swarm.working(status))
    if name is None:
        raise BenchError(f"nobody can be struck: {swarm.working(status)}")
    victim = swarm.miners[name]
    victim.blow = blow
    match blow:
        case Blow.KILL:
            victim.worker.process.kill()
        case Blow.STOP:
            victim.worker.process.send_signal(signal.SIGSTOP)
        case Blow.CUT:
            victim.proxy.cut()
    blows.append((blow, swarm.clock.now_s()))
    await swarm.start_miner(None)


def _recover(swarm: _Swarm) -> None:
    """Ends the blows that last: who was stopped is killed, who was cut off is reached again."""
    for miner in swarm.miners.values():
        if miner.blow is Blow.STOP:
            miner.worker.process.kill()
        elif miner.blow is Blow.CUT:
            miner.proxy.heal()
            miner.blow = None


async def _settled(swarm: _Swarm) -> RunStatus:
    """The status once every cancelled trip's data has been leased again, or never will be."""
    deadline_s = swarm.clock.monotonic_s() + SETTLE_LIMIT_S
    while True:
        status = await swarm.status()
        is_settled = status.microbatches_cancelled == status.microbatches_repaired.released
        if is_settled or swarm.clock.monotonic_s() > deadline_s:
            return status
        await asyncio.sleep(SAMPLE_S)


def _figures(
    settings: Settings, calm: Course, course: Course, blows: list[tuple[Blow, float]], status: RunStatus
) -> Churn:
    tokens = status.tokens // max(1, status.microbatches_applied)
    share = surviving_share(course, settings.replicas)
    possible = calm.rate_per_s * share
    return Churn(
        started=status.microbatches_started,
        applied=status.microbatches_applied,
        repaired=status.microbatches_repaired.model_dump(),
        cancelled=status.microbatches_cancelled,
        lost=status.microbatches_cancelled - status.microbatches_repaired.released,
        throughput_ratio=course.rate_per_s / possible if possible else 0.0,
        surviving_share=share,
        longest_stall_s=longest_stall_s(course),
        longest_stall_in_training_s=longest_stall_s(course, in_training=True),
        longest_undisturbed_s=longest_gap_s(calm),
        faults_fired={kind.value: sum(blow is kind for blow, _ in blows) for kind in Blow},
        tokens_per_s={
            "undisturbed": calm.rate_per_s * tokens,
            "disturbed": course.rate_per_s * tokens,
        },
    )
