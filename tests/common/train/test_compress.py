"""Codecs of pseudo-gradients: error bounds, error feedback, and refusal of what does not fit."""

import math
from typing import get_args

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from orion.common.train.compress import (
    INT8_BLOCK,
    TOPK_CHUNK,
    TOPK_KEPT,
    CodecName,
    DecodeError,
    PseudoGradientCodec,
    codec_for,
)

CODECS = [codec_for(name) for name in get_args(CodecName)]
EVERY_CODEC = pytest.mark.parametrize("codec", CODECS, ids=lambda codec: codec.name)


@st.composite
def vectors(draw: st.DrawFn) -> Tensor:
    """Lengths around the edges of blocks, magnitudes that differ by block, sometimes zeros."""
    num_values = draw(st.sampled_from([1, 5, INT8_BLOCK - 1, INT8_BLOCK, INT8_BLOCK + 1, TOPK_CHUNK, TOPK_CHUNK + 7]))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    values_N = torch.randn(num_values, generator=generator) * 10.0 ** draw(st.integers(-6, 3))
    values_N *= torch.randint(1, 100, (num_values,), generator=generator)
    if draw(st.booleans()):
        values_N[torch.rand(num_values, generator=generator) < 0.9] = 0.0
    return values_N


@EVERY_CODEC
@given(values_N=vectors())
@settings(max_examples=25, deadline=None)
def test_encoded_tensors_have_the_announced_layout(codec: PseudoGradientCodec, values_N: Tensor) -> None:
    encoded = codec.encode(values_N, None)

    layout = codec.layout(values_N.numel())
    assert {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in encoded.tensors.items()} == {
        name: (spec.dtype, spec.shape) for name, spec in layout.items()
    }
    decoded_N = codec.decode(encoded.tensors, values_N.numel())
    assert decoded_N.dtype == torch.float32
    assert decoded_N.shape == values_N.shape
    assert all(tensor.is_contiguous() for tensor in encoded.tensors.values())


@given(vectors())
@settings(deadline=None)
def test_none_is_exact_and_bf16_is_within_half_its_last_place(values_N: Tensor) -> None:
    exact, rounded = codec_for("none"), codec_for("bf16")

    assert torch.equal(exact.decode(exact.encode(values_N, None).tensors, values_N.numel()), values_N)
    decoded_N = rounded.decode(rounded.encode(values_N, None).tensors, values_N.numel())
    assert bool(((decoded_N - values_N).abs() <= values_N.abs() * 2.0**-8).all())


@given(vectors())
@settings(deadline=None)
def test_int8_is_within_half_a_level_of_its_block(values_N: Tensor) -> None:
    codec = codec_for("int8")

    decoded_N = codec.decode(codec.encode(values_N, None).tensors, values_N.numel())

    for start in range(0, values_N.numel(), INT8_BLOCK):
        block_n, decoded_n = values_N[start : start + INT8_BLOCK], decoded_N[start : start + INT8_BLOCK]
        bound = float(block_n.abs().max()) / 254 * (1 + 1e-4)
        assert float((decoded_n - block_n).abs().max()) <= bound


@given(vectors())
@settings(deadline=None)
def test_topk_keeps_the_largest_and_its_residual_is_what_is_missing(values_N: Tensor) -> None:
    codec = codec_for("topk")

    encoded = codec.encode(values_N, None)

    decoded_N = codec.decode(encoded.tensors, values_N.numel())
    assert encoded.residual_N is not None
    torch.testing.assert_close(decoded_N + encoded.residual_N, values_N)
    energy = float(values_N.double().square().sum())
    assert float(encoded.residual_N.double().square().sum()) <= energy * (1 + 1e-5)
    for start in range(0, values_N.numel(), TOPK_CHUNK):
        chunk_n, decoded_n = values_N[start : start + TOPK_CHUNK], decoded_N[start : start + TOPK_CHUNK]
        sent = decoded_n != 0
        assert int(sent.sum()) <= TOPK_KEPT
        if bool(sent.any()) and not bool(sent.all()):
            assert float(chunk_n[sent].abs().min()) >= float(chunk_n[~sent].abs().max())
        assert bool((decoded_n[sent].sign() * chunk_n[sent] >= 0).all())


def test_error_feedback_sends_everything_in_the_end() -> None:
    codec = codec_for("topk")
    generator = torch.Generator().manual_seed(3)
    direction_N = torch.randn(2 * TOPK_CHUNK, generator=generator)
    sent_N, residual_N = torch.zeros_like(direction_N), None

    for _ in range(400):
        encoded = codec.encode(direction_N, residual_N)
        sent_N += codec.decode(encoded.tensors, direction_N.numel())
        residual_N = encoded.residual_N

    once_N = codec.decode(codec.encode(direction_N, None).tensors, direction_N.numel())
    cosine_once, cosine_all = (
        float(torch.nn.functional.cosine_similarity(x_N, direction_N, dim=0)) for x_N in (once_N, sent_N)
    )
    assert cosine_once < 0.4
    assert cosine_all > 0.8


def test_topk_is_more_than_a_hundred_times_smaller_than_fp32() -> None:
    encoded = codec_for("topk").encode(torch.ones(10 * TOPK_CHUNK), None)

    size_bytes = sum(tensor.numel() * tensor.element_size() for tensor in encoded.tensors.values())
    assert 10 * TOPK_CHUNK * 4 / size_bytes > 130


@EVERY_CODEC
@pytest.mark.parametrize("bad_N", [torch.tensor([1.0, math.nan]), torch.zeros(2, 2), torch.zeros(2).double()])
def test_what_cannot_be_encoded_is_refused(codec: PseudoGradientCodec, bad_N: Tensor) -> None:
    with pytest.raises(ValueError, match=r"finite|flat fp32"):
        codec.encode(bad_N, None)


@EVERY_CODEC
def test_tensors_that_do_not_fit_are_refused(codec: PseudoGradientCodec) -> None:
    tensors = codec.encode(torch.ones(5000), None).tensors
    name, tensor = next(iter(tensors.items()))

    for wrong in (
        {},
        {**tensors, "more": tensor},
        {**tensors, name: tensor[:-1]},
        {**tensors, name: tensor.to(torch.float64)},
    ):
        with pytest.raises(DecodeError):
            codec.decode(wrong, 5000)
    with pytest.raises(DecodeError):
        codec.decode(tensors, 9000)


def test_values_that_are_not_finite_are_refused() -> None:
    values_N = torch.ones(5000)
    for name, field in (("none", "values"), ("bf16", "values"), ("int8", "scales"), ("topk", "magnitudes")):
        codec = codec_for(name)
        tensors = codec.encode(values_N.clone(), None).tensors
        tensors[field].view(-1)[0] = math.nan
        with pytest.raises(DecodeError, match="finite"):
            codec.decode(tensors, 5000)


def test_places_that_repeat_are_refused() -> None:
    codec = codec_for("topk")
    tensors = codec.encode(torch.ones(TOPK_CHUNK), None).tensors

    with pytest.raises(DecodeError, match="rise"):
        codec.decode({**tensors, "places": torch.zeros_like(tensors["places"])}, TOPK_CHUNK)


@given(st.binary(min_size=TOPK_CHUNK // 32, max_size=TOPK_CHUNK // 32))
@settings(deadline=None)
def test_any_bytes_decode_to_finite_values_or_are_refused(noise: bytes) -> None:
    codec = codec_for("topk")
    places = torch.frombuffer(bytearray(noise[:96]), dtype=torch.uint8)[None]
    codes = torch.frombuffer(bytearray(noise[96:112]), dtype=torch.uint8)[None]
    magnitudes = torch.frombuffer(bytearray(noise[112:116]), dtype=torch.bfloat16)[None]

    try:
        decoded_N = codec.decode({"places": places, "codes": codes, "magnitudes": magnitudes}, TOPK_CHUNK)
    except DecodeError:
        return
    assert bool(decoded_N.isfinite().all())
