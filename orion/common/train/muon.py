"""Muon: momentum, orthogonalised by Newton-Schulz iterations, for the matrices inside blocks.

Keller Jordan's optimizer (2024) with the update scale of Moonlight (arXiv 2502.16982, eq. 4). `torch.optim.Muon` does
the same but always iterates in bfloat16, which processors without bfloat16 units compute some thirty times slower
than float32, and takes one matrix at a time. Here the iteration runs in the dtype that suits the device, and matrices
of one shape go through it together, as many as `MATRIX_VALUES_MAX` allows.
"""

import math
from collections import defaultdict
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from orion.common.train.muon_groups import matrices_together

NEWTON_SCHULZ_COEFFICIENTS = (3.4445, -4.7750, 2.0315)
"""Of the quintic that drives singular values towards 1; chosen by its author for the steepest slope at 0."""
NUM_NEWTON_SCHULZ_STEPS = 5
GRAM_RATIO_MIN = 2
"""How much longer than wide a matrix must be for the iteration over its Gram matrix to be the cheaper one; they would
cost the same at 1.5."""
RMS_OF_ADAMW = 0.2
"""Typical root mean square of an AdamW update, to which Muon's is scaled so that both can share a learning rate."""


class Muon(torch.optim.Optimizer):
    """Takes two-dimensional float32 parameters only; raises ValueError for others."""

    def __init__(
        self, params: Iterable[dict[str, Any]], *, momentum: float, lr: float = 0.0, weight_decay: float = 0.0
    ) -> None:
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay, "momentum": momentum})
        if any(param.ndim != 2 for group in self.param_groups for param in group["params"]):
            raise ValueError("Muon takes matrices only")

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """One update of every parameter from its `.grad`."""
        assert closure is None, "Muon steps from gradients that are already there"
        for group in self.param_groups:
            by_shape: dict[torch.Size, list[Tensor]] = defaultdict(list)
            for param in group["params"]:
                by_shape[param.shape].append(param)
            for shape, params in by_shape.items():
                num_together = matrices_together(shape.numel())
                for start in range(0, len(params), num_together):
                    self._step_together(params[start : start + num_together], group)

    def _step_together(self, params: list[Tensor], group: dict[str, Any]) -> None:
        """One update of matrices of one shape."""
        updates_KMN = orthogonalise(torch.stack([self._direction(param, group["momentum"]) for param in params]))
        rate = group["lr"] * RMS_OF_ADAMW * math.sqrt(max(params[0].shape))
        for param, update_MN in zip(params, updates_KMN, strict=True):
            param.mul_(1.0 - group["lr"] * group["weight_decay"]).sub_(update_MN, alpha=rate)

    def _direction(self, param: Tensor, momentum: float) -> Tensor:
        """The gradient looked at through Nesterov momentum; updates the running mean."""
        assert param.grad is not None, "every matrix needs a gradient"
        state = self.state[param]
        if not state:
            state["mean"] = torch.zeros_like(param)
        mean: Tensor = state["mean"]
        mean.lerp_(param.grad, 1.0 - momentum)
        return param.grad.lerp(mean, momentum)


def orthogonalise(matrices_KMN: Tensor) -> Tensor:
    """Nearly U Vᵀ of each of K matrices [M, N] = U S Vᵀ, in their dtype: singular values end between 0.7 and 1.2."""
    x_KMN = matrices_KMN.to(_iteration_dtype(matrices_KMN.device))
    is_tall = x_KMN.shape[1] > x_KMN.shape[2]
    if is_tall:
        x_KMN = x_KMN.mT
    x_KMN = x_KMN / torch.linalg.matrix_norm(x_KMN, keepdim=True).clamp(min=1e-7)
    # A Gram matrix has the squares of the singular values, for which bfloat16 is too coarse.
    uses_gram = x_KMN.shape[2] >= GRAM_RATIO_MIN * x_KMN.shape[1] and x_KMN.dtype != torch.bfloat16
    x_KMN = _iterate_gram(x_KMN) if uses_gram else _iterate(x_KMN)
    return (x_KMN.mT if is_tall else x_KMN).to(matrices_KMN.dtype)


def _iterate(x_KMN: Tensor) -> Tensor:
    """X ← (a + b G + c G²) X with G = X Xᵀ, so many times."""
    a, b, c = NEWTON_SCHULZ_COEFFICIENTS
    for _ in range(NUM_NEWTON_SCHULZ_STEPS):
        gram_KMM = x_KMN @ x_KMN.mT
        polynomial_KMM = torch.baddbmm(gram_KMM, gram_KMM, gram_KMM, beta=b, alpha=c)
        x_KMN = torch.baddbmm(x_KMN, polynomial_KMM, x_KMN, beta=a)
    return x_KMN


def _iterate_gram(x_KMN: Tensor) -> Tensor:
    """The same, but for rounding: with P = a + b G + c G², the next G is P G P, and X is multiplied by the product of
    all P at the end. All but two of the products are then of M by M matrices, however large N is."""
    a, b, c = NEWTON_SCHULZ_COEFFICIENTS
    gram_KMM = x_KMN @ x_KMN.mT
    product_KMM: Tensor | None = None
    for step in range(NUM_NEWTON_SCHULZ_STEPS):
        polynomial_KMM = torch.baddbmm(gram_KMM, gram_KMM, gram_KMM, beta=b, alpha=c)
        polynomial_KMM.diagonal(dim1=-2, dim2=-1).add_(a)
        product_KMM = polynomial_KMM if product_KMM is None else polynomial_KMM @ product_KMM
        if step < NUM_NEWTON_SCHULZ_STEPS - 1:
            gram_KMM = polynomial_KMM @ (gram_KMM @ polynomial_KMM)
    assert product_KMM is not None
    return product_KMM @ x_KMN


def _iteration_dtype(device: torch.device) -> torch.dtype:
    return torch.bfloat16 if device.type == "cuda" else torch.float32
