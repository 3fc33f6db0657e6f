"""Bodies: the same format as the safetensors library, and nothing hostile gets through."""

import json
import math

import pytest
import safetensors.torch
import torch
from blake3 import blake3
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from orion.common.config import RunSpec
from orion.common.ids import Direction
from orion.common.protocol.codec import (
    activation_spec,
    body_size,
    check_finite,
    checkpoint_spec,
    decode,
    encode,
    gradient_spec,
    mean_spec,
    transfer_spec,
)
from orion.common.protocol.messages import RefusalCode
from orion.common.protocol.refusals import RefusedError
from orion.common.train.compress import TensorSpec

LARGE = 1 << 30

DTYPES = (
    torch.float64,
    torch.float32,
    torch.float16,
    torch.bfloat16,
    torch.int64,
    torch.int32,
    torch.int16,
    torch.int8,
    torch.uint8,
)
names = st.text(st.characters(blacklist_categories=("Cs",)), min_size=1, max_size=20).filter(
    lambda name: name != "__metadata__"
)
specs = st.builds(TensorSpec, st.sampled_from(DTYPES), st.lists(st.integers(0, 5), max_size=4).map(tuple))
spec_sets = st.dictionaries(names, specs, max_size=5)


def tensors_of(wanted: dict[str, TensorSpec], seed: int) -> dict[str, Tensor]:
    """Any bits at all: also infinities and NaN must survive."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, spec in wanted.items():
        bits = torch.randint(0, 256, (max(spec.size_bytes, 1),), dtype=torch.uint8, generator=generator)
        tensors[name] = bits[: spec.size_bytes].view(spec.dtype).reshape(spec.shape)
    return tensors


def bits_of(tensor: Tensor) -> bytes:
    return bytes(tensor.contiguous().reshape(-1).view(torch.uint8).tolist())


def assert_same(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert found[name].dtype == tensor.dtype
        assert found[name].shape == tensor.shape
        assert bits_of(found[name]) == bits_of(tensor)


@given(spec_sets, st.integers(0, 2**31))
def test_what_was_encoded_is_decoded(wanted: dict[str, TensorSpec], seed: int) -> None:
    tensors = tensors_of(wanted, seed)
    body = encode(tensors)
    raw = body.tobytes()
    assert len(raw) == body.size_bytes == body_size(wanted)
    assert body.digest == blake3(raw).hexdigest()
    assert_same(decode(bytearray(raw), wanted, len(raw)), tensors)
    assert_same(decode(raw, None, len(raw)), tensors)


@given(spec_sets, st.integers(0, 2**31))
def test_the_library_reads_what_we_write(wanted: dict[str, TensorSpec], seed: int) -> None:
    tensors = tensors_of(wanted, seed)
    assert_same(safetensors.torch.load(encode(tensors).tobytes()), tensors)


@given(spec_sets, st.integers(0, 2**31), st.dictionaries(st.text(max_size=8), st.text(max_size=8), max_size=3))
def test_we_read_what_the_library_writes(wanted: dict[str, TensorSpec], seed: int, metadata: dict[str, str]) -> None:
    tensors = tensors_of(wanted, seed)
    raw = safetensors.torch.save(tensors, metadata or None)
    assert_same(decode(raw, wanted, len(raw)), tensors)


@given(spec_sets, st.integers(1, 100))
def test_chunks_are_the_body_in_order_and_bounded(wanted: dict[str, TensorSpec], chunk_bytes: int) -> None:
    body = encode(tensors_of(wanted, 0))
    chunks = list(body.chunks(chunk_bytes))
    assert b"".join(chunks) == body.tobytes()
    assert all(0 < len(chunk) <= chunk_bytes for chunk in chunks)


@given(st.binary(max_size=400))
def test_no_bytes_do_anything_but_decode_or_be_refused(raw: bytes) -> None:
    try:
        decode(raw, None, LARGE)
    except RefusedError as error:
        assert error.code in (RefusalCode.BAD_TENSOR, RefusalCode.TOO_LARGE)


@given(spec_sets.filter(bool), st.data())
def test_damaged_headers_decode_to_tensors_within_the_body_or_are_refused(
    wanted: dict[str, TensorSpec], data: st.DataObject
) -> None:
    raw = bytearray(encode(tensors_of(wanted, 1)).tobytes())
    position = data.draw(st.integers(0, len(raw) - 1))
    raw[position] = data.draw(st.integers(0, 255))
    try:
        tensors = decode(raw, None, LARGE)
    except RefusedError as error:
        assert error.code in (RefusalCode.BAD_TENSOR, RefusalCode.TOO_LARGE)
        return
    assert sum(tensor.nbytes for tensor in tensors.values()) <= len(raw)


def body_with_header(header: object, data_bytes: int = 8) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + bytes(data_bytes)


def entry(dtype: object = "F32", shape: object = (2,), offsets: object = (0, 8)) -> dict[str, object]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


@pytest.mark.parametrize(
    ("raw", "code"),
    [
        pytest.param(b"", RefusalCode.BAD_TENSOR, id="empty"),
        pytest.param((2**63).to_bytes(8, "little") + b"{}", RefusalCode.TOO_LARGE, id="huge header length"),
        pytest.param((500).to_bytes(8, "little") + b"{}", RefusalCode.BAD_TENSOR, id="header longer than body"),
        pytest.param(body_with_header(b"[" * 900_000), RefusalCode.BAD_TENSOR, id="deep nesting"),
        pytest.param(body_with_header(b'{"a":' * 100_000), RefusalCode.BAD_TENSOR, id="deep objects"),
        pytest.param(body_with_header(b"\xff\xfe"), RefusalCode.BAD_TENSOR, id="not UTF-8"),
        pytest.param(body_with_header([1]), RefusalCode.BAD_TENSOR, id="a list"),
        pytest.param(body_with_header({"x": 1}), RefusalCode.BAD_TENSOR, id="entry is a number"),
        pytest.param(
            body_with_header(b'{"x":%b,"x":%b}' % ((json.dumps(entry()).encode(),) * 2)),
            RefusalCode.BAD_TENSOR,
            id="duplicate name",
        ),
        pytest.param(
            body_with_header(b'{"x":{"dtype":"F32","dtype":"I32","shape":[2],"data_offsets":[0,8]}}'),
            RefusalCode.BAD_TENSOR,
            id="duplicate field",
        ),
        pytest.param(body_with_header({"x": {**entry(), "more": 1}}), RefusalCode.BAD_TENSOR, id="unknown field"),
        pytest.param(body_with_header({"x": entry(dtype="BOOL")}), RefusalCode.BAD_TENSOR, id="unknown dtype"),
        pytest.param(body_with_header({"x": entry(dtype=["F32"])}), RefusalCode.BAD_TENSOR, id="dtype is a list"),
        pytest.param(body_with_header({"x": entry(shape=[-2])}), RefusalCode.BAD_TENSOR, id="negative size"),
        pytest.param(body_with_header({"x": entry(shape=[True, 2])}), RefusalCode.BAD_TENSOR, id="true as a size"),
        pytest.param(body_with_header({"x": entry(shape=[2.0])}), RefusalCode.BAD_TENSOR, id="size is no integer"),
        pytest.param(body_with_header({"x": entry(shape=[2**70, 0])}), RefusalCode.BAD_TENSOR, id="size overflows"),
        pytest.param(body_with_header({"x": entry(shape=[1] * 9 + [2])}), RefusalCode.BAD_TENSOR, id="dimensions"),
        pytest.param(body_with_header({"x": entry(offsets=[-8, 0])}), RefusalCode.BAD_TENSOR, id="negative offset"),
        pytest.param(body_with_header({"x": entry(offsets=[8, 0])}), RefusalCode.BAD_TENSOR, id="end before start"),
        pytest.param(body_with_header({"x": entry(offsets=[0, 8, 8])}), RefusalCode.BAD_TENSOR, id="three offsets"),
        pytest.param(body_with_header({"x": entry(offsets=[4, 12])}), RefusalCode.BAD_TENSOR, id="gap before"),
        pytest.param(body_with_header({"x": entry()}, 12), RefusalCode.BAD_TENSOR, id="bytes nobody owns"),
        pytest.param(body_with_header({"x": entry()}, 4), RefusalCode.BAD_TENSOR, id="data missing"),
        pytest.param(body_with_header({"x": entry(shape=[3])}), RefusalCode.BAD_TENSOR, id="shape beyond its bytes"),
        pytest.param(
            body_with_header({"x": entry(), "y": entry()}), RefusalCode.BAD_TENSOR, id="two on the same bytes"
        ),
        pytest.param(
            body_with_header({"x": entry(), "y": entry(shape=[1], offsets=[4, 8])}),
            RefusalCode.BAD_TENSOR,
            id="one inside the other",
        ),
        pytest.param(body_with_header({"n" * 300: entry()}), RefusalCode.BAD_TENSOR, id="long name"),
        pytest.param(
            body_with_header({"__metadata__": {"a": 1}, "x": entry()}), RefusalCode.BAD_TENSOR, id="metadata of numbers"
        ),
        pytest.param(
            body_with_header(b'{"x":{"dtype":"F32","shape":[%b],"data_offsets":[0,8]}}' % (b"9" * 10_000)),
            RefusalCode.BAD_TENSOR,
            id="number of ten thousand digits",
        ),
    ],
)
def test_hostile_bodies_are_refused(raw: bytes, code: RefusalCode) -> None:
    with pytest.raises(RefusedError) as caught:
        decode(raw, None, LARGE)
    assert caught.value.code is code


EXPECTED = {"z": TensorSpec(torch.bfloat16, (2, 3)), "ids": TensorSpec(torch.int32, (2, 4))}


@pytest.mark.parametrize(
    "tensors",
    [
        {"z": torch.zeros(2, 3, dtype=torch.bfloat16)},
        {"z": torch.zeros(2, 3), "ids": torch.zeros(2, 4, dtype=torch.int32)},
        {"z": torch.zeros(3, 2, dtype=torch.bfloat16), "ids": torch.zeros(2, 4, dtype=torch.int32)},
        {"y": torch.zeros(2, 3, dtype=torch.bfloat16), "ids": torch.zeros(2, 4, dtype=torch.int32)},
        {
            "z": torch.zeros(2, 3, dtype=torch.bfloat16),
            "ids": torch.zeros(2, 4, dtype=torch.int32),
            "more": torch.zeros(1),
        },
    ],
    ids=["one missing", "other dtype", "other shape", "other name", "one too many"],
)
def test_only_the_expected_tensors_are_taken(tensors: dict[str, Tensor]) -> None:
    with pytest.raises(RefusedError) as caught:
        decode(encode(tensors).tobytes(), EXPECTED, LARGE)
    assert caught.value.code is RefusalCode.BAD_TENSOR


def test_a_body_beyond_its_limit_is_refused_before_its_header_is_read() -> None:
    with pytest.raises(RefusedError) as caught:
        decode(b"\xff" * 100, EXPECTED, 99)
    assert caught.value.code is RefusalCode.TOO_LARGE


def test_a_known_body_may_not_have_a_large_header() -> None:
    raw = safetensors.torch.save(tensors_of(EXPECTED, 0), {"padding": "x" * 10_000})
    with pytest.raises(RefusedError) as caught:
        decode(raw, EXPECTED, LARGE)
    assert caught.value.code is RefusalCode.TOO_LARGE


def test_tensors_are_views_of_a_writable_buffer() -> None:
    buffer = bytearray(encode({"x": torch.zeros(4)}).tobytes())
    tensor = decode(buffer, None, LARGE)["x"]
    buffer[-4:] = torch.ones(1).numpy().tobytes()
    assert tensor.tolist() == [0, 0, 0, 1]


def test_encoding_aliases_contiguous_tensors_and_copies_the_others() -> None:
    contiguous, strided = torch.zeros(4), torch.arange(12.0).reshape(3, 4).t()
    body = encode({"a": contiguous, "b": strided})
    contiguous[0] = 1
    found = decode(body.tobytes(), None, LARGE)
    assert found["a"].tolist() == [1, 0, 0, 0]
    assert torch.equal(found["b"], strided)


def test_what_the_format_lacks_is_our_mistake() -> None:
    for tensors in (
        {"x": torch.zeros(2, dtype=torch.complex64)},
        {"__metadata__": torch.zeros(1)},
        {"x": torch.zeros((1,) * 9)},
        {"x": torch.zeros(1, device="meta")},
    ):
        with pytest.raises(ValueError, match="tensor '"):
            encode(tensors)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_infinities_are_found_wherever_they_are(bad: float, dtype: torch.dtype) -> None:
    tensor = torch.full((7, 5), torch.finfo(dtype).max, dtype=dtype)
    check_finite({"x": tensor, "ids": torch.zeros(3, dtype=torch.int32), "none": torch.empty(0)})
    tensor[4, 2] = bad
    with pytest.raises(RefusedError) as caught:
        check_finite({"x": tensor})
    assert caught.value.code is RefusalCode.NOT_FINITE


def test_the_run_says_what_a_transfer_holds(spec: RunSpec) -> None:
    num_sequences, num_tokens = spec.data.sequences_per_microbatch, spec.data.sequence_length
    z = TensorSpec(torch.float32, (num_sequences, num_tokens, spec.model.boundary_width))
    assert activation_spec(spec, 1) == {"z": z, "ids": TensorSpec(torch.int32, (num_sequences, num_tokens + 1))}
    assert gradient_spec(spec, 0) == {"g": z}
    assert transfer_spec(spec, Direction.ACTIVATION, 1) == activation_spec(spec, 1)
    assert transfer_spec(spec, Direction.GRADIENT, 0) == gradient_spec(spec, 0)
    narrow = spec.model_copy(update={"wire_dtype": "bfloat16"})
    assert gradient_spec(narrow, 0)["g"].dtype is torch.bfloat16


def test_ends_of_the_pipeline_take_nothing_from_beyond(spec: RunSpec) -> None:
    last = spec.num_stages - 1
    for direction, stage in (
        (Direction.ACTIVATION, 0),
        (Direction.ACTIVATION, last + 1),
        (Direction.GRADIENT, last),
        (Direction.GRADIENT, -1),
    ):
        with pytest.raises(RefusedError) as caught:
            transfer_spec(spec, direction, stage)
        assert caught.value.code is RefusalCode.WRONG_STAGE


def test_objects_hold_flat_fp32() -> None:
    flat = TensorSpec(torch.float32, (10,))
    assert mean_spec(10) == {"mean": flat}
    assert checkpoint_spec(10) == {"anchor": flat, "momentum": flat}
