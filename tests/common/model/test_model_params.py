"""Counts, first values, the flat vector and the optimizer's choice of matrices."""

import pytest
import torch
from blake3 import blake3
from hypothesis import given, settings
from hypothesis import strategies as st

from orion.common.model.config import BoundaryKind, ModelConfig
from orion.common.model.params import (
    flatten_params,
    init_params,
    load_flat_params,
    matrix_params,
    num_params,
    param_layout,
    stage_num_params,
)
from orion.common.model.splits import stage_layouts
from orion.common.model.stage import Stage, Transformer

NANO = ModelConfig.preset("nano")
KINDS: tuple[BoundaryKind, ...] = ("anchored", "resbm", "linear", "iota", "subspace", "none")


@pytest.mark.parametrize(
    ("name", "count"), [("100b", 99_615_863_808), ("15b", 15_076_418_560), ("21b", 21_446_661_120)]
)
def test_public_parameter_counts(name: str, count: int) -> None:
    assert num_params(ModelConfig.preset(name), num_stages=16, with_boundaries=False) == count


def test_public_count_of_the_test_bed_includes_six_bottleneck_matrices() -> None:
    config = ModelConfig.preset("1b").with_boundary("iota", ratio=16)
    # The public module creates a decoder in both sending blocks too, and never uses it; this one does not.
    unused = 2 * config.width * config.boundary_width
    assert num_params(config, num_stages=3) + unused == 1_500_055_552


def test_public_size_of_the_test_beds_last_stage() -> None:
    config = ModelConfig.preset("1b").with_boundary("iota", ratio=64)
    assert stage_num_params(config, stage_layouts(config, 3)[-1]) == 506_021_888


def test_the_local_model_has_between_five_and_seven_million_parameters() -> None:
    assert 5_000_000 <= num_params(ModelConfig.preset("local"), num_stages=3) <= 7_000_000


@pytest.mark.parametrize("kind", KINDS)
def test_counting_without_allocating_agrees_with_what_is_allocated(kind: BoundaryKind) -> None:
    config = NANO.with_boundary(kind, ratio=8)
    assert num_params(config, 3) == sum(param.numel() for param in Transformer(config, 3).parameters())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("num_stages", [2, 3])
def test_stages_start_with_the_values_of_the_whole_model(kind: BoundaryKind, num_stages: int) -> None:
    config = NANO.with_boundary(kind, ratio=8)
    whole = Transformer(config, num_stages)
    init_params(whole, seed=5)
    expected = dict(whole.named_parameters())
    seen: set[str] = set()
    for layout in whole.layouts:
        stage = Stage(config, layout)
        init_params(stage, seed=5)
        for name, param in stage.named_parameters():
            assert torch.equal(param, expected[name]), name
            assert name not in seen, "a parameter belongs to one stage"
            seen.add(name)
    assert seen == expected.keys()


def test_first_values_are_the_same_bytes_on_every_machine() -> None:
    model = Transformer(NANO, 2)
    init_params(model, seed=0)
    assert blake3(flatten_params(model).numpy().tobytes()).hexdigest()[:16] == "4c8c7a58944ada13"
    first = flatten_params(model)
    init_params(model, seed=1)
    assert not torch.equal(first, flatten_params(model))


def test_first_values_have_mean_zero_and_their_layers_deviation() -> None:
    model = Transformer(NANO, 2)
    init_params(model, seed=0)
    gate = model.get_parameter("blocks.1.ffn.gate.weight").detach()
    assert float(gate.mean()) == pytest.approx(0.0, abs=0.005)
    assert float(gate.std()) == pytest.approx(NANO.width**-0.5, rel=0.02)
    assert torch.equal(model.get_parameter("norm.weight"), torch.ones(NANO.width))


def test_drawing_in_pieces_gives_the_same_values(monkeypatch: pytest.MonkeyPatch) -> None:
    model = Transformer(NANO, 2)
    init_params(model, seed=0)
    whole = flatten_params(model)
    monkeypatch.setattr("orion.common.model.params._DRAWS_AT_ONCE", 1000)
    init_params(model, seed=0)
    assert torch.equal(flatten_params(model), whole)


@settings(max_examples=10, deadline=None)
@given(num_stages=st.integers(1, 4), kind=st.sampled_from(KINDS))
def test_the_layout_covers_the_flat_vector_exactly_once(num_stages: int, kind: BoundaryKind) -> None:
    config = NANO.with_boundary(kind, ratio=8)
    for layout in stage_layouts(config, num_stages):
        stage = Stage(config, layout)
        places = param_layout(stage)
        assert places[0].start == 0
        assert [place.start for place in places[1:]] == [place.end for place in places[:-1]]
        assert [place.name for place in places] == [name for name, _ in stage.named_parameters()]
        assert places[-1].end == stage_num_params(config, layout)


def test_a_flat_vector_goes_in_and_comes_out() -> None:
    stage = Stage(NANO, stage_layouts(NANO, 2)[1])
    values_N = torch.arange(param_layout(stage)[-1].end, dtype=torch.float32)
    load_flat_params(stage, values_N)
    assert torch.equal(flatten_params(stage), values_N)
    place = next(place for place in param_layout(stage) if place.name == "blocks.3.ffn.up.weight")
    assert torch.equal(stage.get_parameter(place.name).flatten(), values_N[place.start : place.end])


def test_a_flat_vector_of_another_length_is_refused() -> None:
    stage = Stage(NANO, stage_layouts(NANO, 2)[1])
    with pytest.raises(ValueError, match="parameters"):
        load_flat_params(stage, torch.zeros(param_layout(stage)[-1].end + 1))


def test_muon_takes_matrices_between_hidden_layers_only() -> None:
    config = NANO.with_boundary("anchored", ratio=8, anchor_rank=4)
    taken = matrix_params(Transformer(config, 2))
    blocks = {
        f"blocks.{block}.{part}.weight"
        for block in range(config.num_blocks)
        for part in (*(f"attention.{matrix}" for matrix in "qkvo"), "ffn.gate", "ffn.up", "ffn.down")
    }
    assert taken == blocks | {"boundaries.0.sender.encoder.weight", "boundaries.0.receiver.decoder.weight"}
