"""`orion bench clasp`: one JSON object with a row for each setting."""

import json

from typer.testing import CliRunner

from orion.cli.main import app


def test_the_study_is_printed_as_one_object() -> None:
    result = CliRunner().invoke(app, ["bench", "clasp", "--trials", "1", "--seed", "3", "--json"])
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout.splitlines()[-1])
    assert report["seed"] == 3
    assert {row["malicious"] for row in report["rows"]} == {"one", "two in different stages", "two in one stage"}
    assert all(row["num_trials"] == 1 for row in report["rows"])
