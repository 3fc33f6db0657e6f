"""The codec of one partition: the run's, but for the boundaries' maps where the run keeps these dense.

A boundary's maps are a thousandth of a stage and everything that crosses goes through them; beside blocks of other
scale, or under a sparse codec, little of what they learned would get through. So `RunSpec.codec_boundaries` may name a
codec of their own. Their token tables are embeddings like any other and go with the rest.

Which values of a partition are maps follows from the run alone, so everybody knows every layout. Kept dense means
without an error state: it is zero at these places.

Letters in names: N values of the partition, M of them in maps.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from orion.common.config import RunSpec
from orion.common.model.params import boundary_map_ranges
from orion.common.train.compress import (
    CodecName,
    DecodeError,
    Encoded,
    PseudoGradientCodec,
    TensorSpec,
    codec_for,
)
from orion.common.train.partition import Partition

_DENSE = "dense"
"""Name of the tensor that holds the maps."""


def slice_codec(spec: RunSpec, stage_index: int, partition: Partition) -> PseudoGradientCodec:
    """The codec of a partition of that stage."""
    rest = codec_for(spec.codec)
    if spec.codec_boundaries is None:
        return rest
    ranges = [
        (max(start, partition.start) - partition.start, min(end, partition.end) - partition.start)
        for start, end in boundary_map_ranges(spec.model, spec.layouts[stage_index])
        if start < partition.end and end > partition.start
    ]
    return MixedCodec(rest, codec_for(spec.codec_boundaries), ranges) if ranges else rest


class MixedCodec:
    """Some ranges of a vector by a dense codec that makes one tensor, what is left by another."""

    def __init__(
        self, rest: PseudoGradientCodec, dense: PseudoGradientCodec, ranges: Sequence[tuple[int, int]]
    ) -> None:
        """`ranges` are half-open, not empty, in order and disjoint."""
        self.name: CodecName = rest.name
        self._rest, self._dense = rest, dense
        self._ranges = tuple(ranges)
        self._num_dense = sum(end - start for start, end in self._ranges)

    def layout(self, num_values: int) -> dict[str, TensorSpec]:
        (values,) = self._dense.layout(self._num_dense).values()
        num_rest = num_values - self._num_dense
        return {**(self._rest.layout(num_rest) if num_rest else {}), _DENSE: values}

    def encode(self, values_N: Tensor, residual_N: Tensor | None) -> Encoded:
        is_dense_N = self._mask(values_N)
        (dense_M,) = self._dense.encode(values_N[is_dense_N], None).tensors.values()
        if self._num_dense == values_N.numel():
            return Encoded({_DENSE: dense_M}, torch.zeros_like(values_N) if self.name == "topk" else None)
        rest_residual = None if residual_N is None else residual_N[~is_dense_N]
        encoded = self._rest.encode(values_N[~is_dense_N], rest_residual)
        if encoded.residual_N is None:
            return Encoded({**encoded.tensors, _DENSE: dense_M}, None)
        left_N = torch.zeros_like(values_N)
        left_N[~is_dense_N] = encoded.residual_N
        return Encoded({**encoded.tensors, _DENSE: dense_M}, left_N)

    def decode(self, tensors: Mapping[str, Tensor], num_values: int) -> Tensor:
        if _DENSE not in tensors:
            raise DecodeError("the boundaries' maps are missing")
        (dense_name,) = self._dense.layout(self._num_dense)
        dense_M = self._dense.decode({dense_name: tensors[_DENSE]}, self._num_dense)
        if self._num_dense == num_values:
            return dense_M
        rest = {name: tensor for name, tensor in tensors.items() if name != _DENSE}
        values_N = torch.empty(num_values, dtype=torch.float32, device=dense_M.device)
        is_dense_N = self._mask(values_N)
        values_N[is_dense_N] = dense_M
        values_N[~is_dense_N] = self._rest.decode(rest, num_values - self._num_dense)
        return values_N

    def error_state_part(self, values_N: Tensor) -> Tensor:
        """The values with zeros where nothing is ever kept for the next upload."""
        return torch.where(self._mask(values_N), torch.zeros_like(values_N), values_N)

    def _mask(self, values_N: Tensor) -> Tensor:
        is_dense_N = torch.zeros(values_N.shape, dtype=torch.bool, device=values_N.device)
        for start, end in self._ranges:
            is_dense_N[start:end] = True
        return is_dense_N


def error_state_part(codec: PseudoGradientCodec, values_N: Tensor) -> Tensor:
    """The values with zeros where the codec keeps nothing for the next upload."""
    return codec.error_state_part(values_N) if isinstance(codec, MixedCodec) else values_N
