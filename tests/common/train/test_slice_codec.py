"""Boundaries' maps kept dense within a partition: what is exact, what is written, and what is remembered."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from orion.common.config import RunSpec
from orion.common.errors import ConfigError
from orion.common.model.params import boundary_map_ranges, param_layout
from orion.common.model.sizes import boundary_maps_size
from orion.common.model.stage import Stage
from orion.common.train.compress import CodecName, DecodeError, codec_for
from orion.common.train.partition import partition_bounds
from orion.common.train.slice_codec import MixedCodec, error_state_part, slice_codec

LOSSY: tuple[CodecName, ...] = ("int8", "topk")


def make_spec(**changes: object) -> RunSpec:
    tree: dict[str, object] = {
        "run_id": "test",
        "seed": 1,
        "model": {"preset": "nano"},
        "data": {"sequence_length": 8, "sequences_per_microbatch": 2},
        "num_stages": 3,
        "replicas": 2,
        "outer_steps": 2,
        "inner_steps": 2,
        "microbatches_per_step": 2,
    }
    return RunSpec.parse({**tree, **changes}, "test")


@st.composite
def cuts(draw: st.DrawFn) -> tuple[Tensor, list[tuple[int, int]]]:
    """A vector, and ranges of it: none next to its ends, at them, or all of it."""
    num_values = draw(st.integers(1, 9000))
    places = sorted(draw(st.sets(st.integers(0, num_values), min_size=2, max_size=6)))
    ranges = list(zip(places[::2], places[1::2], strict=False))
    values_N = torch.randn(num_values, generator=torch.Generator().manual_seed(draw(st.integers(0, 999))))
    return values_N, ranges


@pytest.mark.parametrize("dense", ["none", "bf16"])
@pytest.mark.parametrize("name", LOSSY)
@given(cut=cuts())
@settings(max_examples=40, deadline=None)
def test_ranges_are_as_the_dense_codec_has_them_and_the_rest_as_if_they_were_not_there(
    name: CodecName, dense: CodecName, cut: tuple[Tensor, list[tuple[int, int]]]
) -> None:
    values_N, ranges = cut
    rest, mixed = codec_for(name), MixedCodec(codec_for(name), codec_for(dense), ranges)
    is_dense_N = torch.zeros_like(values_N, dtype=torch.bool)
    for start, end in ranges:
        is_dense_N[start:end] = True
    encoded = mixed.encode(values_N, None)
    read_N = mixed.decode(encoded.tensors, values_N.numel())

    exact_M = values_N[is_dense_N]
    assert torch.equal(read_N[is_dense_N], exact_M if dense == "none" else exact_M.bfloat16().float())
    sparse_N = values_N[~is_dense_N]
    if sparse_N.numel():
        alone = rest.encode(sparse_N, None)
        assert torch.equal(read_N[~is_dense_N], rest.decode(alone.tensors, sparse_N.numel()))
    # Exactly the announced bytes: those of the rest alone, and of each dense value its own.
    layout = mixed.layout(values_N.numel())
    assert {key: (tensor.dtype, tuple(tensor.shape)) for key, tensor in encoded.tensors.items()} == {
        key: (spec.dtype, spec.shape) for key, spec in layout.items()
    }
    rest_bytes = sum(spec.size_bytes for spec in rest.layout(sparse_N.numel()).values()) if sparse_N.numel() else 0
    dense_bytes = exact_M.numel() * (4 if dense == "none" else 2)
    assert sum(spec.size_bytes for spec in layout.values()) == rest_bytes + dense_bytes


@given(cut=cuts())
@settings(max_examples=40, deadline=None)
def test_only_the_rest_has_an_error_state(cut: tuple[Tensor, list[tuple[int, int]]]) -> None:
    values_N, ranges = cut
    mixed = MixedCodec(codec_for("topk"), codec_for("bf16"), ranges)
    first = mixed.encode(values_N, None)
    assert first.residual_N is not None
    assert torch.equal(error_state_part(mixed, first.residual_N), first.residual_N)
    for start, end in ranges:
        assert not first.residual_N[start:end].any()
    # What is not sent at first is offered again; what is dense does not change by it.
    second = mixed.encode(values_N, first.residual_N)
    assert torch.equal(second.tensors["dense"], first.tensors["dense"])


def test_the_maps_of_every_stage_are_found_and_no_token_table_is() -> None:
    spec = make_spec(codec="topk", codec_boundaries="bf16")
    for layout, size in zip(spec.layouts, spec.stage_sizes, strict=True):
        ranges = boundary_map_ranges(spec.model, layout)
        assert sum(end - start for start, end in ranges) == boundary_maps_size(spec.model, layout) < size / 50
        names = [place.name for place in param_layout(Stage(spec.model, layout)) if (place.start, place.end) in ranges]
        assert len(names) == len(ranges)
        assert all(name.endswith(("encoder.weight", "decoder.weight")) for name in names), names


@pytest.mark.parametrize("name", LOSSY)
@pytest.mark.parametrize("num_partitions", [1, 7, 300])
def test_partitions_put_together_hold_every_map_value(name: CodecName, num_partitions: int) -> None:
    """Whether a cut goes through a map, or a partition is nothing but a map."""
    spec = make_spec(codec=name, codec_boundaries="none", num_partitions=num_partitions)
    for stage_index, size in enumerate(spec.stage_sizes):
        values_N = torch.randn(size, generator=torch.Generator().manual_seed(stage_index))
        read = []
        for partition in partition_bounds(size, num_partitions):
            codec = slice_codec(spec, stage_index, partition)
            part_N = values_N[partition.start : partition.end]
            read.append(codec.decode(codec.encode(part_N, None).tensors, part_N.numel()))
        read_N = torch.cat(read)
        for start, end in boundary_map_ranges(spec.model, spec.layouts[stage_index]):
            assert torch.equal(read_N[start:end], values_N[start:end])


def test_without_the_key_a_slice_is_as_before_and_nonsense_is_refused() -> None:
    spec = make_spec(codec="int8")
    assert slice_codec(spec, 0, partition_bounds(spec.stage_sizes[0], 1)[0]) is codec_for("int8")
    with pytest.raises(ConfigError, match="codec_boundaries is for the codecs int8 and topk"):
        make_spec(codec="bf16", codec_boundaries="none")
    mixed = MixedCodec(codec_for("int8"), codec_for("none"), [(0, 4)])
    with pytest.raises(DecodeError, match="maps are missing"):
        mixed.decode(codec_for("int8").encode(torch.ones(8), None).tensors, 8)
