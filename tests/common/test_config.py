"""The run specification: what it refuses, what it fills in, and when its digest changes."""

import json
from pathlib import Path
from typing import Any

import pytest

from orion.common.config import RunSpec
from orion.common.errors import ConfigError

RUNS = Path(__file__).parents[2] / "runs"


def tree(**changes: Any) -> dict[str, Any]:
    fields: dict[str, Any] = {
        "run_id": "small",
        "seed": 1,
        "num_stages": 2,
        "replicas": 2,
        "outer_steps": 3,
        "inner_steps": 4,
        "microbatches_per_step": 2,
        "model": {"preset": "nano"},
        "data": {"sequence_length": 32},
    }
    return {**fields, **changes}


def parse(**changes: Any) -> RunSpec:
    return RunSpec.parse(tree(**changes), "small.toml")


@pytest.mark.parametrize("path", sorted(RUNS.glob("*.toml")), ids=lambda path: path.name)
def test_the_runs_that_ship_are_valid(path: Path) -> None:
    assert RunSpec.load(path).run_id == path.stem


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"stage_count": 2}, "small.toml: stage_count: unknown key"),
        ({"time_limits": {"tarin_s": 1}}, "time_limits.tarin_s: unknown key"),
        ({"num_stages": 5}, "use fewer stages or a deeper model"),
        ({"data": {"sequence_length": 65}}, "exceeds the model's context"),
        ({"model": {"preset": "nano", "tie_embeddings": True}}, "tie_embeddings needs num_stages = 1"),
        ({"model": {"preset": "giant"}}, "no model preset 'giant'"),
        ({"checkpoint_every": 4, "keep_outer_steps": 4}, "keep_outer_steps must exceed checkpoint_every"),
        ({"seed": -1}, "small.toml: seed:"),
        ({"run_id": "Bad Name"}, "small.toml: run_id:"),
    ],
)
def test_each_mistake_is_named_with_its_place(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words.replace("'", ".")):
        parse(**changes)


def test_a_preset_can_be_changed_in_part() -> None:
    model = parse(model={"preset": "nano", "boundary": {"kind": "resbm"}}).model
    assert model.boundary.kind == "resbm"
    assert model.boundary.ratio == parse().model.boundary.ratio
    assert model.width == parse().model.width


def test_the_learning_rate_spans_the_run_unless_told_otherwise() -> None:
    assert parse().inner.schedule.num_total_steps == 12
    assert parse(outer_steps=100).inner.schedule.num_total_steps == 400
    assert parse(inner={"schedule": {"num_total_steps": 50}}).inner.schedule.num_total_steps == 50


def test_the_digest_follows_every_value_and_survives_a_round_trip() -> None:
    spec = parse()
    assert parse().digest == spec.digest
    assert parse(seed=2).digest != spec.digest
    assert parse(data_digest="0" * 64).digest != spec.digest
    assert parse(time_limits={"member_s": 7}).digest != spec.digest
    assert RunSpec.parse(spec.model_dump(mode="json"), "dump").digest == spec.digest


def test_a_file_is_read_as_toml_or_json_and_overridden_by_dotted_keys(tmp_path: Path) -> None:
    as_json = tmp_path / "run.json"
    as_json.write_text(json.dumps(tree()))
    spec = RunSpec.load(as_json, {"outer_steps": 9, "time_limits.run_s": 60.0})
    assert spec.outer_steps == 9
    assert spec.time_limits.run_s == 60.0


@pytest.mark.parametrize(("name", "text"), [("bad.toml", "run_id = "), ("bad.json", "{")])
def test_unreadable_files_are_one_clear_error(tmp_path: Path, name: str, text: str) -> None:
    path = tmp_path / name
    path.write_text(text)
    with pytest.raises(ConfigError, match=name):
        RunSpec.load(path)
    with pytest.raises(ConfigError, match="no run file"):
        RunSpec.load(tmp_path / "absent.toml")


def test_stage_sizes_sum_to_the_models() -> None:
    spec = parse(num_stages=3)
    assert len(spec.stage_sizes) == len(spec.layouts) == 3
    assert spec.layouts[0].first_block == 0
    assert spec.layouts[-1].end_block == spec.model.num_blocks
