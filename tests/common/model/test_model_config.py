"""Presets and the checks that a model's configuration makes of itself."""

import subprocess
import sys

import pytest
from pydantic import ValidationError

from orion.common.errors import ConfigError
from orion.common.model.config import BoundaryConfig, ModelConfig, RopeScaling, preset_names


def test_every_preset_loads_under_its_own_name() -> None:
    assert set(preset_names()) == {"nano", "local", "1b", "3b", "8b", "15b", "21b", "45b", "100b"}
    for name in preset_names():
        assert ModelConfig.preset(name).name == name


def test_public_models_send_one_sixty_fourth_of_their_width() -> None:
    widths = {name: ModelConfig.preset(name).boundary_width for name in ("1b", "3b", "8b", "15b", "21b", "45b", "100b")}
    assert widths == {"1b": 32, "3b": 48, "8b": 64, "15b": 80, "21b": 80, "45b": 112, "100b": 144}


@pytest.mark.parametrize("name", ["huge", "", "../config", "nano.toml"])
def test_an_unknown_preset_is_answered_with_the_known_ones(name: str) -> None:
    with pytest.raises(ConfigError, match=r"100b.*15b.*local.*nano"):
        ModelConfig.preset(name)


def test_without_boundary_the_whole_stream_crosses() -> None:
    config = ModelConfig.preset("nano").with_boundary("none", ratio=7)
    assert config.boundary_width == config.width


@pytest.mark.parametrize(
    "wrong",
    [
        {"num_kv_heads": 3},
        {"head_dim": 15},
        {"boundary": {"ratio": 7}},
        {"boundary": {"anchor_rank": 65}},
        {"boundary": {"kind": "perfect"}},
        {"num_blocks": 0},
        {"dropout": 0.1},
    ],
)
def test_inconsistent_fields_are_refused(wrong: dict[str, object]) -> None:
    with pytest.raises(ConfigError, match="nano"):
        ModelConfig.preset("nano").with_fields(**wrong)


def test_a_config_does_not_change() -> None:
    config = ModelConfig.preset("nano")
    with pytest.raises(ValidationError, match="frozen"):
        config.width = 8  # type: ignore[misc]  # the point of the test


def test_rope_scaling_needs_a_ramp() -> None:
    with pytest.raises(ValidationError, match="high_freq_factor"):
        RopeScaling(factor=8.0, low_freq_factor=4.0, high_freq_factor=4.0, original_context_length=8192)


def test_a_config_survives_its_own_dump() -> None:
    config = ModelConfig.preset("local").with_fields(
        boundary=BoundaryConfig(kind="anchored", ratio=64, anchor_rank=16),
        rope_scaling=RopeScaling(factor=32.0, low_freq_factor=1.0, high_freq_factor=4.0, original_context_length=64),
    )
    assert ModelConfig.model_validate_json(config.model_dump_json()) == config


def test_planning_needs_no_torch() -> None:
    """Roles that only plan import shapes, splits and costs; torch would cost each of them a second and 200 MB."""
    modules = "orion.common.model.config, orion.common.model.splits, orion.common.model.flops"
    program = f"import sys, {modules}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0
