"""`orion plan`: one JSON object, or tables for people."""

import json
from pathlib import Path

from typer.testing import CliRunner

from orion.cli.main import app

RUNS = Path(__file__).parents[2] / "runs"


def test_the_plan_is_printed_as_one_object() -> None:
    command = ["plan", str(RUNS / "local.toml"), "--dtype", "float32", "--tflops", "0.05", "--json"]
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 0, result.output
    plan = json.loads(result.stdout.splitlines()[-1])
    assert plan["run_id"] == "local"
    assert plan["parameters"] == sum(stage["parameters"] for stage in plan["stages"])
    for stage in plan["stages"]:
        assert stage["device_total_bytes"] == sum(stage["device_bytes"].values())
        assert stage["host_total_bytes"] == sum(stage["host_bytes"].values())
        assert all(stage["fits"].values()), "a stage of the local run fits everywhere"
    middle = plan["stages"][1]
    sent_bits = 8 * (middle["activation_bytes"] + middle["gradient_bytes"])
    assert abs(middle["bandwidth_mbit_per_s"] * middle["microbatch_s"] * 1e6 - sent_bits) < 1


def test_the_plan_of_the_large_run_says_what_does_not_fit() -> None:
    result = CliRunner().invoke(app, ["plan", str(RUNS / "orion-100b.toml")])
    assert result.exit_code == 0, result.output
    assert "102.031 billion parameters" in result.stdout
    assert "A100 80 GB: too small for stages 0, 1" in result.stdout


def test_a_run_that_is_none_is_refused(tmp_path: Path) -> None:
    result = CliRunner().invoke(app, ["plan", str(tmp_path / "none.toml")])
    assert result.exit_code == 1
    assert "no run file" in str(result.exception)
