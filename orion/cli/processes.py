"""The operating-system processes of a local swarm: start, watch, stop.

Every child runs in its own session, so that Ctrl-C reaches the launcher alone and the launcher decides. A child's
standard input is a pipe that the launcher holds open: when the launcher dies, however it dies, the pipe closes and the
child stops by itself (`stop_when_stdin_closes`). So no process is left behind.
"""

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from orion.common.clock import Clock

STOP_GRACE_S = 8.0
"""What a child gets to end by itself after SIGTERM before it is killed."""


@dataclass(slots=True)
class Child:
    """One process of the swarm."""

    name: str
    process: subprocess.Popen[bytes]
    log_path: Path
    end_noticed: bool = False


@dataclass(slots=True)
class ProcessGroup:
    """Starts children with their logs in one folder and stops them all, whatever happened."""

    log_folder: Path
    clock: Clock
    children: list[Child] = field(default_factory=list)

    def start(self, name: str, arguments: Sequence[str], environment: dict[str, str]) -> Child:
        """Runs `orion ARGUMENTS` with this interpreter; its output goes to `NAME.log`."""
        log_path = self.log_folder / f"{name}.log"
        with log_path.open("ab") as log:
            process = subprocess.Popen(
                [sys.executable, "-m", "orion.cli.main", *arguments, "--stop-with-stdin"],
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=environment,
                start_new_session=True,
            )
        child = Child(name, process, log_path)
        self.children.append(child)
        return child

    def newly_ended(self) -> list[Child]:
        """Children that have ended since the last call."""
        ended = [child for child in self.children if not child.end_noticed and child.process.poll() is not None]
        for child in ended:
            child.end_noticed = True
        return ended

    def stop(self) -> None:
        """Asks every child to end, waits for all together at most `STOP_GRACE_S`, kills the rest."""
        alive = [child for child in self.children if child.process.poll() is None]
        for child in alive:
            child.process.send_signal(signal.SIGCONT)  # one that was stopped could not hear the next signal
            child.process.terminate()
        deadline_s = self.clock.monotonic_s() + STOP_GRACE_S
        for child in alive:
            try:
                child.process.wait(max(0.0, deadline_s - self.clock.monotonic_s()))
            except subprocess.TimeoutExpired:
                child.process.kill()
                child.process.wait()
        for child in self.children:
            if child.process.stdin is not None:
                child.process.stdin.close()


def stop_when_stdin_closes() -> None:
    """Called by a child: ends this process with SIGTERM once the launcher's end of the pipe is gone."""

    def watch() -> None:
        while os.read(0, 4096):
            pass
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=watch, name="stdin-watch", daemon=True).start()


def log_tail(child: Child, lines: int = 8) -> str:
    """The last lines a child wrote, for an error message."""
    return "\n".join(child.log_path.read_text(encoding="utf-8", errors="replace").splitlines()[-lines:])
