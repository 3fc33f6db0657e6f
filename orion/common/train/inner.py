"""The inner optimizer of one stage: Muon for matrices, AdamW for the rest, or AdamW or NAdam for all.

It owns fp32 master parameters in place and the optimizers' state; it does not compute gradients, keep versions or
know of other miners. Its state can be reset at the start of every outer step (`InnerConfig.inner_state`), which makes
a miner's outer step a pure function of the public anchor and its own log of operations: a validator can replay it
from there, and a newcomer starts equal to everybody else, without optimizer state ever crossing the network.

What that costs, measured with 2 replicas and 10 inner steps an outer step: a fresh Muon costs nothing, a fresh AdamW
does, because its first steps give every element the same size, noise or not. The higher `lr_other`, the more.
"""

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass

import torch
from torch import Tensor

from orion.common.train.config import InnerConfig
from orion.common.train.muon import Muon

_NORM_SLACK = 1e-6
"""Added to a norm that is divided by."""


@dataclass(frozen=True, slots=True)
class GradientNorm:
    """What clipping found and did."""

    norm: float
    """Before clipping; not finite when any element is not."""
    clipped: bool

    @property
    def is_finite(self) -> bool:
        return math.isfinite(self.norm)


def clip_share(stage_params: int, total_params: int, clip_norm: float) -> float:
    """A stage's part of the bound on the whole model's gradient norm, by its number of parameters.

    A gradient of norm `clip_norm` that is spread evenly over the model reaches the bound of every stage at once, and no
    stage needs to ask another. Raises ValueError unless 0 < stage_params ≤ total_params.
    """
    if not 0 < stage_params <= total_params:
        raise ValueError(f"a stage of {stage_params} parameters in a model of {total_params}")
    return clip_norm * math.sqrt(stage_params / total_params)


def clip_in_place(gradients: Sequence[Tensor], norm_bound: float, scale: float = 1.0) -> GradientNorm:
    """Multiplies fp32 gradients by `scale`, and scales them down to `norm_bound` together, in one pass over them. The
    norm is that between the two. Leaves them alone when they are not finite."""
    norms = torch.stack([torch.linalg.vector_norm(gradient) for gradient in gradients])
    norm = float(torch.linalg.vector_norm(norms)) * scale
    if not math.isfinite(norm):
        return GradientNorm(norm, clipped=False)
    clipped = norm > norm_bound
    if clipped:
        scale *= norm_bound / (norm + _NORM_SLACK)
    if scale != 1.0:
        torch._foreach_mul_(list(gradients), scale)
    return GradientNorm(norm, clipped)


class InnerOptimizer:
    """Steps a fixed set of named fp32 parameters in place. Built by `build_inner_optimizer`."""

    def __init__(self, params: Mapping[str, Tensor], optimizers: Sequence[torch.optim.Optimizer]) -> None:
        self._params = dict(params)
        self._optimizers = tuple(optimizers)
        self._full_rates = [[float(group["lr"]) for group in optimizer.param_groups] for optimizer in optimizers]

    def reset(self) -> None:
        """Forgets momenta and step counts, as if newly built."""
        for optimizer in self._optimizers:
            optimizer.state = defaultdict(dict)

    def step(self, gradients: Mapping[str, Tensor], learning_rate_factor: float) -> None:
        """One update from finite fp32 gradients, one for each parameter's name, at that share of the full rates."""
        for name, param in self._params.items():
            param.grad = gradients[name]
        for optimizer, rates in zip(self._optimizers, self._full_rates, strict=True):
            for group, rate in zip(optimizer.param_groups, rates, strict=True):
                group["lr"] = rate * learning_rate_factor
            optimizer.step()
        for param in self._params.values():
            param.grad = None


def build_inner_optimizer(
    params: Mapping[str, Tensor], matrix_names: AbstractSet[str], config: InnerConfig
) -> InnerOptimizer:
    """The optimizer that `config` names, over fp32 leaf tensors.

    `matrix_names` are the two-dimensional parameters inside blocks, which Muon may orthogonalise; embeddings and
    head, though two-dimensional, are not among them. Raises ValueError when it names an unknown parameter.
    """
    if unknown := matrix_names - params.keys():
        raise ValueError(f"matrix names {sorted(unknown)} are no parameters")
    matrices = [param for name, param in params.items() if name in matrix_names]
    others = [param for name, param in params.items() if name not in matrix_names]
    matrix_groups = _groups(matrices, config.lr_matrix, config.weight_decay)
    other_groups = _groups(others, config.lr_other, config.weight_decay)
    if config.optimizer != "muon":
        return InnerOptimizer(params, [_adam(matrix_groups + other_groups, config)])
    optimizers: list[torch.optim.Optimizer] = []
    if matrix_groups:
        optimizers.append(Muon(matrix_groups, momentum=config.muon_momentum))
    if other_groups:
        optimizers.append(_adam(other_groups, config))
    return InnerOptimizer(params, optimizers)


def _groups(params: Sequence[Tensor], lr: float, weight_decay: float) -> list[dict[str, object]]:
    """Optimizer groups at one rate: what decays and what, being norms, does not."""
    decaying = [param for param in params if param.ndim >= 2]
    others = [param for param in params if param.ndim < 2]
    pairs = ((decaying, weight_decay), (others, 0.0))
    return [{"params": members, "lr": lr, "weight_decay": decay} for members, decay in pairs if members]


def _adam(groups: list[dict[str, object]], config: InnerConfig) -> torch.optim.Optimizer:
    betas = (config.beta1, config.beta2)
    if config.optimizer == "nadam":
        return torch.optim.NAdam(groups, betas=betas, eps=config.eps, decoupled_weight_decay=True)
    return torch.optim.AdamW(groups, betas=betas, eps=config.eps, fused=True)  # one pass instead of a dozen
