"""The sync benchmark: what its plan says of bytes, and all of it once with a small stage and real processes."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from orion.bench.sync.plan import SETTINGS, Fault, Row, Setting, floor_bytes, misses, scheme_bytes


def test_bytes_of_the_scheme() -> None:
    assert floor_bytes(100) == 150
    assert scheme_bytes(100) == (125, 200)
    assert scheme_bytes(100, replicas=2) == (150, 100)
    assert Setting("x", 100.0, 200.0).floor_s(100_000_000) == pytest.approx(12.0)
    assert Setting("x").floor_s(1) is None


def test_every_fault_is_measured_and_the_slow_peer_is_slower() -> None:
    assert {setting.fault for setting in SETTINGS} == set(Fault)
    setting = next(item for item in SETTINGS if item.fault is Fault.SLOW)
    slow, *others = setting.profiles(is_slow=True)
    assert slow.upload_mbit == 10.0 and others[0].upload_mbit == 100.0 and others[-1].upload_mbit is None


def test_bars() -> None:
    def row(fault: Fault, seconds: float, ratio: float | None = None, bytes_up: float | None = None) -> Row:
        return Row("100", fault, seconds, (seconds,), 12.0, ratio, bytes_up, None, None)

    assert misses([row(Fault.NONE, 13.0, 1.08), row(Fault.SLOW, 18.0)], 5.0) == []
    assert len(misses([row(Fault.NONE, 14.0, 1.17), row(Fault.SLOW, 20.0)], 5.0)) == 2
    assert misses([row(Fault.NONE, 13.0, 1.08, bytes_up=126.0)], 5.0, stage_bytes=100) == []
    assert len(misses([row(Fault.NONE, 13.0, 1.08, bytes_up=60.0)], 5.0, stage_bytes=100)) == 1


@pytest.mark.slow
@pytest.mark.timeout(200)
@pytest.mark.xdist_group("processes")
def test_replicas_of_a_small_stage_synchronise(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "orion.cli.main", "bench", "sync", "--quick", "--json"]
    result = subprocess.run(
        [*command, "--folder", str(tmp_path)], capture_output=True, text=True, timeout=180, check=False
    )
    assert result.returncode == 0, result.stderr
    (line,) = result.stdout.splitlines()
    report = json.loads(line)
    (row,) = report["settings"]
    assert row["name"] == "unshaped" and row["anchors_equal"] and row["notices"] == []
    assert row["seconds"] > 0 and row["gloo_s"] > 0
