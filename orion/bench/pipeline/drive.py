"""Runs one system under one setting, once: starts its processes behind their links, waits, reads times, stops them."""

import json
import os
import socket
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from types import TracebackType
from typing import Self

from orion.bench.links.network import EmulatedNetwork
from orion.bench.nursery import Nursery
from orion.bench.pipeline.orion_roles import LossAnswer, MinerTask, OrchestratorTask, miner_uri
from orion.bench.pipeline.plan import Setting, System, Window, Workload
from orion.bench.pipeline.training import TrainerResult, TrainerTask
from orion.bench.pipeline.window import Measurement, last_step_loss, tokens_per_s
from orion.bench.workers import BenchError, Worker, Workers, machine_idle_s
from orion.common.clock import Clock
from orion.common.config import RunSpec
from orion.common.train.data import prepare
from orion.miner.config import MinerConfig
from orion.orchestrator.config import OrchestratorConfig

LIMIT_S = 900.0
"""For one system under one setting, start included."""
LOSSES_S = 60.0
_LOOPBACK = "127.0.0.1"
_PORT = 29_500
"""Of who is met first, behind an emulated link, where nobody else listens."""


@dataclass(frozen=True, slots=True)
class Place:
    """Where one peer runs."""

    address: str
    interface: str
    namespace: Path | None
    """Of its network; None: the machine's own."""
    port: int
    """A free one."""


@dataclass(frozen=True, slots=True)
class Site:
    """Where everything of one measurement runs."""

    workers: Workers
    folder: Path
    places: tuple[Place, ...]
    """A stage each, and the last one for the orchestrator."""


class PipelineBench:
    """Measures systems, one at a time. Needs root for every setting but the unshaped one. Use it as a context manager:
    all that train are forked from one process that has imported everything, or starting them would take longer than
    measuring."""

    def __init__(self, workload: Workload, data_root: Path, clock: Clock, environment: Mapping[str, str]) -> None:
        """Prepares the data under `data_root` where that has not been done."""
        self._clock = clock
        self._environment = dict(environment)
        self._data_folder = data_root / workload.spec.data.folder_name()
        digest = prepare(workload.spec.data, self._data_folder).digest
        self.spec = RunSpec.parse(
            {**workload.spec.model_dump(mode="json"), "data_digest": digest}, "pipeline benchmark"
        )
        self._workload = workload
        # Threads that spin while they wait would starve others on a busy machine.
        waiting = {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}
        modules = [f"orion.bench.pipeline.{name}" for name in ("plain", "torch_stage", "orion_roles")]
        self._nursery = Nursery(modules, self._environment | waiting)

    def __enter__(self) -> Self:
        self._nursery.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._nursery.__exit__(kind, error, trace)

    def measure(self, system: System, setting: Setting) -> Measurement:
        """Trains. Raises BenchError, LinkError."""
        with self._site(setting) as site:
            (site.folder / "spec.json").write_text(json.dumps(self.spec.model_dump(mode="json")))
            if system is System.ORION:
                return self._orion(site)
            return self._trainers(system, site, self._workload.window_of(system, setting))

    @contextmanager
    def _site(self, setting: Setting) -> Iterator[Site]:
        num_places = self.spec.num_stages + 1
        with ExitStack() as stack:
            folder = Path(stack.enter_context(TemporaryDirectory(prefix="orion-pipeline-")))
            places: list[Place] = []
            if setting.profile is None:
                places = [Place(_LOOPBACK, "lo", None, port) for port in _free_ports(num_places)]
            else:
                network = stack.enter_context(EmulatedNetwork([setting.profile] * num_places))
                for index in range(num_places):
                    places.append(Place(network.address(index), "eth0", network.namespace_path(index), _PORT))
            workers = stack.enter_context(Workers(folder, self._clock, self._nursery))
            yield Site(workers, folder, tuple(places))

    # --- plain training and torch's pipeline

    def _trainers(self, system: System, site: Site, window: Window) -> Measurement:
        num_ranks = 1 if system is System.SINGLE else self.spec.num_stages
        module = "plain" if system is System.SINGLE else "torch_stage"
        for rank in range(num_ranks):
            place = site.places[rank]
            task = TrainerTask(
                spec_path=site.folder / "spec.json",
                data_folder=self._data_folder,
                num_warm_up=window.num_warm_up,
                num_measured=window.num_measured,
                num_threads=2 if system is System.SINGLE else 1,
                with_boundary=system is System.TORCH_BOUNDARY,
                rank=rank,
                meeting_url=f"tcp://{site.places[0].address}:{site.places[0].port}",
            )
            self._start(
                site,
                place,
                f"rank-{rank}",
                module=module,
                argument=task.model_dump_json(),
            )
        site.workers.wait_for_all(LIMIT_S)
        results = [TrainerResult.model_validate_json(worker.output_lines()[-1]) for worker in site.workers.started]
        first, last = window.num_warm_up - 1, window.num_steps - 1
        cpu_s = sum(result.cpu_s[last] - result.cpu_s[first] for result in results)
        slowest = max(results, key=lambda result: result.step_ends_s[last])
        idle_s = slowest.idle_s[last] - slowest.idle_s[first]
        timed_s = slowest.step_ends_s[last] - slowest.step_ends_s[first]
        is_usual = window == self._workload.window
        return Measurement(
            tokens_per_s([result.step_ends_s for result in results], window, self._workload.tokens_per_step),
            self._per_1000_tokens(cpu_s, window),
            idle_share=_idle_share(idle_s, timed_s),
            loss=last_step_loss(results[-1].losses, window, self.spec.microbatches_per_step) if is_usual else None,
        )

    # --- Orion

    def _orion(self, site: Site) -> Measurement:
        stages, last = range(self.spec.num_stages), site.places[-1]
        config = OrchestratorConfig(
            state_folder=site.folder / "orchestrator", data_folder=self._data_folder, host=last.address, port=last.port
        )
        orchestrator_task = OrchestratorTask(spec_path=site.folder / "spec.json", config=config)
        orchestrator = self._start(
            site, last, "orchestrator", module="orion_roles", argument=orchestrator_task.model_dump_json()
        )
        url = f"http://{last.address}:{last.port}"
        miners = [self._start_miner(site, stage_index, url) for stage_index in stages]
        window = self._workload.window

        def all_have_stepped(steps: int) -> bool:
            return all(len(_inner_steps(miner)) >= steps for miner in miners)

        site.workers.wait_until("warming up", lambda: all_have_stepped(window.num_warm_up), LIMIT_S)
        began_s, idle_before_s, cpu_before_s = self._clock.monotonic_s(), machine_idle_s(), site.workers.cpu_s()
        site.workers.wait_until("training", lambda: all_have_stepped(window.num_steps), LIMIT_S)
        timed_s = self._clock.monotonic_s() - began_s
        idle_s, cpu_s = machine_idle_s() - idle_before_s, site.workers.cpu_s() - cpu_before_s
        orchestrator.tell(str(window.num_steps * self.spec.microbatches_per_step))
        site.workers.wait_until("telling the losses", lambda: _answer(orchestrator) is not None, LOSSES_S)
        answer = _answer(orchestrator)
        assert answer is not None
        if answer.num_cancelled:
            raise BenchError(f"{answer.num_cancelled} trips were cancelled; what was measured is no steady state")
        return Measurement(
            tokens_per_s([_inner_steps(miner) for miner in miners], window, self._workload.tokens_per_step),
            self._per_1000_tokens(cpu_s, window),
            idle_share=_idle_share(idle_s, timed_s),
            loss=last_step_loss(answer.losses, window, self.spec.microbatches_per_step),
            staleness=answer.staleness,
        )

    def _start_miner(self, site: Site, stage_index: int, orchestrator_url: str) -> Worker:
        place = site.places[stage_index]
        config = MinerConfig(
            orchestrator_url=orchestrator_url,
            data_folder=self._data_folder,
            host=place.address,
            port=place.port,
            stage_index=stage_index,
            device="cpu",
            state_folder=site.folder / "miners",
        )
        task = MinerTask(config=config, key_uri=miner_uri(stage_index))
        return self._start(site, place, f"miner-{stage_index}", module="orion_roles", argument=task.model_dump_json())

    # --- both

    def _start(self, site: Site, place: Place, name: str, *, module: str, argument: str) -> Worker:
        more = {"GLOO_SOCKET_IFNAME": place.interface}  # gloo finds its network by name
        return site.workers.start(
            name,
            f"orion.bench.pipeline.{module}",
            argument,
            namespace=place.namespace,
            environment=self._environment | more,
        )

    def _per_1000_tokens(self, cpu_s: float, window: Window) -> float:
        return 1000 * cpu_s / (window.num_measured * self._workload.tokens_per_step)


def _idle_share(idle_s: float, timed_s: float) -> float:
    """Of all processors; clock ticks are coarse, so that a machine without a pause may seem to have idled a little."""
    return min(1.0, max(0.0, idle_s / (timed_s * (os.cpu_count() or 1))))


def _free_ports(count: int) -> list[int]:
    """Different TCP ports that nobody listens on now."""
    with ExitStack() as probes:
        sockets = [probes.enter_context(socket.socket()) for _ in range(count)]
        for probe in sockets:
            probe.bind((_LOOPBACK, 0))
        return [probe.getsockname()[1] for probe in sockets]


def _inner_steps(miner: Worker) -> list[float]:
    """When the miner took its inner steps, by its log: seconds since the epoch."""
    lines = [json.loads(line) for line in miner.output_lines() if '"inner_step_taken"' in line]
    return [line["timestamp"] for line in lines]


def _answer(orchestrator: Worker) -> LossAnswer | None:
    lines = [line for line in orchestrator.output_lines() if '"num_cancelled"' in line]
    return LossAnswer.model_validate_json(lines[-1]) if lines else None
