"""Processes that a benchmark starts, with their output in files: start, wait, stop.

A worker's standard input is a pipe that the benchmark holds open; a worker that called `stop_when_stdin_closes` ends
when that closes, so none outlives the benchmark, however that ends. Nothing here is timed.
"""

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Self

from orion.bench.nursery import Nursery, Nursling
from orion.common.clock import Clock
from orion.common.errors import OrionError

STOP_GRACE_S = 5.0
_POLL_S = 0.1
_TAIL_LINES = 12


class BenchError(OrionError):
    """A benchmark could not be carried out; the message says what failed and shows the end of its output."""


@dataclass(slots=True)
class Worker:
    """One process."""

    name: str
    process: subprocess.Popen[bytes] | Nursling
    output_path: Path
    errors_path: Path

    def output_lines(self) -> list[str]:
        """The whole lines that it has written to standard output so far."""
        text = self.output_path.read_text(encoding="utf-8")
        return text[: text.rfind("\n") + 1].splitlines()

    def tell(self, line: str) -> None:
        """Writes a line to its standard input."""
        assert self.process.stdin is not None
        self.process.stdin.write(f"{line}\n".encode())
        self.process.stdin.flush()


@dataclass(slots=True)
class Workers:
    """Use it as a context manager: whatever happened, all have ended when it is left."""

    folder: Path
    """For their output; must be there."""
    clock: Clock
    nursery: Nursery | None = None
    """Who starts them; None: each is a new interpreter."""
    started: list[Worker] = field(default_factory=list)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop()

    def start(
        self,
        name: str,
        module: str,
        argument: str,
        *,
        environment: Mapping[str, str],
        namespace: Path | None = None,
    ) -> Worker:
        """Runs `python -m MODULE ARGUMENT`, or what its `main` does; `namespace` may put it behind an emulated link."""
        output_path, errors_path = self.folder / f"{name}.out", self.folder / f"{name}.err"
        with output_path.open("wb") as output, errors_path.open("wb") as errors:
            process: subprocess.Popen[bytes] | Nursling
            if self.nursery is None:
                enter = [] if namespace is None else ["nsenter", f"--net={namespace}", "--"]
                process = subprocess.Popen(
                    [*enter, sys.executable, "-m", module, argument],
                    stdin=subprocess.PIPE,
                    stdout=output,
                    stderr=errors,
                    env=dict(environment),
                    # Ctrl-C is for the benchmark. Not a session each: Linux shares a busy machine's time among
                    # sessions, and a system of many processes would get more of it than one of few.
                    process_group=0,
                )
            else:
                process = self.nursery.start(
                    module,
                    argument,
                    environment=environment,
                    namespace=namespace,
                    output=output.fileno(),
                    errors=errors.fileno(),
                )
        worker = Worker(name, process, output_path, errors_path)
        self.started.append(worker)
        return worker

    def wait_until(self, what: str, is_so: Callable[[], bool], limit_s: float) -> None:
        """Looks again and again. Raises BenchError when it takes too long or a worker fails meanwhile."""
        deadline_s = self.clock.monotonic_s() + limit_s
        while not is_so():
            for worker in self.started:
                if worker.process.poll() not in (None, 0):
                    raise BenchError(f"{worker.name} ended with {worker.process.returncode}:\n{_tail(worker)}")
            if self.clock.monotonic_s() > deadline_s:
                tails = "\n".join(f"{worker.name}:\n{_tail(worker)}" for worker in self.started)
                raise BenchError(f"{what} took more than {limit_s:.0f} s\n{tails}")
            time.sleep(_POLL_S)

    def wait_for_all(self, limit_s: float) -> None:
        """Until every worker has ended well. Raises BenchError."""
        self.wait_until("training", lambda: all(worker.process.poll() == 0 for worker in self.started), limit_s=limit_s)

    def cpu_s(self) -> float:
        """Processor time that all workers that still run have used so far."""
        ticks = 0
        for worker in self.started:
            # Fields of the line after the command's name, which may hold anything: user and system time are 12 and 13.
            fields = Path(f"/proc/{worker.process.pid}/stat").read_text().rpartition(")")[2].split()
            ticks += int(fields[11]) + int(fields[12])
        return ticks / os.sysconf("SC_CLK_TCK")

    def _stop(self) -> None:
        for worker in self.started:
            if worker.process.poll() is None:
                worker.process.send_signal(signal.SIGCONT)
                worker.process.terminate()
        deadline_s = self.clock.monotonic_s() + STOP_GRACE_S
        for worker in self.started:
            try:
                worker.process.wait(max(0.0, deadline_s - self.clock.monotonic_s()))
            except subprocess.TimeoutExpired:
                worker.process.kill()
                worker.process.wait()
            if worker.process.stdin is not None:
                worker.process.stdin.close()


def machine_idle_s() -> float:
    """Time that the machine's processors have idled since it was started, all of them together."""
    fields = Path("/proc/stat").read_text(encoding="ascii").splitlines()[0].split()
    idle_ticks, io_wait_ticks = fields[4:6]
    return (int(idle_ticks) + int(io_wait_ticks)) / os.sysconf("SC_CLK_TCK")


def _tail(worker: Worker) -> str:
    lines = []
    for path in (worker.output_path, worker.errors_path):
        lines += path.read_text(encoding="utf-8", errors="replace").splitlines()[-_TAIL_LINES:]
    return "\n".join(lines)


# --- on the worker's side


def stop_when_stdin_closes() -> None:
    """Ends this process with SIGTERM once the benchmark is gone. For workers that read nothing on standard input."""

    def watch() -> None:
        while os.read(0, 4096):
            pass
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=watch, name="stdin-watch", daemon=True).start()


def say(line: str) -> None:
    """Writes a line to standard output, at once."""
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()
