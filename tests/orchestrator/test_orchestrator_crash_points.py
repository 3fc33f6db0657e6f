"""Killed at any boundary and started again, the real loop on a real journal ends as if it never was."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from postgres import PostgresServer

SCRIPT = Path(__file__).with_name("crash_points.py")


def killed(folder: Path, timeout_s: float, **task: Any) -> int:
    """How often a run was killed that ended as it should."""
    task = {"folder": str(folder), "address": f"sqlite:///{folder / 'journal.sqlite'}", **task}
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-W", "error", str(SCRIPT), json.dumps(task)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=timeout_s, check=False, env=environment)
    assert result.returncode == 0, result.stderr[-10_000:]
    told: dict[str, int] = json.loads(result.stdout)
    return told["num_killed"]


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_a_run_whose_orchestrator_is_killed_again_and_again_ends_as_if_it_had_not_been(tmp_path: Path) -> None:
    spec = {"outer_steps": 3, "keep_outer_steps": 2}
    assert killed(tmp_path, 380, way="chain", seed=1, mean_fuse=42, snapshot_events=25, spec=spec) > 45


def test_so_does_one_whose_journal_is_on_a_server(tmp_path: Path, postgres: PostgresServer) -> None:
    spec = {"num_stages": 1, "replicas": 1, "outer_steps": 2, "keep_outer_steps": 2}
    task = {"address": postgres.address(), "snapshot_events": 15, "spec": spec}
    assert killed(tmp_path, 110, way="chain", seed=2, mean_fuse=20, **task) > 10


@pytest.mark.long
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("sync", ["blocking", "overlapped"])
def test_a_run_may_be_killed_at_every_one_of_its_boundaries(tmp_path: Path, sync: str) -> None:
    spec = {"outer_steps": 2, "keep_outer_steps": 2, "sync": sync}
    # One snapshot in a run: then its whole journal stays, for the core that is never restarted.
    assert killed(tmp_path, 1800, way="each", snapshot_events=100, spec=spec) > 300
