"""Runs one setting: starts orchestrator, replicas and gloo behind their links, brings on the fault, reads the times.

Times come from the orchestrator's log: when its stage left training, when the manifest was out, when all had applied.
"""

import json
import os
import socket
import statistics
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from types import TracebackType
from typing import Self

from orion.bench.links.network import EmulatedNetwork
from orion.bench.nursery import Nursery
from orion.bench.pipeline.orion_roles import OrchestratorTask, miner_uri
from orion.bench.sync.gloo_peer import GlooResult, GlooTask
from orion.bench.sync.hivemind_group import HivemindGroup
from orion.bench.sync.made_up_miner import SyncMinerTask
from orion.bench.sync.plan import NUM_REPLICAS, NUM_WARM_UP, SLOW_FACTOR, Fault, Row, Setting
from orion.bench.sync.trace import Tracer, interface_bytes
from orion.bench.workers import Worker, Workers
from orion.common.clock import Clock
from orion.common.config import RunSpec
from orion.common.train.data import prepare
from orion.miner.config import MinerConfig
from orion.orchestrator.config import OrchestratorConfig

LIMIT_S = 900.0
"""For one setting, start included."""
_LOOPBACK = "127.0.0.1"
_PORT = 29_600
_GLOO_REPETITIONS = 2
_HIVEMIND_REPETITIONS = 2
"""Fewer: peers find each other anew for each, which takes seconds and is not timed."""
_MARKS = ("pseudo_gradient_uploaded", "partition_reduced", "outer_step_applied")
_MARK_SLACK_S = 1.0
"""A miner's log line may come after the orchestrator's."""
_WAITING = {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}
"""Threads that spin while they wait would starve others."""


@dataclass(frozen=True, slots=True)
class Place:
    """Where one peer runs."""

    address: str
    interface: str
    namespace: Path | None
    """Of its network; None: the machine's own."""
    port: int


@dataclass(frozen=True, slots=True)
class Site:
    """Where everything of one measurement runs: the replicas' places, and last the orchestrator's."""

    workers: Workers
    folder: Path
    places: tuple[Place, ...]
    network: EmulatedNetwork | None
    """Where each place has an interface of its own, whose bytes can be counted."""


@dataclass(frozen=True, slots=True)
class StepTimes:
    """When one outer step's synchronisation came to which point, in seconds since the epoch."""

    closed_s: float
    merging_s: float
    manifest_s: float
    applied_s: float

    @property
    def seconds(self) -> float:
        return self.applied_s - self.closed_s

    @property
    def phases_s(self) -> tuple[float, float, float]:
        return self.merging_s - self.closed_s, self.manifest_s - self.merging_s, self.applied_s - self.manifest_s


class SyncBench:
    """Measures settings, one at a time. Needs root for every setting but the unshaped one. Use it as a context manager:
    its processes are forked from one that has imported everything."""

    def __init__(
        self,
        spec: RunSpec,
        data_root: Path,
        clock: Clock,
        environment: Mapping[str, str],
        *,
        num_timed: int,
        scratch: Path | None = None,
        hivemind: Path | None = None,
    ) -> None:
        """Prepares the data under `data_root` where that has not been done. `num_timed` outer steps are timed. The
        store lies under `scratch`: on a disk that is slower than the links, the disk would be measured. `hivemind`: an
        interpreter that has it; None: it is not measured."""
        self._clock = clock
        self._environment = dict(environment)
        self._data_folder = data_root / spec.data.folder_name()
        digest = prepare(spec.data, self._data_folder).digest
        self.spec = RunSpec.parse({**spec.model_dump(mode="json"), "data_digest": digest}, "sync benchmark")
        self._num_timed = num_timed
        self._scratch = scratch
        self._hivemind = hivemind
        modules = ["orion.bench.sync.gloo_peer", "orion.bench.sync.made_up_miner", "orion.bench.pipeline.orion_roles"]
        self._nursery = Nursery(modules, self._environment | _WAITING)

    def __enter__(self) -> Self:
        self._nursery.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._nursery.__exit__(kind, error, trace)

    @property
    def stage_bytes(self) -> int:
        """Of the stage in fp32."""
        return 4 * self.spec.stage_sizes[0]

    def measure(self, setting: Setting) -> Row:
        """Raises BenchError, LinkError."""
        gloo_s = hivemind_s = None
        if setting.fault is Fault.NONE:
            with self._site(setting) as site:
                gloo_s = self._gloo(site)
            if self._hivemind is not None:
                with self._site(setting) as site:
                    places = [(place.address, place.namespace) for place in site.places[:NUM_REPLICAS]]
                    group = HivemindGroup(self._hivemind, self.spec.stage_sizes[0], site.folder)
                    hivemind_s = group.seconds(places, _HIVEMIND_REPETITIONS)
        with self._site(setting) as site:
            row = self._orion(site, setting)
        floor_s = setting.floor_s(self.stage_bytes)
        return Row(
            name=setting.name,
            fault=setting.fault,
            seconds=row.seconds,
            all_s=row.all_s,
            floor_s=floor_s,
            ratio=None if floor_s is None else row.seconds / floor_s,
            bytes_up=row.bytes_up,
            bytes_down=row.bytes_down,
            gloo_s=gloo_s,
            hivemind_s=hivemind_s,
            phases_s=row.phases_s,
            anchors_equal=row.anchors_equal,
            notices=row.notices,
            marks_s=row.marks_s,
            trace=row.trace,
        )

    @contextmanager
    def _site(self, setting: Setting) -> Iterator[Site]:
        with ExitStack() as stack:
            folder = Path(stack.enter_context(TemporaryDirectory(prefix="orion-sync-", dir=self._scratch)))
            places: list[Place] = []
            network = None
            if not setting.is_shaped:
                places = [Place(_LOOPBACK, "lo", None, port) for port in _free_ports(NUM_REPLICAS + 1)]
            else:
                network = stack.enter_context(EmulatedNetwork(setting.profiles))
                for index in range(NUM_REPLICAS + 1):
                    places.append(Place(network.address(index), "eth0", network.namespace_path(index), _PORT))
            workers = stack.enter_context(Workers(folder, self._clock, self._nursery))
            (folder / "spec.json").write_text(json.dumps(self.spec.model_dump(mode="json")))
            yield Site(workers, folder, tuple(places), network)

    # --- gloo

    def _gloo(self, site: Site) -> float:
        for rank in range(NUM_REPLICAS):
            place = site.places[rank]
            task = GlooTask(
                rank=rank,
                num_ranks=NUM_REPLICAS,
                meeting_url=f"tcp://{site.places[0].address}:{site.places[0].port}",
                num_values=self.spec.stage_sizes[0],
                repetitions=_GLOO_REPETITIONS,
            )
            self._start(site, place, f"gloo-{rank}", "orion.bench.sync.gloo_peer", task.model_dump_json())
        site.workers.wait_for_all(LIMIT_S)
        results = [GlooResult.model_validate_json(worker.output_lines()[-1]) for worker in site.workers.started]
        rounds = zip(*(result.seconds for result in results), strict=True)
        return float(statistics.median(max(seconds) for seconds in rounds))

    # --- Orion

    def _orion(self, site: Site, setting: Setting) -> Row:
        last = site.places[-1]
        config = OrchestratorConfig(
            state_folder=site.folder / "orchestrator",
            data_folder=self._data_folder,
            host=last.address,
            port=last.port,
            tick_s=0.1,
        )
        task = OrchestratorTask(spec_path=site.folder / "spec.json", config=config, num_miners=NUM_REPLICAS)
        orchestrator = self._start(
            site, last, "orchestrator", "orion.bench.pipeline.orion_roles", task.model_dump_json()
        )
        url = f"http://{last.address}:{last.port}"
        miners = [
            self._start_miner(site, index, url, lies=setting.fault is Fault.LIAR and index == 0)
            for index in range(NUM_REPLICAS)
        ]
        site.workers.wait_until("warming up", lambda: ("train", NUM_WARM_UP) in _phases(orchestrator), LIMIT_S)
        interface = None if site.network is None else site.places[0].interface
        before = _bytes_moved(miners, interface)
        with Tracer(orchestrator, miners, interface, self._clock) as tracer:
            self._bring_on(site, orchestrator, miners, setting.fault)
            num_timed = self._num_timed if setting.fault is Fault.NONE else 1
            end = NUM_WARM_UP + num_timed
            site.workers.wait_until("synchronising", lambda: ("train", end) in _phases(orchestrator), LIMIT_S)
        after = _bytes_moved(miners, interface)
        steps = [_times(orchestrator, outer_step) for outer_step in range(NUM_WARM_UP, end)]
        seconds = statistics.median_low(step.seconds for step in steps)
        typical = next(step for step in steps if step.seconds == seconds)
        moved = [
            tuple((late - early) / num_timed for early, late in zip(before[name], after[name], strict=True))
            for name in before.keys() & after.keys()
        ]
        notices = _notices(orchestrator)
        return Row(
            name=setting.name,
            fault=setting.fault,
            seconds=seconds,
            all_s=tuple(step.seconds for step in steps),
            floor_s=None,
            ratio=None,
            bytes_up=statistics.mean(up for up, _ in moved) if moved else None,
            bytes_down=statistics.mean(down for _, down in moved) if moved else None,
            gloo_s=None,
            phases_s=typical.phases_s,
            anchors_equal=not any("anchors differ" in notice for notice in notices),
            notices=tuple(notices),
            marks_s=_marks(miners, typical),
            trace=tracer.between(typical.closed_s, typical.applied_s),
        )

    def _bring_on(self, site: Site, orchestrator: Worker, miners: list[Worker], fault: Fault) -> None:
        """Kills one miner, or slows its link down, in the phase that is to be disturbed."""
        moment = {
            Fault.SLOW: ("upload", NUM_WARM_UP),
            Fault.KILLED_UPLOAD: ("upload", NUM_WARM_UP),
            Fault.KILLED_REDUCE: ("merge", NUM_WARM_UP),
            Fault.KILLED_APPLY: ("apply", NUM_WARM_UP),
        }.get(fault)
        if moment is None:
            return
        site.workers.wait_until(f"reaching {moment}", lambda: moment in _phases(orchestrator), LIMIT_S)
        if fault is Fault.SLOW:
            assert site.network is not None
            site.network.slow_down(0, SLOW_FACTOR)
            return
        victim = miners[0]
        victim.process.kill()
        victim.process.wait()
        site.workers.started.remove(victim)

    def _start_miner(self, site: Site, index: int, orchestrator_url: str, *, lies: bool) -> Worker:
        place = site.places[index]
        config = MinerConfig(
            orchestrator_url=orchestrator_url,
            data_folder=self._data_folder,
            host=place.address,
            port=place.port,
            stage_index=0,
            device="cpu",
            num_threads=1,
            heartbeat_s=1.0,
            state_folder=site.folder / "miners",
        )
        task = SyncMinerTask(config=config, key_uri=miner_uri(index), lies=lies)
        return self._start(site, place, f"miner-{index}", "orion.bench.sync.made_up_miner", task.model_dump_json())

    def _start(self, site: Site, place: Place, name: str, module: str, argument: str) -> Worker:
        more = _WAITING | {"GLOO_SOCKET_IFNAME": place.interface}
        return site.workers.start(
            name, module, argument, namespace=place.namespace, environment=self._environment | more
        )


def _phases(orchestrator: Worker) -> dict[tuple[str, int], float]:
    """When the stage entered each phase of each outer step, by the orchestrator's log; `apply` from the manifest on."""
    found: dict[tuple[str, int], float] = {}
    for line in orchestrator.output_lines():
        if '"feed_changed"' in line:
            event = json.loads(line)
            name, _, rest = event["phases"][0].partition("(")
            found.setdefault((name, int(rest.rstrip(")"))), event["timestamp"])
    return found


def _times(orchestrator: Worker, outer_step: int) -> StepTimes:
    phases = _phases(orchestrator)
    applied_s = phases["train", outer_step + 1]
    merging_s = phases.get(("merge", outer_step), applied_s)
    return StepTimes(
        closed_s=phases["upload", outer_step],
        merging_s=merging_s,
        manifest_s=phases.get(("apply", outer_step), merging_s),
        applied_s=applied_s,
    )


def _notices(orchestrator: Worker) -> list[str]:
    return [json.loads(line)["text"] for line in orchestrator.output_lines() if '"event": "notice"' in line]


def _bytes_moved(miners: list[Worker], interface: str | None) -> dict[str, tuple[int, int]]:
    """Bytes that each miner that lives has sent and received; nothing where they share an interface."""
    if interface is None:
        return {}
    return {
        miner.name: interface_bytes(miner.process.pid, interface) for miner in miners if miner.process.poll() is None
    }


def _marks(miners: list[Worker], step: StepTimes) -> dict[str, tuple[float, float]]:
    """When the first and the last replica told of what it had done, in seconds from the end of training on."""
    found: dict[str, list[float]] = {}
    for miner in miners:
        for line in miner.output_lines():
            event = json.loads(line)
            if event["event"] in _MARKS and step.closed_s <= event["timestamp"] <= step.applied_s + _MARK_SLACK_S:
                found.setdefault(event["event"], []).append(round(event["timestamp"] - step.closed_s, 3))
    return {name: (min(times_s), max(times_s)) for name, times_s in found.items()}


def _free_ports(count: int) -> list[int]:
    with ExitStack() as probes:
        sockets = [probes.enter_context(socket.socket()) for _ in range(count)]
        for probe in sockets:
            probe.bind((_LOOPBACK, 0))
        return [probe.getsockname()[1] for probe in sockets]


def memory_folder() -> Path | None:
    """A folder in memory with room for the store, if there is one."""
    folder = Path("/dev/shm")
    return folder if folder.is_dir() and os.access(folder, os.W_OK) else None
