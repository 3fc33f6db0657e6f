"""The names in the documentation, the alerts and the Grafana dashboard are those that `/metrics` has."""

import json
import re
from pathlib import Path

import aiohttp
import pytest
from dashboard_kit import playing
from dashboard_story import tell_story
from prometheus_client.parser import text_string_to_metric_families

from orion.orchestrator import metrics

ROOT = Path(__file__).parents[2]
NAME = re.compile(r"\borion_[a-z_]+\b")


@pytest.fixture
async def families(tmp_path: Path) -> dict[str, set[str]]:
    """Every sample's name, with the labels that it has, of a run in which things have happened."""
    story = tell_story()
    async with playing(story, tmp_path, len(story.records)) as (_, url), aiohttp.ClientSession() as http:
        async with http.get(f"{url}/v1/status"):
            pass  # so that requests have been counted
        async with http.get(f"{url}/metrics") as answer:
            text = await answer.text()
    found: dict[str, set[str]] = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            found.setdefault(sample.name, set()).update(sample.labels)
    return found


async def test_figures_are_those_of_the_story(families: dict[str, set[str]]) -> None:
    assert families["orion_upload_seconds"] == {"stage", "which"}
    assert {"orion_busy_share", "orion_mfu", "orion_flops_per_second", "orion_notices_total"} <= families.keys()


@pytest.mark.parametrize("file", ["deploy/prometheus/alerts.yml", "deploy/grafana/orion.json"])
async def test_alerts_and_panels_ask_for_what_is_there(families: dict[str, set[str]], file: str) -> None:
    text = (ROOT / file).read_text(encoding="utf-8")
    if file.endswith(".json"):
        panels = json.loads(text)["panels"]
        expressions = [target["expr"] for panel in panels for target in panel["targets"]]
    else:
        expressions = re.findall(r"^ +expr: (.+)$", text, re.MULTILINE)
    assert len(expressions) > 10
    for expression in expressions:
        names = NAME.findall(expression)
        assert names or expression.startswith("up{"), expression
        assert families.keys() >= set(names), expression
        for name, matchers in re.findall(r"\b(orion_[a-z_]+)\{([^}]*)\}", expression):
            labels = set(re.findall(r"(\w+)[!=~]+\"", matchers))
            assert labels <= families[name], expression


async def test_what_is_there_is_documented(families: dict[str, set[str]]) -> None:
    names = {name for name in families if name.startswith("orion_") and not name.endswith("_created")}
    exported = {re.sub(r"_(bucket|count|sum)$", "", name) for name in names}
    for text in (metrics.__doc__ or "", (ROOT / "docs/orchestrator.md").read_text(encoding="utf-8")):
        told = set(NAME.findall(text))
        assert exported <= told, exported - told
