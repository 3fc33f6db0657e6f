"""A process that has imported already what workers need, and forks them: they start at once instead of in seconds.

`Nursery` is the benchmark's side; `python -m orion.bench.nursery FD MODULE…` is the process, which ends when the
benchmark does. Every worker is told what it is (a module whose `main` is called), and gets its own arguments,
environment, standard files and network namespace. A nursery computes nothing and starts no threads, so its children
are as good as new processes. Not for what is to be timed from its start.
"""

import ctypes
import gc
import importlib
import json
import os
import select
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from io import BufferedWriter
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from orion.common.errors import OrionError

MESSAGE_BYTES_MAX = 128 * 1024
READY_S = 120.0
"""For importing everything, and the first start."""
END_S = 60.0
"""For a process that was killed, to end."""
_CLONE_NEWNET = 0x40000000


class NurseryError(OrionError):
    """The nursery cannot start anybody any more; the message says why."""


@dataclass(slots=True)
class Nursling:
    """One process of a nursery, with the part of `subprocess.Popen` that benchmarks use."""

    nursery: "Nursery"
    pid: int
    stdin: BufferedWriter
    returncode: int | None = None

    def poll(self) -> int | None:
        """How it has ended; None while it runs."""
        self.nursery.listen(0.0)
        return self.returncode

    def wait(self, timeout: float = END_S) -> int:
        """How it has ended. Raises subprocess.TimeoutExpired."""
        if self.returncode is None and not self.nursery.listen(timeout, until=lambda: self.returncode is not None):
            raise subprocess.TimeoutExpired(str(self.pid), timeout)
        assert self.returncode is not None
        return self.returncode

    def send_signal(self, number: int) -> None:
        """Unless it has ended."""
        if self.poll() is None:
            os.kill(self.pid, number)

    def terminate(self) -> None:
        """SIGTERM."""
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        """SIGKILL."""
        self.send_signal(signal.SIGKILL)


@dataclass(slots=True)
class Nursery:
    """Use it as a context manager; whoever it has started must have ended by then."""

    modules: Sequence[str]
    """Imported beforehand."""
    environment: Mapping[str, str]
    """Of the nursery itself: what libraries read when they are loaded holds for all."""
    _process: subprocess.Popen[bytes] | None = None
    _channel: socket.socket | None = None
    _nurslings: dict[int, Nursling] = field(default_factory=dict)
    """Those that run, by process id; the one that is being started by 0."""

    def __enter__(self) -> Self:
        """Starts it, and returns before it has imported anything."""
        self._channel, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "orion.bench.nursery", str(theirs.fileno()), *self.modules],
                stdin=subprocess.DEVNULL,
                env=dict(self.environment),
                pass_fds=[theirs.fileno()],
                process_group=0,  # Ctrl-C is for the benchmark
            )
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._process is not None and self._channel is not None
        self._channel.close()
        self._process.terminate()
        self._process.wait()

    def start(
        self,
        module: str,
        argument: str,
        *,
        environment: Mapping[str, str],
        namespace: Path | None,
        output: int,
        errors: int,
    ) -> Nursling:
        """Calls `main` of a module in a process of its own; `output` and `errors` are its standard files. Raises
        NurseryError."""
        told = {
            "module": module,
            "argument": argument,
            "environment": dict(environment),
            "namespace": None if namespace is None else str(namespace),
        }
        assert self._channel is not None
        theirs, ours = os.pipe()
        try:
            socket.send_fds(self._channel, [json.dumps(told).encode()], [theirs, output, errors])
        except OSError as error:
            os.close(ours)
            raise NurseryError(f"the nursery has ended: {error}") from error
        finally:
            os.close(theirs)
        nursling = Nursling(self, 0, os.fdopen(ours, "wb"))
        self._nurslings[0] = nursling
        if not self.listen(READY_S, until=lambda: nursling.pid > 0):
            raise NurseryError("the nursery does not answer")
        return nursling

    def listen(self, timeout_s: float, until: Callable[[], bool] | None = None) -> bool:
        """Hears what the nursery tells, until something is so or the time is up; whether it is so."""
        assert self._channel is not None
        while True:
            if until is not None and until():
                return True
            ready, _, _ = select.select([self._channel], (), (), timeout_s)
            if not ready:
                return False
            message = self._channel.recv(MESSAGE_BYTES_MAX)
            if not message:
                raise NurseryError("the nursery has ended")
            self._take(json.loads(message))

    def _take(self, told: dict[str, int]) -> None:
        if "started" in told:
            nursling = self._nurslings.pop(0)
            nursling.pid = told["started"]
            self._nurslings[nursling.pid] = nursling
        else:
            self._nurslings.pop(told["ended"]).returncode = told["code"]


# --- the nursery's side


def main() -> None:
    """Imports, then forks whoever is asked for. In such a child this returns when its work has ended."""
    channel = socket.socket(fileno=int(sys.argv[1]))
    for module in sys.argv[2:]:
        importlib.import_module(module)
    gc.freeze()  # what is there now is shared with all children, and a collection would write to it
    children: dict[int, int] = {}
    """Process ids by the handles that say when they have ended."""
    while True:
        ready, _, _ = select.select([channel.fileno(), *children], (), ())
        for handle in ready:
            if handle in children:
                os.close(handle)
                _, status = os.waitpid(pid := children.pop(handle), 0)
                _tell(channel, {"ended": pid, "code": os.waitstatus_to_exitcode(status)})
                continue
            message, handles, _, _ = socket.recv_fds(channel, MESSAGE_BYTES_MAX, 3)
            if not message:
                return
            pid = os.fork()
            if pid == 0:
                channel.close()
                for child in children:
                    os.close(child)
                _work(json.loads(message), handles)
                return
            for received in handles:
                os.close(received)
            children[os.pidfd_open(pid)] = pid
            _tell(channel, {"started": pid})


def _tell(channel: socket.socket, told: dict[str, int]) -> None:
    try:
        channel.send(json.dumps(told).encode())
    except BrokenPipeError:
        sys.exit(0)  # the benchmark is gone


def _work(told: dict[str, Any], handles: Sequence[int]) -> None:
    """In the child: is that worker until its work has ended."""
    os.setpgid(0, 0)
    if told["namespace"] is not None:
        _enter(told["namespace"])
    for standard, handle in enumerate(handles):
        os.dup2(handle, standard)
        os.close(handle)
    os.environ.clear()
    os.environ.update(told["environment"])
    sys.argv = [told["module"], told["argument"]]
    importlib.import_module(told["module"]).main()


def _enter(namespace: str) -> None:
    """Moves this process into a network namespace."""
    library = ctypes.CDLL(None, use_errno=True)
    handle = os.open(namespace, os.O_RDONLY)
    if library.setns(handle, _CLONE_NEWNET):
        raise OSError(ctypes.get_errno(), f"cannot enter {namespace}")
    os.close(handle)


if __name__ == "__main__":
    main()
