"""`orion bench clasp`, `monitor`, `archive`, `engine` and `simulator`: one JSON object each."""

import json
from pathlib import Path

from typer.testing import CliRunner

from orion.cli.main import app


def test_the_study_is_printed_as_one_object() -> None:
    result = CliRunner().invoke(app, ["bench", "clasp", "--trials", "1", "--seed", "3", "--json"])
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout.splitlines()[-1])
    assert report["seed"] == 3
    assert {row["malicious"] for row in report["rows"]} == {"one", "two in different stages", "two in one stage"}
    assert all(row["num_trials"] == 1 for row in report["rows"])


def test_the_monitor_s_cost_is_printed_as_one_object() -> None:
    result = CliRunner().invoke(app, ["bench", "monitor", "--json"])
    assert result.exit_code == 0, result.output
    costs = json.loads(result.stdout.splitlines()[-1])["costs"]
    assert [cost["size_bytes"] for cost in costs] == [1 << 14, 1 << 21, 1 << 21]
    assert all(0 < cost["median_ms"] <= cost["ninth_decile_ms"] for cost in costs)


def test_the_archive_s_cost_is_printed_as_one_object_and_nothing_is_left(tmp_path: Path) -> None:
    result = CliRunner().invoke(app, ["bench", "archive", "--folder", str(tmp_path), "--json"])
    assert result.exit_code == 0, result.output
    cost = json.loads(result.stdout.splitlines()[-1])
    assert all(value > 0 for value in cost.values())
    assert list(tmp_path.iterdir()) == []


def test_the_simulator_s_cost_is_printed_as_one_object() -> None:
    command = ["bench", "simulator", "--stages", "2", "--replicas", "1", "--repetitions", "2", "--json"]
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 0, result.output
    cost = json.loads(result.stdout.splitlines()[-1])
    assert (cost["num_stages"], cost["replicas"], cost["repetitions"]) == (2, 1, 2)
    assert 0 < cost["cpu_s_per_outer_step_least"] <= cost["cpu_s_per_outer_step"] <= cost["cpu_s_per_outer_step_most"]
    assert cost["virtual_s_per_cpu_s"] > 0


def test_the_engine_s_cost_is_printed_as_one_object() -> None:
    result = CliRunner().invoke(app, ["bench", "engine", "--quick", "--repetitions", "2", "--json"])
    assert result.exit_code == 0, result.output
    stages = json.loads(result.stdout.splitlines()[-1])["stages"]
    assert [stage["stage"] for stage in stages] == [0, 1, 3]
    for stage in stages:
        ways = {way["way"]: way for way in stage["ways"]}
        assert ways.keys() == (
            {"plain", "kept graphs"} if stage["stage"] == 3 else {"plain", "kept graphs", "recompute"}
        )
        assert ways["plain"]["ratio"] == 1.0
        assert all(way["ratio"] > 0 and way["total_ms"] > 0 for way in ways.values())
