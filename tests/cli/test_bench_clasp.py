"""`orion bench clasp`, `monitor` and `archive`: one JSON object each."""

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
