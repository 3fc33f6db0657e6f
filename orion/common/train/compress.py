"""How a pseudo-gradient (or any slice of one) is written for the network: pure codecs over flat fp32 vectors.

`layout` says which tensors of which dtype and shape make up N encoded values, so that a receiver knows every size
before it reads a byte. `decode` trusts nothing: it refuses tensors that do not fit the layout, and its result is
always finite. Decoding uses single elementwise fp32 operations only, so that all receivers get the same bytes on any
device.

A codec with memory (top-k) takes the residual that its last call returned and returns a new one: what was not sent
this time and is added to the next pseudo-gradient. The others return None. Nothing is kept in a codec object.

Letters in names: N values of the vector, K chunks or blocks.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from torch import Tensor

from orion.common.errors import OrionError

CodecName = Literal["none", "bf16", "int8", "topk"]

INT8_BLOCK = 256
"""Values that share a scale: 8.125 bits a value, and an outlier coarsens only its neighbours."""
INT8_LEVEL_MAX = 127

TOPK_CHUNK = 4096
"""Values among which the largest are chosen: an index takes 12 bits."""
TOPK_KEPT = 64
"""Values kept per chunk (1.6 %), as in published runs of sparse local-update training."""
TOPK_RESIDUAL_DECAY = 0.95
"""What is left of an unsent value when it is offered again; below 1, so that stale directions fade."""


class DecodeError(OrionError, ValueError):
    """Encoded tensors do not fit the codec; the sender is at fault."""


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """Dtype and shape that a tensor must have."""

    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def size_bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True, slots=True, eq=False)
class Encoded:
    """An encoded vector and what the codec wants back at its next call."""

    tensors: dict[str, Tensor]
    residual_N: Tensor | None


class PseudoGradientCodec(Protocol):
    """Encodes flat fp32 vectors. Results may share memory with arguments, so nobody writes into either."""

    @property
    def name(self) -> CodecName: ...

    def layout(self, num_values: int) -> dict[str, TensorSpec]:
        """The tensors that make up `num_values` encoded values."""
        ...

    def encode(self, values_N: Tensor, residual_N: Tensor | None) -> Encoded:
        """Encodes finite fp32 values. `residual_N` is what the last call returned, None at first."""
        ...

    def decode(self, tensors: Mapping[str, Tensor], num_values: int) -> Tensor:
        """The finite fp32 values on the tensors' device. Raises DecodeError when the tensors do not fit."""
        ...


def all_finite(values: Tensor) -> bool:
    """Whether no floating-point element is infinite or not a number. One pass that writes nothing: minimum and maximum
    both turn NaN where any element is."""
    if not values.is_floating_point() or values.numel() == 0:
        return True
    low, high = torch.aminmax(values)
    return math.isfinite(low.item()) and math.isfinite(high.item())


def codec_for(name: CodecName) -> PseudoGradientCodec:
    """The codec of that name. Raises KeyError for an unknown one."""
    return _CODECS[name]


class CastCodec:
    """Values as they are, in fp32 (`none`, exact) or rounded to bf16 (relative error up to 2⁻⁸)."""

    def __init__(self, name: CodecName, dtype: torch.dtype) -> None:
        self.name: CodecName = name
        self._dtype = dtype

    def layout(self, num_values: int) -> dict[str, TensorSpec]:
        return {"values": TensorSpec(self._dtype, (num_values,))}

    def encode(self, values_N: Tensor, residual_N: Tensor | None) -> Encoded:
        _require_encodable(values_N)
        return Encoded({"values": values_N.to(self._dtype)}, None)

    def decode(self, tensors: Mapping[str, Tensor], num_values: int) -> Tensor:
        _require_layout(tensors, self.layout(num_values))
        return _finite(tensors["values"].to(torch.float32))


class Int8Codec:
    """Blocks of 256 values as int8 with one fp32 scale each; the error is up to half a scale, largest value ÷ 254."""

    name: CodecName = "int8"

    def layout(self, num_values: int) -> dict[str, TensorSpec]:
        return {
            "scales": TensorSpec(torch.float32, (_num_pieces(num_values, INT8_BLOCK),)),
            "levels": TensorSpec(torch.int8, (num_values,)),
        }

    def encode(self, values_N: Tensor, residual_N: Tensor | None) -> Encoded:
        _require_encodable(values_N)
        blocks_KB = _pieces(values_N, INT8_BLOCK)
        scales_K = blocks_KB.abs().amax(dim=1) / INT8_LEVEL_MAX
        # A block of zeros, or of values too small for a scale above zero, is sent as zeros.
        divisors_K1 = torch.where(scales_K > 0, scales_K, torch.ones_like(scales_K))[:, None]
        levels_KB = (blocks_KB / divisors_K1).round().clamp(-INT8_LEVEL_MAX, INT8_LEVEL_MAX)
        levels_N = levels_KB.to(torch.int8).flatten()[: values_N.numel()]
        return Encoded({"scales": scales_K, "levels": levels_N.contiguous()}, None)

    def decode(self, tensors: Mapping[str, Tensor], num_values: int) -> Tensor:
        _require_layout(tensors, self.layout(num_values))
        levels_KB = _pieces(tensors["levels"].to(torch.float32), INT8_BLOCK)
        values_KB = torch.mul(levels_KB, tensors["scales"][:, None])
        return _finite(values_KB.flatten()[:num_values])


class TopKCodec:
    """The 64 largest of each 4096 values: 12-bit place, 2-bit value, with error feedback; 0.23 bits a value.

    The two bits are a sign and the choice between two magnitudes per chunk: the means of the kept values below and
    above the mean of all kept. Means are the least-squares choice, so a residual is never longer than what was to be
    sent.
    """

    name: CodecName = "topk"

    def layout(self, num_values: int) -> dict[str, TensorSpec]:
        num_chunks = _num_pieces(num_values, TOPK_CHUNK)
        return {
            "places": TensorSpec(torch.uint8, (num_chunks, TOPK_KEPT * 12 // 8)),
            "codes": TensorSpec(torch.uint8, (num_chunks, TOPK_KEPT * 2 // 8)),
            "magnitudes": TensorSpec(torch.bfloat16, (num_chunks, 2)),
        }

    def encode(self, values_N: Tensor, residual_N: Tensor | None) -> Encoded:
        _require_encodable(values_N)
        wanted_N = values_N if residual_N is None else torch.add(values_N, torch.mul(residual_N, TOPK_RESIDUAL_DECAY))
        chunks_KC = _pieces(wanted_N, TOPK_CHUNK)
        places_Kk = chunks_KC.abs().topk(TOPK_KEPT, dim=1, sorted=False).indices.sort(dim=1).values
        kept_Kk = chunks_KC.gather(1, places_Kk)
        sizes_Kk = kept_Kk.abs()
        is_large_Kk = sizes_Kk > sizes_Kk.mean(dim=1, keepdim=True)
        magnitudes_K2 = torch.stack((_masked_mean(sizes_Kk, ~is_large_Kk), _masked_mean(sizes_Kk, is_large_Kk)), dim=1)
        codes_Kk = is_large_Kk.to(torch.uint8) + 2 * (kept_Kk < 0).to(torch.uint8)
        tensors = {
            "places": _pack_places(places_Kk),
            "codes": _pack_codes(codes_Kk),
            "magnitudes": magnitudes_K2.to(torch.bfloat16),
        }
        sent_N = self.decode(tensors, values_N.numel())
        return Encoded(tensors, torch.sub(wanted_N, sent_N))

    def decode(self, tensors: Mapping[str, Tensor], num_values: int) -> Tensor:
        _require_layout(tensors, self.layout(num_values))
        places_Kk = _unpack_places(tensors["places"])
        # Rising places are distinct ones, so that the scatter below does not depend on an order.
        if not bool((places_Kk[:, 1:] > places_Kk[:, :-1]).all()):
            raise DecodeError("places do not rise within a chunk")
        codes_Kk = _unpack_codes(tensors["codes"])
        sizes_Kk = tensors["magnitudes"].to(torch.float32).gather(1, codes_Kk & 1)
        kept_Kk = torch.where(codes_Kk >= 2, -sizes_Kk, sizes_Kk)
        chunks_KC = torch.zeros(places_Kk.shape[0], TOPK_CHUNK, dtype=torch.float32, device=places_Kk.device)
        return _finite(chunks_KC.scatter_(1, places_Kk, kept_Kk).flatten()[:num_values])


_CODECS: dict[CodecName, PseudoGradientCodec] = {
    "none": CastCodec("none", torch.float32),
    "bf16": CastCodec("bf16", torch.bfloat16),
    "int8": Int8Codec(),
    "topk": TopKCodec(),
}


def _num_pieces(num_values: int, piece: int) -> int:
    return -(-num_values // piece)


def _pieces(values_N: Tensor, piece: int) -> Tensor:
    """(K, piece), the last row filled up with zeros."""
    num_missing = _num_pieces(values_N.numel(), piece) * piece - values_N.numel()
    return torch.nn.functional.pad(values_N, (0, num_missing)).view(-1, piece)


def _masked_mean(sizes_Kk: Tensor, mask_Kk: Tensor) -> Tensor:
    counts_K = mask_Kk.sum(dim=1).clamp(min=1)
    return torch.where(mask_Kk, sizes_Kk, torch.zeros_like(sizes_Kk)).sum(dim=1) / counts_K


def _pack_places(places_Kk: Tensor) -> Tensor:
    """Two 12-bit numbers in three bytes."""
    even, odd = places_Kk[:, 0::2], places_Kk[:, 1::2]
    triples = torch.stack((even & 0xFF, (even >> 8) | ((odd & 0xF) << 4), odd >> 4), dim=2)
    return triples.flatten(1).to(torch.uint8)


def _unpack_places(packed: Tensor) -> Tensor:
    first, second, third = packed.to(torch.int64).view(packed.shape[0], -1, 3).unbind(2)
    return torch.stack((first | ((second & 0xF) << 8), (second >> 4) | (third << 4)), dim=2).flatten(1)


def _pack_codes(codes_Kk: Tensor) -> Tensor:
    """Four 2-bit numbers in a byte."""
    quads = codes_Kk.view(codes_Kk.shape[0], -1, 4).unbind(2)
    packed: Tensor = quads[0] | (quads[1] << 2) | (quads[2] << 4) | (quads[3] << 6)
    return packed


def _unpack_codes(packed: Tensor) -> Tensor:
    wide = packed.to(torch.int64)
    return torch.stack([(wide >> shift) & 3 for shift in (0, 2, 4, 6)], dim=2).flatten(1)


def _require_encodable(values_N: Tensor) -> None:
    if values_N.dtype != torch.float32 or values_N.ndim != 1 or values_N.numel() == 0:
        raise ValueError(f"a codec takes flat fp32 values, not {values_N.dtype} of shape {tuple(values_N.shape)}")
    if not all_finite(values_N):
        raise ValueError("values are not finite")


def _require_layout(tensors: Mapping[str, Tensor], layout: Mapping[str, TensorSpec]) -> None:
    if tensors.keys() != layout.keys():
        raise DecodeError(f"tensors are {sorted(tensors)}, expected {sorted(layout)}")
    for name, spec in layout.items():
        tensor = tensors[name]
        if tensor.dtype != spec.dtype or tuple(tensor.shape) != spec.shape:
            raise DecodeError(
                f"{name} is {tensor.dtype} of shape {tuple(tensor.shape)}, expected {spec.dtype} of shape {spec.shape}"
            )


def _finite(values_N: Tensor) -> Tensor:
    if not all_finite(values_N):
        raise DecodeError("values are not finite")
    return values_N
