"""Parameters as numbers: first values, one flat vector, counts, and which optimizer takes which.

Owns everything that treats a stage's parameters as a list of named tensors in `named_parameters` order. Must not
compute with the model. Invariants: first values depend on the seed and the parameter's name only, and are the same
bytes on every machine; `param_layout` covers the flat vector exactly once.

Shapes: N values of the flat vector.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor, nn

from orion.common.model.config import ModelConfig
from orion.common.model.layers import Embedding, Linear, RMSNorm, named_generator
from orion.common.model.splits import SplitRule, StageLayout, stage_layouts
from orion.common.model.stage import Pipeline, Stage

_DRAWS_AT_ONCE = 1 << 24  # values; bounds the float32 copy beside a large parameter to 64 MiB


@dataclass(frozen=True, slots=True)
class ParamSlice:
    """Where one parameter lies in the flat vector: values start up to, not including, end."""

    name: str
    shape: tuple[int, ...]
    start: int
    end: int


@torch.no_grad()
def init_params(module: Pipeline, seed: int) -> None:
    """Gives every parameter its first value, in place.

    Matrices and tables are uniform with mean 0 and their layer's standard deviation: a uniform draw is integer
    arithmetic and one rounded multiplication, so unlike a normal draw it is the same bytes whatever the processor.
    Norms become ones.
    """
    for prefix, layer in module.named_modules():
        if isinstance(layer, Linear | Embedding):
            _fill_uniform(layer.weight, layer.init_std, named_generator(seed, f"{prefix}.weight"))
        elif isinstance(layer, RMSNorm):
            layer.weight.fill_(1.0)
    project_params(module)


def _fill_uniform(param: Tensor, std: float, generator: torch.Generator) -> None:
    flat = param.view(-1)
    width = std * math.sqrt(12.0)  # a uniform distribution of this width has this standard deviation
    for start in range(0, flat.numel(), _DRAWS_AT_ONCE):
        part = flat[start : start + _DRAWS_AT_ONCE]
        part.copy_(torch.rand(part.numel(), generator=generator).sub_(0.5).mul_(width))


@torch.no_grad()
def project_params(module: Pipeline, params: Mapping[str, Tensor] | None = None) -> None:
    """Restores what the `subspace` boundary needs after an optimizer step, in place; does nothing for the other kinds.

    Embedding rows and the outputs of both branches of every block return to the fixed subspace, except in the last
    two blocks of the model as far as they are in the last stage: what they write crosses no boundary. `params` (by
    name) are changed instead of the module's own, for callers that keep them apart.
    """
    if module.subspace is None:
        return
    named = dict(module.named_parameters()) if params is None else params
    if module.layouts[0].is_first:
        module.subspace.project_rows(named["embedding.weight"])
    for layout in module.layouts:
        for index in range(layout.first_block, layout.end_block):
            if layout.is_last and index >= module.config.num_blocks - 2:
                continue
            module.subspace.project_columns(named[f"blocks.{index}.attention.o.weight"])
            module.subspace.project_columns(named[f"blocks.{index}.ffn.down.weight"])


def param_layout(module: nn.Module) -> tuple[ParamSlice, ...]:
    """Every parameter's place in the flat vector."""
    slices: list[ParamSlice] = []
    start = 0
    for name, param in module.named_parameters():
        slices.append(ParamSlice(name, tuple(param.shape), start, start + param.numel()))
        start += param.numel()
    return tuple(slices)


def flatten_params(module: nn.Module) -> Tensor:
    """All parameters in one new float32 vector [N], on their device."""
    return torch.cat([param.detach().reshape(-1).float() for param in module.parameters()])


@torch.no_grad()
def load_flat_params(module: nn.Module, params_N: Tensor) -> None:
    """Copies a flat vector [N] into the parameters, in their dtype and on their device.

    Raises ValueError for another length.
    """
    layout = param_layout(module)
    if params_N.shape != (layout[-1].end,):
        raise ValueError(f"the stage has {layout[-1].end} parameters, the vector's shape is {tuple(params_N.shape)}")
    for place, param in zip(layout, module.parameters(), strict=True):
        param.copy_(params_N[place.start : place.end].view(place.shape))


def matrix_params(module: nn.Module) -> frozenset[str]:
    """Names of the parameters that Muon takes.

    Matrices between hidden layers, not embeddings, anchors, norms or the head.
    """
    return frozenset(
        name
        for name, param in module.named_parameters()
        if param.ndim == 2 and name not in {"embedding.weight", "head.weight"} and ".anchor." not in name
    )


@lru_cache(maxsize=1024)  # building a stage takes milliseconds, and roles ask for the same few again and again
def stage_num_params(config: ModelConfig, layout: StageLayout, with_boundaries: bool = True) -> int:
    """Parameters of one stage, counted without allocating them."""
    with torch.device("meta"):
        stage = Stage(config, layout)
    return sum(
        param.numel()
        for name, param in stage.named_parameters()
        if with_boundaries or not name.startswith("boundaries.")
    )


@lru_cache(maxsize=1024)
def boundary_map_ranges(config: ModelConfig, layout: StageLayout) -> tuple[tuple[int, int], ...]:
    """Where the learned maps of a stage's halves of its boundaries lie in its flat vector, token tables left out: half-
    open ranges in order."""
    with torch.device("meta"):
        stage = Stage(config, layout)
    return tuple(
        (place.start, place.end)
        for place in param_layout(stage)
        if place.name.startswith("boundaries.") and ".anchor." not in place.name
    )


def num_params(
    config: ModelConfig, num_stages: int = 1, with_boundaries: bool = True, rule: SplitRule = "balanced"
) -> int:
    """Parameters of the whole model in that many stages, counted without allocating them."""
    return sum(stage_num_params(config, layout, with_boundaries) for layout in stage_layouts(config, num_stages, rule))
