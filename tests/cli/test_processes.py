"""Real processes: whatever happens to the launcher, nothing is left behind."""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from orion.cli.processes import ProcessGroup, log_tail
from orion.common.clock import SystemClock

SERVER = ["devnet", "--port", "0"]
WAIT_S = 30.0


def environment() -> dict[str, str]:
    return dict(os.environ)


@pytest.fixture
def group(tmp_path: Path) -> Iterator[ProcessGroup]:
    group = ProcessGroup(tmp_path, SystemClock())
    yield group
    group.stop()


def test_stop_ends_children_even_one_that_hangs(group: ProcessGroup) -> None:
    child = group.start("server", SERVER, environment())
    hung = group.start("hung", SERVER, environment())
    hung.process.send_signal(signal.SIGSTOP)
    group.stop()
    assert child.process.returncode is not None
    assert hung.process.returncode is not None
    assert not psutil.pid_exists(child.process.pid)
    assert not psutil.pid_exists(hung.process.pid)


def test_an_ended_child_is_reported_once_with_its_log(group: ProcessGroup) -> None:
    child = group.start("broken", ["devnet", "--port", "99999"], environment())
    child.process.wait(WAIT_S)
    assert group.newly_ended() == [child]
    assert group.newly_ended() == []
    assert "Invalid value for" in log_tail(child, lines=20)


LAUNCHER = """
import os, sys
from pathlib import Path
from orion.cli.processes import ProcessGroup
from orion.common.clock import SystemClock
group = ProcessGroup(Path(sys.argv[1]), SystemClock())
child = group.start("server", sys.argv[2:], dict(os.environ))
print(child.process.pid, flush=True)
sys.stdin.read()
"""


def test_children_end_when_the_launcher_is_killed(tmp_path: Path) -> None:
    launcher = subprocess.Popen(
        [sys.executable, "-c", LAUNCHER, str(tmp_path), *SERVER], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert launcher.stdout is not None
    assert launcher.stdin is not None
    child = psutil.Process(int(launcher.stdout.readline()))
    launcher.kill()
    launcher.wait(WAIT_S)
    child.wait(WAIT_S)  # raises when it is still there
    launcher.stdin.close()
    launcher.stdout.close()
