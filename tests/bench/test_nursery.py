"""Workers that are forked from a process which has imported everything: they are what new interpreters would be."""

import os
import signal
from pathlib import Path

import pytest

from orion.bench.nursery import Nursery
from orion.bench.workers import BenchError, Workers
from orion.common.clock import SystemClock

pytestmark = pytest.mark.xdist_group("processes")

WORKER = """
import os, sys, time
from orion.bench.workers import say

def main():
    say(f"{sys.argv[1]} {os.environ.get('WORD')} {os.getpgid(0) == os.getpid()}")
    match sys.stdin.readline().strip():
        case "fail":
            raise RuntimeError("told to fail")
        case "leave":
            sys.exit(3)
"""


@pytest.fixture
def environment(tmp_path: Path) -> dict[str, str]:
    """Of an interpreter that finds the worker's module."""
    (tmp_path / "nursery_worker.py").write_text(WORKER)
    paths = [str(tmp_path), *os.environ.get("PYTHONPATH", "").split(os.pathsep)]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))}


def test_each_worker_has_its_own_argument_environment_files_and_end(
    environment: dict[str, str], tmp_path: Path
) -> None:
    with Nursery(["nursery_worker"], environment) as nursery, Workers(tmp_path, SystemClock(), nursery) as workers:
        one, two, three = (
            workers.start(name, "nursery_worker", name.upper(), environment={**environment, "WORD": name})
            for name in ("one", "two", "three")
        )
        workers.wait_until("starting", lambda: all(worker.output_lines() for worker in workers.started), 60)
        lines = [worker.output_lines() for worker in workers.started]
        assert lines == [["ONE one True"], ["TWO two True"], ["THREE three True"]]
        assert len({worker.process.pid for worker in workers.started}) == 3
        assert workers.cpu_s() >= 0.0
        one.tell("")
        assert one.process.wait(30) == 0
        two.tell("leave")
        assert two.process.wait(30) == 3
        assert three.process.poll() is None
        three.process.send_signal(signal.SIGKILL)
        assert three.process.wait(30) == -signal.SIGKILL


def test_a_worker_that_fails_is_shown_with_its_error(environment: dict[str, str], tmp_path: Path) -> None:
    with Nursery(["nursery_worker"], environment) as nursery, Workers(tmp_path, SystemClock(), nursery) as workers:
        workers.start("it", "nursery_worker", "", environment=environment).tell("fail")
        with pytest.raises(BenchError, match=r"it ended with 1:(.|\n)*RuntimeError: told to fail"):
            workers.wait_for_all(60)


def test_whoever_still_runs_is_stopped_in_the_end(environment: dict[str, str], tmp_path: Path) -> None:
    with Nursery(["nursery_worker"], environment) as nursery:
        with Workers(tmp_path, SystemClock(), nursery) as workers:
            worker = workers.start("it", "nursery_worker", "", environment=environment)
            workers.wait_until("starting", worker.output_lines, 60)
        assert worker.process.returncode == -signal.SIGTERM
