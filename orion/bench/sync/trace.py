"""What links and processors did while an outer step was synchronised, a tenth of a second at a time.

`Tracer` looks at the processes from outside (`/proc`), so that what is timed does not get slower by it; `Trace` is what
a reader of the report sees: where a link idled, something else was waited for.
"""

import itertools
import os
import threading
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

from orion.bench.workers import Worker, machine_idle_s
from orion.common.clock import Clock

SAMPLE_S = 0.1


@dataclass(frozen=True, slots=True)
class Trace:
    """Of one outer step, from the end of training on. Rates are of one replica, the mean of all that live."""

    at_s: tuple[float, ...]
    """Ends of the samples."""
    upload_mbit: tuple[float, ...]
    """Empty where replicas share an interface."""
    download_mbit: tuple[float, ...]
    replica_cpus: tuple[float, ...]
    """Processors that all replicas together kept busy."""
    orchestrator_cpus: tuple[float, ...]
    machine_cpus: tuple[float, ...]
    """… that were busy at all, the kernel's own work for the network included."""
    replica_cpu_s: float
    """Processor time of all replicas together."""
    orchestrator_cpu_s: float
    machine_cpu_s: float


@dataclass(frozen=True, slots=True)
class _Look:
    """Counters of one process at one moment."""

    cpu_s: float
    sent_bytes: int
    received_bytes: int


@dataclass(frozen=True, slots=True)
class _Sample:
    at_s: float
    looks: dict[str, _Look]
    """By the process' name."""
    idle_s: float
    """Of the machine."""


class Tracer:
    """Samples in a thread of its own. Use it as a context manager."""

    def __init__(self, orchestrator: Worker, replicas: list[Worker], interface: str | None, clock: Clock) -> None:
        """`interface`: each replica's own; None: they share one."""
        self._orchestrator = orchestrator
        self._replicas = list(replicas)
        self._interface = interface
        self._clock = clock
        self._samples: list[_Sample] = []
        self._is_over = threading.Event()
        self._thread = threading.Thread(target=self._run, name="tracer", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._is_over.set()
        self._thread.join()

    def between(self, began_s: float, ended_s: float) -> Trace:
        """What was seen from `began_s` to `ended_s`, both in seconds since the epoch."""
        samples = [item for item in self._samples if began_s - SAMPLE_S < item.at_s < ended_s + SAMPLE_S]
        pairs = list(itertools.pairwise(samples))
        mine = self._orchestrator.name
        steps = [_Step.of(before, after, mine) for before, after in pairs]
        has_rates = self._interface is not None
        return Trace(
            at_s=tuple(round(after.at_s - began_s, 2) for _, after in pairs),
            upload_mbit=tuple(round(step.upload_mbit, 1) for step in steps if has_rates),
            download_mbit=tuple(round(step.download_mbit, 1) for step in steps if has_rates),
            replica_cpus=tuple(round(step.replica_cpu_s / step.seconds, 2) for step in steps),
            orchestrator_cpus=tuple(round(step.orchestrator_cpu_s / step.seconds, 2) for step in steps),
            machine_cpus=tuple(round(step.machine_cpu_s / step.seconds, 2) for step in steps),
            replica_cpu_s=round(sum(step.replica_cpu_s for step in steps), 2),
            orchestrator_cpu_s=round(sum(step.orchestrator_cpu_s for step in steps), 2),
            machine_cpu_s=round(sum(step.machine_cpu_s for step in steps), 2),
        )

    def _run(self) -> None:
        while not self._is_over.wait(SAMPLE_S):
            looks = {}
            for worker in (self._orchestrator, *self._replicas):
                look = _look(worker, self._interface)
                if look is not None:
                    looks[worker.name] = look
            self._samples.append(_Sample(self._clock.now_s(), looks, machine_idle_s()))


@dataclass(frozen=True, slots=True)
class _Step:
    """What happened between two samples."""

    seconds: float
    upload_mbit: float
    download_mbit: float
    replica_cpu_s: float
    orchestrator_cpu_s: float
    machine_cpu_s: float

    @classmethod
    def of(cls, before: _Sample, after: _Sample, orchestrator: str) -> "_Step":
        seconds = after.at_s - before.at_s
        both = before.looks.keys() & after.looks.keys()
        replicas = both - {orchestrator}
        scale = 8e-6 / seconds / max(1, len(replicas))
        return cls(
            seconds=seconds,
            upload_mbit=scale * sum(after.looks[name].sent_bytes - before.looks[name].sent_bytes for name in replicas),
            download_mbit=scale
            * sum(after.looks[name].received_bytes - before.looks[name].received_bytes for name in replicas),
            replica_cpu_s=sum(after.looks[name].cpu_s - before.looks[name].cpu_s for name in replicas),
            orchestrator_cpu_s=sum(
                after.looks[name].cpu_s - before.looks[name].cpu_s for name in both & {orchestrator}
            ),
            machine_cpu_s=(os.cpu_count() or 1) * seconds - (after.idle_s - before.idle_s),
        )


def _look(worker: Worker, interface: str | None) -> _Look | None:
    """None: the process has ended."""
    folder = Path("/proc") / str(worker.process.pid)
    try:
        # Fields of the line after the command's name, which may hold anything: user and system time are 12 and 13.
        fields = (folder / "stat").read_text().rpartition(")")[2].split()
        sent_bytes, received_bytes = (0, 0) if interface is None else interface_bytes(worker.process.pid, interface)
    except (FileNotFoundError, ProcessLookupError):
        return None
    return _Look((int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK"), sent_bytes, received_bytes)


def interface_bytes(pid: int, interface: str) -> tuple[int, int]:
    """Bytes that an interface of the process' network has sent and received. Raises FileNotFoundError, and
    ProcessLookupError, when the process has ended or there is no such interface."""
    for line in (Path("/proc") / str(pid) / "net/dev").read_text().splitlines():
        name, _, counters = line.partition(":")
        if name.strip() == interface:
            fields = counters.split()
            return int(fields[8]), int(fields[0])
    raise ProcessLookupError(f"process {pid} has no interface {interface}")
