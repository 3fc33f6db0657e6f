"""Tensors as bodies: the safetensors format, written and read without copying tensor data.

Owns the format and what each kind of body must hold. Pure: never touches a socket or a file. What arrives is hostile
until proven otherwise: its header is bounded and checked wholly (names, dtypes, shapes, offsets that cover the data
exactly once) before a byte of tensor data is looked at. Whatever is wrong raises `RefusedError`.

Letters in shapes: B sequences, T tokens, C boundary width, N flat parameters.
"""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from types import MappingProxyType
from typing import Any

import torch
from blake3 import blake3
from torch import Tensor

from orion.common.config import RunSpec
from orion.common.ids import Digest, Direction
from orion.common.protocol.messages import RefusalCode
from orion.common.protocol.refusals import RefusedError, refused
from orion.common.train.compress import TensorSpec, all_finite

CHUNK_BYTES = 256 * 1024
"""What is handed to a socket at a time: one large bytes object costs several times the CPU of chunks of this size."""

_LENGTH_BYTES = 8
_ALIGNMENT_BYTES = 8
_HEADER_BYTES_MAX = 1 << 20
"""Header of a body about which nothing is known beforehand."""
_HEADER_SLACK_BYTES = 4096
"""What another writer's header may have beyond ours when the tensors are known: metadata, spaces, key order."""
_NAME_CHARS_MAX = 256
_DIMENSIONS_MAX = 8
_METADATA_KEY = "__metadata__"
_LAYOUTS_KEPT = 256
"""A run has a handful of different bodies, and each is asked for with every tensor that moves."""

_DTYPE_BY_TAG = MappingProxyType(
    {
        "F64": torch.float64,
        "F32": torch.float32,
        "F16": torch.float16,
        "BF16": torch.bfloat16,
        "I64": torch.int64,
        "I32": torch.int32,
        "I16": torch.int16,
        "I8": torch.int8,
        "U8": torch.uint8,
    }
)
_TAG_BY_DTYPE = MappingProxyType({dtype: tag for tag, dtype in _DTYPE_BY_TAG.items()})


@dataclass(frozen=True, slots=True, eq=False)
class Body:
    """An encoded set of tensors. Aliases their memory: they must not be written to while it is in use."""

    header: bytes
    """Length field and JSON header."""
    parts: tuple[memoryview, ...]
    """The tensors' bytes, in the order of the header."""
    size_bytes: int
    digest: Digest
    """blake3 over all of it."""

    def chunks(self, chunk_bytes: int = CHUNK_BYTES) -> Iterator[bytes | memoryview]:
        """The body in order, in pieces of at most `chunk_bytes`."""
        for part in (memoryview(self.header), *self.parts):
            for start in range(0, len(part), chunk_bytes):
                yield part[start : start + chunk_bytes]

    def tobytes(self) -> bytes:
        """A copy of the whole body; for small bodies and tests."""
        return b"".join((self.header, *self.parts))


def encode(tensors: Mapping[str, Tensor]) -> Body:
    """A body that holds the named CPU tensors; those that aren't contiguous are copied, the others aliased.

    Tensors are laid out by falling element size, then name, so that each lies aligned. Raises ValueError for a dtype
    that the format lacks or a tensor that isn't in host memory.
    """
    for name, tensor in tensors.items():
        if tensor.device.type != "cpu":
            raise ValueError(f"tensor {name!r} lies on {tensor.device}; move it to host memory first")
    header = _header({name: TensorSpec(tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()})
    order = sorted(tensors, key=lambda name: _layout_key(name, tensors[name].dtype))
    parts = tuple(_bytes_of(tensors[name]) for name in order)
    hasher = blake3(header)
    for part in parts:
        hasher.update(part)
    return Body(header, parts, len(header) + sum(map(len, parts)), Digest(hasher.hexdigest()))


def body_size(expected: Mapping[str, TensorSpec]) -> int:
    """Size in bytes of what `encode` makes of such tensors, so that a receiver knows it before anything arrives."""
    return len(_header(expected)) + sum(spec.size_bytes for spec in expected.values())


def decode(
    buffer: bytes | bytearray | memoryview, expected: Mapping[str, TensorSpec] | None, size_bytes_max: int
) -> dict[str, Tensor]:
    """The tensors in a body, as views of a writable `buffer` (of a copy where it is read-only or misaligned).

    `expected` names exactly the tensors that must be there; None takes whatever the body says. Raises RefusedError:
    TOO_LARGE for more than `size_bytes_max` or an oversized header, BAD_TENSOR for everything else that is wrong.
    Says nothing about the values: see `check_finite`.
    """
    view = memoryview(buffer).cast("B")
    if len(view) > size_bytes_max:
        raise refused(RefusalCode.TOO_LARGE, f"body has {len(view)} bytes, at most {size_bytes_max} are taken")
    if expected is not None:
        layout = _layout(tuple(expected.items()))
        if len(view) == body_size(expected) and view[: len(layout.header)] == layout.header:
            # Our own words, and every length is right: there is nothing left to find out.
            data = _writable(view[len(layout.header) :])
            return {name: _tensor(data[begin:end], spec) for name, spec, begin, end in layout.tensors}
    header_end = _header_end(view, expected)
    tensors = _parse_header(bytes(view[_LENGTH_BYTES:header_end]))
    if expected is not None:
        _check_expected(tensors, expected)
    _check_coverage(tensors, len(view) - header_end)
    data = _writable(view[header_end:])
    return {name: _tensor(data[begin:end], spec) for name, (spec, begin, end) in tensors.items()}


def received_body(buffer: bytearray | memoryview, expected: Mapping[str, TensorSpec], digest: Digest) -> Body:
    """A body that was received, and whose digest was checked, as one to hand on: without hashing or copying again.

    Whoever keeps it can show it as its own encoding of these tensors, so it must be laid out exactly as `encode` does
    it. Raises RefusedError BAD_TENSOR otherwise.
    """
    header = _header(expected)
    view = memoryview(buffer)
    if view[: len(header)] != header or len(view) != body_size(expected):
        raise refused(RefusalCode.BAD_TENSOR, "the body is not in the canonical layout")
    return Body(header, (view[len(header) :],), len(view), digest)


def check_finite(tensors: Mapping[str, Tensor]) -> None:
    """Raises RefusedError NOT_FINITE when any floating-point element is infinite or not a number."""
    for name, tensor in tensors.items():
        if not all_finite(tensor):
            raise refused(RefusalCode.NOT_FINITE, f"tensor {name!r} has elements that are not finite")


# --- what each body holds ---------------------------------------------------------------------------------------------


def activation_spec(spec: RunSpec, stage: int) -> dict[str, TensorSpec]:
    """Body of an activation on its way to `stage`: the narrow tensor `z` (B×T×C) and `ids` (int32, B×(T+1)).

    Raises RefusedError WRONG_STAGE for a stage that receives no activations.
    """
    if not 0 < stage < spec.num_stages:
        raise refused(RefusalCode.WRONG_STAGE, f"stage {stage} receives no activations")
    num_sequences, num_tokens = spec.data.sequences_per_microbatch, spec.data.sequence_length
    return {"z": _narrow(spec), "ids": TensorSpec(torch.int32, (num_sequences, num_tokens + 1))}


def gradient_spec(spec: RunSpec, stage: int) -> dict[str, TensorSpec]:
    """Body of an activation gradient on its way to `stage`: `g`, shaped as the activation's `z`.

    Raises RefusedError WRONG_STAGE for a stage that receives no gradients.
    """
    if not 0 <= stage < spec.num_stages - 1:
        raise refused(RefusalCode.WRONG_STAGE, f"stage {stage} receives no gradients")
    return {"g": _narrow(spec)}


def transfer_spec(spec: RunSpec, direction: Direction, to_stage: int) -> dict[str, TensorSpec]:
    """What the body of a Transfer must hold. Raises RefusedError WRONG_STAGE."""
    if direction is Direction.ACTIVATION:
        return activation_spec(spec, to_stage)
    return gradient_spec(spec, to_stage)


def mean_spec(num_params: int) -> dict[str, TensorSpec]:
    """Object of a merged partition: `mean`, the fp32 mean pseudo-gradient of its N parameters."""
    return {"mean": TensorSpec(torch.float32, (num_params,))}


def error_spec(num_params: int) -> dict[str, TensorSpec]:
    """A miner's error state: `error`, fp32, what its uploads have lost and the next one adds, of N parameters."""
    return {"error": TensorSpec(torch.float32, (num_params,))}


def checkpoint_spec(num_params: int) -> dict[str, TensorSpec]:
    """Object of a stage's checkpoint: `anchor` and `momentum`, fp32, N each. Its outer step is in its CheckpointRef."""
    flat = TensorSpec(torch.float32, (num_params,))
    return {"anchor": flat, "momentum": flat}


def _narrow(spec: RunSpec) -> TensorSpec:
    dtype = {"float32": torch.float32, "bfloat16": torch.bfloat16}[spec.wire_dtype]
    shape = (spec.data.sequences_per_microbatch, spec.data.sequence_length, spec.model.boundary_width)
    return TensorSpec(dtype, shape)


# --- the format -------------------------------------------------------------------------------------------------------

_Tensors = dict[str, tuple[TensorSpec, int, int]]
"""Name to what the header claims and the half-open byte range it points at."""


def _layout_key(name: str, dtype: torch.dtype) -> tuple[int, str]:
    return -dtype.itemsize, name


def _header(tensors: Mapping[str, TensorSpec]) -> bytes:
    return _layout(tuple(tensors.items())).header


@dataclass(frozen=True, slots=True)
class _Layout:
    """How `encode` lays out some tensors."""

    header: bytes
    tensors: "tuple[tuple[str, TensorSpec, int, int], ...]"
    """Name, dtype and shape, and the half-open range of the data's bytes."""


@lru_cache(maxsize=_LAYOUTS_KEPT)
def _layout(tensors: tuple[tuple[str, TensorSpec], ...]) -> _Layout:
    entries: dict[str, Any] = {}
    places: list[tuple[str, TensorSpec, int, int]] = []
    offset = 0
    for name, spec in sorted(tensors, key=lambda item: _layout_key(item[0], item[1].dtype)):
        if spec.dtype not in _TAG_BY_DTYPE:
            raise ValueError(f"tensor {name!r} has dtype {spec.dtype}, which bodies cannot hold")
        if name == _METADATA_KEY or len(name) > _NAME_CHARS_MAX or len(spec.shape) > _DIMENSIONS_MAX:
            raise ValueError(f"tensor {name[:_NAME_CHARS_MAX]!r} has a name or a shape that bodies cannot hold")
        end = offset + spec.size_bytes
        entries[name] = {"dtype": _TAG_BY_DTYPE[spec.dtype], "shape": spec.shape, "data_offsets": (offset, end)}
        places.append((name, spec, offset, end))
        offset = end
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % _ALIGNMENT_BYTES)
    return _Layout(len(text).to_bytes(_LENGTH_BYTES, "little") + text, tuple(places))


def _bytes_of(tensor: Tensor) -> memoryview:
    # Through uint8, because numpy knows no bfloat16. A scalar must become a vector before it can be seen as bytes.
    flat = tensor.detach().contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().data


def _bad(message: str) -> RefusedError:
    return refused(RefusalCode.BAD_TENSOR, message)


def _header_end(view: memoryview, expected: Mapping[str, TensorSpec] | None) -> int:
    if len(view) < _LENGTH_BYTES:
        raise _bad(f"body of {len(view)} bytes has no header")
    header_bytes = int.from_bytes(view[:_LENGTH_BYTES], "little")
    limit = _HEADER_BYTES_MAX if expected is None else len(_header(expected)) + _HEADER_SLACK_BYTES
    if header_bytes > limit:
        raise refused(RefusalCode.TOO_LARGE, f"header claims {header_bytes} bytes, at most {limit} are taken")
    if header_bytes > len(view) - _LENGTH_BYTES:
        raise _bad("header is longer than the body")
    return _LENGTH_BYTES + header_bytes


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    entries = dict(pairs)
    if len(entries) != len(pairs):
        raise ValueError("a key appears twice")
    return entries


def _parse_header(text: bytes) -> _Tensors:
    try:
        header = json.loads(text.decode("utf-8"), object_pairs_hook=_no_duplicates)
    except (ValueError, RecursionError) as error:
        # RecursionError: JSON nested as deeply as its size allows. Python's decoder stops cleanly there.
        raise _bad(f"header is not plain JSON: {type(error).__name__}") from error
    if not isinstance(header, dict):
        raise _bad("header is not an object")
    metadata = header.pop(_METADATA_KEY, {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise _bad("header's metadata is not a map of strings")
    return {name: _parse_entry(name, entry) for name, entry in header.items()}


def _parse_entry(name: str, entry: object) -> tuple[TensorSpec, int, int]:
    if len(name) > _NAME_CHARS_MAX:
        raise _bad("a tensor's name is too long")
    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        raise _bad(f"entry of tensor {name!r} is not dtype, shape and data_offsets")
    tag, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(tag, str) or tag not in _DTYPE_BY_TAG:
        raise _bad(f"tensor {name!r} has an unknown dtype")
    if not _are_sizes(shape) or len(shape) > _DIMENSIONS_MAX:
        raise _bad(f"tensor {name!r} has a shape that is no short list of sizes")
    if not _are_sizes(offsets) or len(offsets) != 2:
        raise _bad(f"tensor {name!r} has data_offsets that are no pair of sizes")
    return TensorSpec(_DTYPE_BY_TAG[tag], tuple(shape)), offsets[0], offsets[1]


def _are_sizes(value: object) -> bool:
    # bool is an int to isinstance; JSON's true is no size.
    return isinstance(value, list) and all(type(item) is int and 0 <= item < 2**63 for item in value)


def _check_expected(tensors: _Tensors, expected: Mapping[str, TensorSpec]) -> None:
    if tensors.keys() != expected.keys():
        raise _bad(f"body holds {sorted(tensors)[:8]}, expected are {sorted(expected)}")
    for name, (found, _, _) in tensors.items():
        wanted = expected[name]
        if found != wanted:
            raise _bad(f"tensor {name!r} is {found.dtype} {found.shape}, expected is {wanted.dtype} {wanted.shape}")


def _check_coverage(tensors: _Tensors, data_bytes: int) -> None:
    """Every byte belongs to exactly one tensor, and every tensor has as many bytes as its shape says."""
    position = 0
    for name, (spec, begin, end) in sorted(tensors.items(), key=lambda item: item[1][1:]):
        if begin != position or end < begin:
            raise _bad(f"tensor {name!r} starts at byte {begin}, where {position} was due")
        if spec.size_bytes != end - begin:
            raise _bad(f"tensor {name!r} has {end - begin} bytes, its shape asks for {spec.size_bytes}")
        position = end
    if position != data_bytes:
        raise _bad(f"tensors cover {position} of {data_bytes} bytes")


def _writable(data: memoryview) -> memoryview:
    return memoryview(bytearray(data)) if data.readonly else data


def _tensor(data: memoryview, spec: TensorSpec) -> Tensor:
    if len(data) == 0:
        return torch.empty(spec.shape, dtype=spec.dtype)
    flat = torch.frombuffer(data, dtype=torch.uint8)
    if flat.data_ptr() % spec.dtype.itemsize != 0:
        flat = flat.clone()
    return flat.view(spec.dtype).reshape(spec.shape)
