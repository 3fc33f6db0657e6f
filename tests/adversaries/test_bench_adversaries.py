"""The benchmark's quick part, as a person or continuous integration runs it: all bars hold."""

import json

import pytest
from typer.testing import CliRunner

from orion.cli.main import app


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_the_quick_benchmark_holds_all_bars() -> None:
    result = CliRunner().invoke(app, ["bench", "adversaries", "--quick", "--json"])
    assert result.exit_code == 0, result.output
    table = json.loads(result.stdout.splitlines()[-1])
    assert len(table["attacks"]) == 7
    assert table["honest_checks"] > 200
    assert table["honest_failed"] == 0
