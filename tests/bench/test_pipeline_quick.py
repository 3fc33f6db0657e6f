"""The whole pipeline benchmark, on a toy: every system as the processes that it is measured as."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300), pytest.mark.xdist_group("processes")]


def test_every_system_trains_the_same_tokens_to_the_same_loss(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "orion.cli.main", "bench", "pipeline", "--quick", "--json"]
    result = subprocess.run(
        [*command, "--folder", str(tmp_path)], capture_output=True, text=True, timeout=280, check=False
    )
    assert result.returncode == 0, result.stderr
    (line,) = result.stdout.splitlines()
    (row,) = json.loads(line)["settings"]
    assert row["name"] == "unshaped"
    assert all(row["tokens_per_s"][name] > 0 for name in ("single", "torch_1f1b", "torch_1f1b_boundary", "orion"))
    loss = row["loss"]
    assert loss["torch_1f1b"] == pytest.approx(loss["single"], abs=0.02), "clipping alone differs"
    assert loss["orion"] == pytest.approx(loss["single"], abs=0.1)
