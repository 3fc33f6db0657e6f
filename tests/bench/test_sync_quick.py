"""The sync benchmark: what its plan says of bytes, and all of it once with a small stage and real processes."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from orion.bench.sync.plan import SETTINGS, Fault, Row, Setting, delay_s, floor_bytes, misses, scheme_bytes


def test_bytes_of_the_scheme() -> None:
    assert floor_bytes(100) == 150
    assert scheme_bytes(100) == (125, 200)
    assert scheme_bytes(100, replicas=2) == (150, 100)
    assert Setting("x", 100.0, 200.0).floor_s(100_000_000) == pytest.approx(12.0)
    assert Setting("x").floor_s(1) is None


def test_every_fault_is_measured_where_links_can_be_slowed_down() -> None:
    assert {setting.fault for setting in SETTINGS} == set(Fault)
    setting = next(item for item in SETTINGS if item.fault is Fault.SLOW)
    *replicas, store = setting.profiles
    assert {profile.upload_mbit for profile in replicas} == {100.0} and store.upload_mbit is None
    assert not any(profile.needs_switch for profile in setting.profiles)


def test_what_a_fault_delays_is_told_beside_the_same_links_without_one() -> None:
    rows = [Row(name, fault, seconds, (seconds,), None, None, None, None, None) for name, fault, seconds in ROWS]
    assert [delay_s(row, rows) for row in rows] == [None, None, 2.5, None]


ROWS = [("100", Fault.NONE, 12.0), ("856", Fault.NONE, 2.0), ("100", Fault.LIAR, 14.5), ("unshaped", Fault.SLOW, 9.0)]


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
