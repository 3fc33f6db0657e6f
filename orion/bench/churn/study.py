"""Runs a swarm of real processes, calm and under blows by turns, and reads what came of it.

Miners are processes with real sockets; other miners reach each of them through a proxy in this process, which can cut
it off. The orchestrator's chain is in memory. Nothing but `orion.bench.workers` starts or ends processes.
"""

import asyncio
import json
import random
import signal
from collections.abc import AsyncIterator, Callable, Mapping
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
    Stretch,
    choose_victim,
    churn_spec,
    longest_calm_gap_s,
    mean_surviving_share,
    stall_after,
    throughput_ratio,
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
from orion.common.protocol.records import RunStatus
from orion.common.protocol.signing import hotkey_of, keypair_from_uri
from orion.common.train.data import prepare
from orion.miner.config import MinerConfig
from orion.orchestrator.config import OrchestratorConfig

HOST = "127.0.0.1"
SAMPLE_S = 0.2
LIMIT_S = 530.0
"""For all of it."""
WHOLE_LIMIT_S = 60.0
"""For newcomers to take the places of those that were struck."""
SETTLE_LIMIT_S = 90.0
KILL_LIMIT_S = 10.0


@dataclass(frozen=True, slots=True)
class Settings:
    """How long, how often, how many."""

    num_stages: int = 3
    replicas: int = 3
    num_blows: int = 6
    every_s: float = 20.0
    num_rounds: int = 2
    """Stretches that the blows are spread over; before, between and after them lie calm ones."""
    undisturbed_s: float = 30.0
    """Of each calm stretch, at least: it ends with an outer step."""
    outer_step_s: float = 15.0
    sync: str = "blocking"
    """Whether training waits for the outer step, as the run's specification says it."""
    pace: Pace = field(default_factory=Pace)
    seed: int = 0


@dataclass(slots=True)
class _Miner:
    worker: Worker
    proxy: CutProxy
    hotkey: str
    blow: Blow | None = None
    has_fired: bool = False
    """The blow was seen to do what it should."""


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
    tell: Callable[[str], None]
    miners: dict[str, _Miner] = field(default_factory=dict)
    samples: list[Sample] = field(default_factory=list)
    struck: list[tuple[_Miner, float]] = field(default_factory=list)
    """In order, with the time of the blow."""
    fired: dict[Blow, int] = field(default_factory=lambda: dict.fromkeys(Blow, 0))

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

    async def when_training(self) -> None:
        """Waits for the first microbatches."""
        while True:
            try:
                if (await self.status()).microbatches_applied > self.settings.replicas * self.settings.num_stages:
                    return
            except TransportError:
                pass  # the orchestrator is not up yet
            await asyncio.sleep(SAMPLE_S)

    def working(self, status: RunStatus) -> dict[int, list[str]]:
        """Active miners of each stage that are not under a blow."""
        names = {miner.hotkey: name for name, miner in self.miners.items() if miner.blow is None}
        found: dict[int, list[str]] = {stage_index: [] for stage_index in range(self.settings.num_stages)}
        for member in status.miners:
            if member.state is MemberState.ACTIVE and member.hotkey in names:
                found[member.stage_index].append(names[member.hotkey])
        return found

    async def look(self) -> tuple[RunStatus, Sample]:
        """Takes a sample, and waits until the next one is due."""
        await asyncio.sleep(SAMPLE_S)
        status = await self.status()
        trains = all(stage.phase is Phase.TRAIN for stage in status.stages)
        working = self.working(status)
        num_working = tuple(len(working[index]) for index in sorted(working))
        self.samples.append(Sample(self.clock.now_s(), trains, status.outer_step, num_working))
        return status, self.samples[-1]

    async def opening(self, not_before_s: float = 0.0) -> float:
        """Waits for the next opening of an outer step at or after that time, and says when it was."""
        _, before = await self.look()
        while True:
            _, sample = await self.look()
            if sample.trains and sample.outer_step > before.outer_step:
                if sample.at_s >= not_before_s:
                    return sample.at_s
                before = sample

    def applied_at_s(self) -> tuple[float, ...]:
        """When each microbatch had been applied on every stage, as the first stage's miners told, dead ones too."""
        return tuple(sorted(float(line) for miner in self.miners.values() for line in miner.worker.output_lines()))


async def run_study(
    settings: Settings,
    data_root: Path,
    clock: Clock,
    environment: Mapping[str, str],
    tell: Callable[[str], None],
) -> Churn:
    """One run; `tell` hears how far it is. Raises BenchError, also when it takes longer than `LIMIT_S`."""
    spec = churn_spec(settings.num_stages, settings.replicas, settings.outer_step_s, settings.pace, settings.sync)
    data_folder = data_root / spec.data.folder_name()
    digest = (await asyncio.to_thread(prepare, spec.data, data_folder)).digest
    spec = RunSpec.parse({**spec.model_dump(mode="json"), "data_digest": digest}, "churn benchmark")
    environment = {**environment, "OMP_NUM_THREADS": "1"}
    try:
        async with (
            asyncio.timeout(LIMIT_S),
            _running(settings, spec, data_folder=data_folder, clock=clock, environment=environment, tell=tell) as swarm,
        ):
            course = await _observe(swarm)
            status = await _settled(swarm)
    except TimeoutError as error:
        raise BenchError(f"not through after {LIMIT_S:.0f} s: too much other work on this machine?") from error
    return _figures(settings, course, swarm.fired, status)


@asynccontextmanager
async def _running(
    settings: Settings,
    spec: RunSpec,
    *,
    data_folder: Path,
    clock: Clock,
    environment: Mapping[str, str],
    tell: Callable[[str], None],
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
        swarm = _Swarm(settings, spec, workers, folder, data_folder, url, clock, environment, stack, http, tell)
        for index in range(num_miners):
            await swarm.start_miner(index // settings.replicas)
        tell(f"{num_miners} miners start")
        await swarm.when_training()
        yield swarm


async def _observe(swarm: _Swarm) -> Course:
    """Calm and blows by turns. Raises BenchError."""
    settings = swarm.settings
    rng = random.Random(f"churn {settings.seed}")
    kinds = list(Blow) * settings.num_blows
    stretches: list[Stretch] = []
    num_left = settings.num_blows
    for num_rounds_left in range(settings.num_rounds, -1, -1):
        await _whole(swarm)
        began_s = await swarm.opening()
        ended_s = await swarm.opening(began_s + settings.undisturbed_s)
        stretches.append(Stretch(True, began_s, ended_s))
        swarm.tell(f"calm for {ended_s - began_s:.0f} s")
        if not num_rounds_left:
            break
        num_blows = -(-num_left // num_rounds_left)
        num_left -= num_blows
        began_s = ended_s
        for place in range(num_blows):
            await _strike(swarm, rng, kinds[len(swarm.struck)])
            until_s = began_s + (place + 1) * settings.every_s
            while swarm.clock.now_s() < until_s:
                await swarm.look()
        stretches.append(Stretch(False, began_s, await swarm.opening()))
    await _recover(swarm)
    kills = tuple(at_s for miner, at_s in swarm.struck if miner.blow is Blow.KILL)
    return Course(tuple(stretches), swarm.applied_at_s(), tuple(swarm.samples), kills)


async def _whole(swarm: _Swarm) -> None:
    """Waits until every stage has as many active miners as it should. Raises BenchError."""
    await _recover(swarm)
    deadline_s = swarm.clock.monotonic_s() + WHOLE_LIMIT_S
    while True:
        _, sample = await swarm.look()
        if min(sample.working) >= swarm.settings.replicas:
            return
        if swarm.clock.monotonic_s() > deadline_s:
            raise BenchError(f"after {WHOLE_LIMIT_S:.0f} s only {sample.working} miners of the stages work")


async def _strike(swarm: _Swarm, rng: random.Random, blow: Blow) -> None:
    """Strikes somebody, and lets another one join."""
    await _recover(swarm)
    status, _ = await swarm.look()
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
    swarm.struck.append((victim, swarm.clock.now_s()))
    swarm.tell(f"{name} feels a {blow}")
    await swarm.start_miner(None)


async def _recover(swarm: _Swarm) -> None:
    """Ends the newest blow, if it lasts, and counts it if it was felt: who was stopped is killed, who was cut off is
    reached again."""
    if not swarm.struck or swarm.struck[-1][0].has_fired:
        return
    miner = swarm.struck[-1][0]
    process = miner.worker.process
    assert miner.blow is not None
    match miner.blow:
        case Blow.KILL:
            miner.has_fired = await asyncio.to_thread(process.wait, KILL_LIMIT_S) == -signal.SIGKILL
        case Blow.STOP:
            miner.has_fired = _is_stopped(process.pid)
            process.kill()
        case Blow.CUT:
            miner.has_fired = miner.proxy.held_back.is_set()
            miner.proxy.heal()
    if not miner.has_fired:
        raise BenchError(f"{miner.worker.name} has felt nothing of a {miner.blow}")
    swarm.fired[miner.blow] += 1
    if miner.blow is Blow.CUT:
        miner.blow = None


def _is_stopped(pid: int) -> bool:
    """The state of a process follows its name, which may hold anything."""
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "T"


async def _settled(swarm: _Swarm) -> RunStatus:
    """The status once every cancelled trip's data has been leased again, or never will be."""
    deadline_s = swarm.clock.monotonic_s() + SETTLE_LIMIT_S
    while True:
        status = await swarm.status()
        is_settled = status.microbatches_cancelled == status.microbatches_repaired.released
        if is_settled or swarm.clock.monotonic_s() > deadline_s:
            return status
        await asyncio.sleep(SAMPLE_S)


def _figures(settings: Settings, course: Course, fired: Mapping[Blow, int], status: RunStatus) -> Churn:
    tokens = status.tokens // max(1, status.microbatches_applied)
    stalls = tuple(stall_after(course, kill_s) for kill_s in course.kills_at_s)
    return Churn(
        started=status.microbatches_started,
        applied=status.microbatches_applied,
        repaired=status.microbatches_repaired.model_dump(),
        cancelled=status.microbatches_cancelled,
        lost=status.microbatches_cancelled - status.microbatches_repaired.released,
        throughput_ratio=throughput_ratio(course, settings.replicas),
        surviving_share=mean_surviving_share(course, settings.replicas),
        longest_stall_s=max((stall.stall_s for stall in stalls), default=0.0),
        stalls=stalls,
        longest_undisturbed_s=longest_calm_gap_s(course),
        faults_fired={kind.value: fired[kind] for kind in Blow},
        tokens_per_s={
            "undisturbed": course.rates_per_s(calm=True) * tokens,
            "disturbed": course.rates_per_s(calm=False) * tokens,
        },
    )
