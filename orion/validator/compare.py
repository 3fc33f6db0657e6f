"""Whether two tensors that ought to be the same are the same, but for honest noise. Pure.

Two machines of different make give slightly different floating-point results for the same operation, so equality of
bits is reported but not demanded: what is demanded is that the angle between the two is small (cosine) and that they
are of the same length (norm ratio). Either alone is not enough: a scaled copy passes the one, anything of the right
length the other.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from orion.common.config import Tolerance


@dataclass(frozen=True, slots=True)
class Comparison:
    """How alike two tensors are."""

    bit_equal: bool
    cosine: float
    """In [-1, 1]; 1 when both are zero."""
    norm_ratio: float
    """Shorter ÷ longer, in [0, 1]; 1 when both are zero."""
    failure: str | None
    """Why they do not count as the same; None when they do."""


def compare(claimed: Tensor, replayed: Tensor, tolerance: Tolerance) -> Comparison:
    """Compares what a miner claims with what the replay gave; both of any one shape, in a floating dtype.

    The replayed tensor is first rounded to the claimed one's dtype, as it would have been on the wire.
    """
    if claimed.shape != replayed.shape:
        return _apart(f"shape {tuple(claimed.shape)} instead of {tuple(replayed.shape)}")
    if not bool(torch.isfinite(claimed).all()):
        return _apart("not finite")
    claimed = claimed.detach().cpu()
    replayed = replayed.detach().cpu().to(claimed.dtype)
    if not bool(torch.isfinite(replayed).all()):
        return _apart("the replay is not finite where the claim is")
    if torch.equal(claimed, replayed):
        return Comparison(bit_equal=True, cosine=1.0, norm_ratio=1.0, failure=None)
    cosine, norm_ratio = _likeness(claimed.double().flatten(), replayed.double().flatten())
    return Comparison(False, cosine, norm_ratio, _failure(cosine, norm_ratio, tolerance))


def _apart(failure: str) -> Comparison:
    return Comparison(bit_equal=False, cosine=0.0, norm_ratio=0.0, failure=failure)


def _likeness(first: Tensor, second: Tensor) -> tuple[float, float]:
    """Cosine and norm ratio of two flat fp64 tensors that are not equal."""
    norms = [float(torch.linalg.vector_norm(tensor)) for tensor in (first, second)]
    if min(norms) == 0.0:
        # Two zeros may still differ in bits (by sign).
        both = 1.0 if max(norms) == 0.0 else 0.0
        return both, both
    cosine = float(torch.dot(first / norms[0], second / norms[1]))
    return max(-1.0, min(1.0, cosine)), min(norms) / max(norms)


def _failure(cosine: float, norm_ratio: float, tolerance: Tolerance) -> str | None:
    if not (math.isfinite(cosine) and cosine >= tolerance.cosine_min):
        return f"cosine {cosine:.6f} is below {tolerance.cosine_min:g}"
    if not (math.isfinite(norm_ratio) and norm_ratio >= tolerance.norm_ratio_min):
        return f"norm ratio {norm_ratio:.6f} is below {tolerance.norm_ratio_min:g}"
    return None
