"""`orion bench transport`: everything arrives by every way, and the bars are judged by the figures."""

import json

from typer.testing import CliRunner

from orion.bench.transport.study import IN_FLIGHT, Repetition, Study
from orion.cli.main import app


def test_the_quick_benchmark_sends_by_every_way_and_prints_one_object() -> None:
    result = CliRunner().invoke(app, ["bench", "transport", "--quick", "--json"])
    assert result.exit_code == 0, result.exception
    report = json.loads(result.stdout.splitlines()[-1])
    assert report["size_bytes"] == 2_336_192
    for figures in (report, report["several_at_a_time"]):
        assert min(figures[f"{way}_mb_per_s"] for way in ("orion", "http", "socket")) > 0
        assert figures["cpu_ms_per_activation"].keys() == {"client", "server"}
        assert 0 < figures["p50_ms"] <= figures["p99_ms"]


def study(orion_mb_per_s: float, client_cpu_ms: float, server_cpu_ms: float) -> Study:
    bare = Repetition(1000.0, 0.1, 0.1, 1.0, 1.0)
    ours = Repetition(orion_mb_per_s, client_cpu_ms, server_cpu_ms, 1.0, 1.0)
    ways = {"socket": [bare] * 3, "http": [bare] * 3, "orion": [ours] * 3}
    return Study(1, 8, dict.fromkeys(IN_FLIGHT, ways))


def test_each_bar_is_judged() -> None:
    assert study(500.0, 2.0, 2.0).faults() == []
    assert len(study(499.0, 2.0, 2.0).faults()) == 1
    assert len(study(500.0, 2.1, 2.0).faults()) == 1
    assert len(study(400.0, 2.1, 2.1).faults()) == 3
