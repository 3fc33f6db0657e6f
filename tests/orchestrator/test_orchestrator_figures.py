"""Sizes and times of stages, and that they need no tensor library."""

import subprocess
import sys

import pytest
from orchestrator_world import make_spec

from orion.common.model.config import BoundaryKind, ModelConfig, preset_names
from orion.common.model.params import stage_num_params
from orion.common.model.sizes import stage_size
from orion.common.model.splits import stage_layouts
from orion.common.protocol.codec import body_size
from orion.common.train.partition import partition_bounds
from orion.common.train.slice_codec import slice_codec
from orion.orchestrator.figures import stage_figures

NANO = ModelConfig.preset("nano")
BOUNDARIES: list[tuple[BoundaryKind, dict[str, object]]] = [
    ("anchored", {}),
    ("anchored", {"anchor_rank": 4}),
    ("anchored", {"maps": "mlp"}),
    ("resbm", {}),
    ("resbm", {"maps": "mlp", "mlp_width": 24}),
    ("linear", {}),
    ("iota", {}),
    ("subspace", {}),
    ("none", {}),
]


@pytest.mark.parametrize(("kind", "options"), BOUNDARIES)
def test_the_formula_counts_the_modules_parameters(kind: BoundaryKind, options: dict[str, object]) -> None:
    config = NANO.with_boundary(kind, ratio=8, **options)
    for num_stages in (1, 2, 4):
        for layout in stage_layouts(config, num_stages):
            assert stage_size(config, layout) == stage_num_params(config, layout)


@pytest.mark.parametrize("name", preset_names())
def test_the_formula_holds_for_every_preset(name: str) -> None:
    config = ModelConfig.preset(name)
    layout = stage_layouts(config, 2)[1]
    assert stage_size(config, layout) == stage_num_params(config, layout)


def test_a_tied_head_is_counted_once() -> None:
    config = NANO.with_fields(tie_embeddings=True)
    (layout,) = stage_layouts(config, 1)
    assert stage_size(config, layout) == stage_num_params(config, layout)


def test_deadlines_follow_from_bytes_and_bandwidth() -> None:
    limits = {"transfer_grace_s": 10.0, "bandwidth_floor_bytes_per_s": 1e4}
    first, last = stage_figures(make_spec(time_limits=limits))
    assert first.upload_s == 10.0 + first.num_params * 4 / 1e4
    assert first.apply_s == first.upload_s
    assert first.checkpoint_s == 10.0 + first.num_params * 8 / 1e4
    assert last.reduce_s(4, 2) > last.reduce_s(2, 2) > last.reduce_s(2, 8)
    assert first.upload_s_at(2e4) == 10.0 + first.num_params * 4 / 2e4
    assert first.upload_s_at(1.0) == first.upload_s, "nobody is waited for longer by saying that it is slow"
    assert 10.0 < last.reduce_s(4, 2, 1e6, 1e6) < last.reduce_s(4, 2, 1e6) < last.reduce_s(4, 2)
    small = stage_figures(make_spec(time_limits=limits, codec="bf16"))[0]
    assert small.upload_s == 10.0 + first.num_params * 2 / 1e4
    assert small.contribution_bytes_max < first.contribution_bytes_max


@pytest.mark.parametrize("boundaries", [None, "bf16", "none"])
@pytest.mark.parametrize("codec", ["int8", "topk"])
def test_no_encoded_slice_is_larger_than_its_bound_and_all_together_take_what_is_planned(
    codec: str, boundaries: str | None
) -> None:
    spec = make_spec(codec=codec, codec_boundaries=boundaries, num_partitions=5)
    for stage_index, figures in enumerate(stage_figures(spec)):
        sizes = []
        for partition in partition_bounds(figures.num_params, spec.num_partitions):
            layout = slice_codec(spec, stage_index, partition).layout(partition.num_params)
            sizes.append(sum(tensor.size_bytes for tensor in layout.values()))
            assert body_size(layout) <= figures.contribution_bytes_max
        # Each partition fills up its last block of values.
        assert figures.encoded_bytes <= sum(sizes) <= figures.encoded_bytes + spec.num_partitions * 2 * 116


def test_a_microbatch_costs_three_forwards() -> None:
    first, _ = stage_figures(make_spec())
    double, _ = stage_figures(make_spec(data={"sequence_length": 16, "sequences_per_microbatch": 4}))
    assert double.microbatch_flops == 2 * first.microbatch_flops > 0


def test_the_core_loads_no_tensor_library_and_waits_for_nothing() -> None:
    heavy = "{'torch', 'numpy', 'fastapi', 'bittensor', 'aiohttp', 'sqlalchemy'}"
    code = f"import sys, orion.orchestrator.core; print(sorted({heavy} & {{*sys.modules}}))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.strip() == "[]"
