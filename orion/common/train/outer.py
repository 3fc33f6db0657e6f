"""The outer step: the mean of pseudo-gradients and Nesterov momentum on it, bit for bit the same for everybody.

Every replica of a stage, every reducer and every auditor applies the same merged bytes and must end with the same
anchor bytes, whatever device it runs on. IEEE 754 promises that for one multiplication or one addition of fp32
numbers, but not for a fused multiply-add, for a division that a kernel replaces by a reciprocal, or for a sum whose
order is left open. So means and steps use separate elementwise `mul`, `add` and `sub` with scalars that are rounded to
fp32 once, and never `addcmul`, `alpha=`, `div` or a reduction. They must not be compiled by what fuses kernels.

Being elementwise, the step applied to a slice is the slice of the step: whoever owns a partition computes only that.

Letters in names: N flat parameters of a stage (or of a slice of it).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from blake3 import blake3
from torch import Tensor

from orion.common.ids import Digest
from orion.common.train.config import OuterConfig

_NORM_CHUNK_PARAMS = 1 << 20
"""Parameters that are widened to fp64 at a time: 8 MiB."""

_TRIM_CHUNK_PARAMS = 1 << 18
"""Values that are sorted at a time: 1 MiB of fp32 for each contribution."""

_PART_PARAMS_MAX = 1 << 22
"""32 MiB of anchor and momentum: what is copied to host memory, or travels, at a time."""
_PART_PARAMS_MIN = 1 << 10
_PARTS_WANTED = 16
"""Of a small state, so that it too can come from several replicas."""


@dataclass(frozen=True, slots=True, eq=False)
class OuterState:
    """What all replicas of a stage share at the start of an outer step. Once it is made nobody writes into it."""

    anchor_N: Tensor
    """fp32 parameters in the model's flat order."""
    momentum_N: Tensor
    """fp32, same shape and device as the anchor."""
    outer_step: int
    """Outer steps applied so far, hence the number of the one under way."""

    def __post_init__(self) -> None:
        for name, tensor_N in (("anchor_N", self.anchor_N), ("momentum_N", self.momentum_N)):
            if tensor_N.dtype != torch.float32 or tensor_N.ndim != 1:
                raise ValueError(f"{name} must be flat fp32, not {tensor_N.dtype} of shape {tuple(tensor_N.shape)}")
        if self.anchor_N.shape != self.momentum_N.shape or self.anchor_N.device != self.momentum_N.device:
            raise ValueError("anchor_N and momentum_N differ in length or device")
        if self.outer_step < 0:
            raise ValueError(f"outer_step {self.outer_step} is negative")

    def slice(self, start: int, end: int) -> "OuterState":
        """The state of the parameters in [start, end), as views."""
        return OuterState(self.anchor_N[start:end], self.momentum_N[start:end], self.outer_step)


def initial_outer_state(params_N: Tensor) -> OuterState:
    """The state before the first outer step: the given fp32 parameters (copied) and no momentum."""
    return OuterState(params_N.detach().clone(), torch.zeros_like(params_N), 0)


def momentum_at(config: OuterConfig, outer_step: int) -> float:
    """μ that the given outer step (counted from 0) uses."""
    if outer_step >= config.num_momentum_warmup_steps:
        return config.momentum
    share = outer_step / config.num_momentum_warmup_steps
    return config.momentum_start + (config.momentum - config.momentum_start) * share


def apply_outer_step(
    state: OuterState, mean_pseudo_gradient_N: Tensor, config: OuterConfig, into: OuterState | None = None
) -> OuterState:
    """The state after one outer step, in the memory of `into` where that is given; the given state is left as it is.

    `mean_pseudo_gradient_N` is fp32 on the state's device, of its length: anchor minus local parameters, averaged
    over the contributors. Raises ValueError for another dtype, shape or device; finiteness is the caller's to check.
    """
    d_N = mean_pseudo_gradient_N
    if d_N.dtype != torch.float32 or d_N.shape != state.anchor_N.shape or d_N.device != state.anchor_N.device:
        raise ValueError(
            f"mean pseudo-gradient is {d_N.dtype} of shape {tuple(d_N.shape)} on {d_N.device}, "
            f"the anchor torch.float32 of shape {tuple(state.anchor_N.shape)} on {state.anchor_N.device}"
        )
    mu = momentum_at(config, state.outer_step)
    if into is None:
        into = OuterState(torch.empty_like(d_N), torch.empty_like(d_N), state.outer_step + 1)
    anchor_N, momentum_N = into.anchor_N, into.momentum_N
    torch.mul(state.momentum_N, mu, out=momentum_N)
    momentum_N.add_(d_N)
    # The anchor's memory holds the update first.
    torch.mul(momentum_N, mu, out=anchor_N)
    anchor_N.add_(d_N)
    anchor_N.mul_(config.lr)
    torch.sub(state.anchor_N, anchor_N, out=anchor_N)
    return into


def ahead_start(state: OuterState, own_N: Tensor, config: OuterConfig) -> Tensor:
    """Where the next outer step begins before its anchor is there: what the anchor would be if the mean were what the
    miner itself uploaded, as others read it. A function of public bytes, the same on every device. fp32, on the
    state's device; raises as `apply_outer_step`."""
    return apply_outer_step(state, own_N, config).anchor_N


def weighted_mean_in_order(slices: Sequence[tuple[float, Tensor]]) -> Tensor:
    """Σ wᵢ·xᵢ ÷ Σ wᵢ in fp32, added up in the given order; the same bytes on every device.

    Each slice is (weight > 0, fp32 tensor_N on one device). The weights are divided by their sum before they meet a
    tensor, because a division of tensors is not the same on all devices. Raises ValueError for no slices, a weight
    that is not positive and finite, or tensors that differ in dtype, shape or device.
    """
    if not slices:
        raise ValueError("a mean needs at least one slice")
    first_N = slices[0][1]
    for weight, tensor_N in slices:
        if not (math.isfinite(weight) and weight > 0):
            raise ValueError(f"weight {weight} is not positive and finite")
        if tensor_N.dtype != torch.float32 or tensor_N.shape != first_N.shape or tensor_N.device != first_N.device:
            raise ValueError(f"slice is {tensor_N.dtype} of shape {tuple(tensor_N.shape)} on {tensor_N.device}")
    total = math.fsum(weight for weight, _ in slices)
    mean_N = torch.mul(first_N, slices[0][0] / total)
    weighed_N = torch.empty_like(mean_N)
    for weight, tensor_N in slices[1:]:
        mean_N.add_(torch.mul(tensor_N, weight / total, out=weighed_N))
    return mean_N


def trimmed_mean(tensors: Sequence[Tensor], num_cut: int) -> Tensor:
    """The mean of each value without its `num_cut` smallest and largest, all counting alike; the same bytes whatever
    the order of the tensors and on every device.

    Tensors are finite fp32 of one shape. Raises ValueError when nothing would be left or they differ.
    """
    num_left = len(tensors) - 2 * num_cut
    if num_cut < 0 or num_left < 1:
        raise ValueError(f"of {len(tensors)} tensors, {num_cut} cannot be cut on either side")
    for tensor_N in tensors:
        if tensor_N.dtype != torch.float32 or tensor_N.shape != tensors[0].shape:
            raise ValueError(f"a tensor is {tensor_N.dtype} of shape {tuple(tensor_N.shape)}")
    mean_N = torch.empty_like(tensors[0])
    pieces = zip(*(torch.split(tensor_N, _TRIM_CHUNK_PARAMS) for tensor_N in tensors), strict=True)
    for start, chunks in zip(range(0, mean_N.numel(), _TRIM_CHUNK_PARAMS), pieces, strict=True):
        # Zeros of both signs are equal to a sort, so which one is kept would depend on the order.
        sorted_RC = torch.sort(torch.stack(chunks).add_(0.0), dim=0).values[num_cut : num_cut + num_left]
        sum_C = sorted_RC[0].clone()
        for row_C in sorted_RC[1:]:
            sum_C.add_(row_C)
        mean_N[start : start + sum_C.numel()] = sum_C.mul_(1.0 / num_left)
    return mean_N


def contribution_norm(tensor_N: Tensor) -> float:
    """Euclidean norm in fp64, the same to the last bit on every device; not finite when any element is not.

    Halves of a piece are added to each other until one value is left, by elementwise additions alone, and the pieces'
    sums are added exactly: so neither vector widths nor threads decide how it is rounded.
    """
    sums: list[float] = []
    chunks = torch.split(tensor_N.detach(), _NORM_CHUNK_PARAMS)
    # One piece of memory for all: fresh memory costs more than the arithmetic.
    scratch_N = torch.empty(chunks[0].numel(), dtype=torch.float64, device=tensor_N.device)
    for chunk_N in chunks:
        squares_N = scratch_N[: chunk_N.numel()]
        squares_N.copy_(chunk_N).square_()
        left = squares_N.numel()
        while left > 1:
            half, odd = divmod(left, 2)
            squares_N[:half].add_(squares_N[half : 2 * half])
            if odd:
                squares_N[half] = squares_N[left - 1]
            left = half + odd
        sums.append(float(squares_N[0]))
    return math.sqrt(math.fsum(sums)) if all(math.isfinite(value) for value in sums) else math.nan


def contribution_check(tensor_N: Tensor, norm_bound: float) -> str | None:
    """Why a contribution may not enter a mean, or None when it may: it must be finite and within the norm bound."""
    norm = contribution_norm(tensor_N)
    if not math.isfinite(norm):
        return "not finite"
    if norm > norm_bound:
        return f"norm {norm:.6g} exceeds {norm_bound:.6g}"
    return None


def state_bounds(num_params: int) -> list[tuple[int, int]]:
    """The parts of a state of so many parameters, as half-open ranges in order. A function of the length alone."""
    size = min(_PART_PARAMS_MAX, max(_PART_PARAMS_MIN, -(-num_params // _PARTS_WANTED)))
    return [(start, min(start + size, num_params)) for start in range(0, num_params, size)]


def part_bytes(state: OuterState, start: int, end: int) -> bytes:
    """A part as it is digested and handed on: the anchor's bytes, then the momentum's, fp32 little-endian."""
    part = state.slice(start, end)
    return b"".join(_host_bytes(tensor_N) for tensor_N in (part.anchor_N, part.momentum_N))


def state_outline(state: OuterState) -> tuple[Digest, ...]:
    """blake3 of every part."""
    found = []
    for start, end in state_bounds(state.anchor_N.numel()):
        part, hasher = state.slice(start, end), blake3()
        for tensor_N in (part.anchor_N, part.momentum_N):
            hasher.update(_host_bytes(tensor_N))
        found.append(Digest(hasher.hexdigest()))
    return tuple(found)


def outline_digest(outer_step: int, num_params: int, parts: Sequence[Digest]) -> Digest:
    """The digest of the state whose parts have these digests: over outer step, length and the parts, little-endian."""
    hasher = blake3()
    hasher.update(outer_step.to_bytes(8, "little"))
    hasher.update(num_params.to_bytes(8, "little"))
    for part in parts:
        hasher.update(bytes.fromhex(part))
    return Digest(hasher.hexdigest())


def state_digest(state: OuterState) -> Digest:
    """Covers outer step, length, anchor and momentum, through the digests of the parts.

    Equal digests mean byte-identical states. The anchor alone decides what is trained, but two replicas with different
    momentum would part at the next outer step, so both are in it. As it is made of the parts' digests, whoever knows it
    can check a list of these, and with that every single part, whoever hands it over.
    """
    return outline_digest(state.outer_step, state.anchor_N.numel(), state_outline(state))


def _host_bytes(tensor_N: Tensor) -> memoryview:
    return tensor_N.detach().cpu().contiguous().numpy().data.cast("B")
