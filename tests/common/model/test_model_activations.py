"""The formula for a graph's bytes against what autograd really saves."""

import pytest
import torch
from torch.func import functional_call

from orion.common.model.activations import graph_bytes
from orion.common.model.config import BoundaryKind, ModelConfig
from orion.common.model.splits import StageLayout, stage_layouts
from orion.common.model.stage import Stage, token_loss

SLACK = 1.15
"""Of the formula over what is saved, where a microbatch is not tiny."""


def saved_bytes(config: ModelConfig, layout: StageLayout, shape: tuple[int, int], dtype: torch.dtype) -> int:
    """Bytes of the distinct storages that a stage's graph saves, without those of parameters and tables."""
    stage = Stage(config, layout)
    params = {name: param.detach().to(dtype).requires_grad_() for name, param in stage.named_parameters()}
    lasting = {tensor.untyped_storage().data_ptr() for tensor in (*params.values(), *stage.buffers())}
    saved: dict[int, torch.Tensor] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        saved.setdefault(tensor.untyped_storage().data_ptr(), tensor)
        return tensor

    ids_BT = torch.zeros(shape, dtype=torch.int64)
    x_BTC = None if layout.is_first else torch.ones(*shape, config.boundary_width, dtype=dtype).requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = functional_call(stage, params, (x_BTC, ids_BT))
        if layout.is_last:
            output = token_loss(output, ids_BT)
    assert output.requires_grad
    return sum(tensor.untyped_storage().nbytes() for place, tensor in saved.items() if place not in lasting)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("kind", "fields"),
    [
        ("anchored", {}),
        ("anchored", {"anchor_rank": 8}),
        ("resbm", {"maps": "mlp"}),
        ("linear", {}),
        ("iota", {}),
        ("subspace", {}),
        ("none", {}),
    ],
)
def test_the_formula_bounds_what_autograd_saves(
    kind: BoundaryKind, fields: dict[str, object], dtype: torch.dtype
) -> None:
    config = ModelConfig.preset("nano").with_boundary(kind, ratio=8, **fields)
    for num_stages in (1, 3):
        for layout in stage_layouts(config, num_stages):
            for sequences, sequence_length in ((1, 8), (4, 64)):
                saved = saved_bytes(config, layout, (sequences, sequence_length), dtype)
                bound = graph_bytes(
                    config,
                    layout,
                    sequence_length=sequence_length,
                    sequences=sequences,
                    value_bytes=dtype.itemsize,
                )
                assert saved <= bound, f"stage {layout.stage_index} of {num_stages}"
                if sequences > 1:
                    assert bound <= SLACK * saved, f"stage {layout.stage_index} of {num_stages}: far too much"


@pytest.mark.parametrize("stage_index", [0, 1, 2])
def test_the_formula_bounds_the_local_model(stage_index: int) -> None:
    config = ModelConfig.preset("local")
    layout = stage_layouts(config, 3)[stage_index]
    saved = saved_bytes(config, layout, (8, 128), torch.float32)
    bound = graph_bytes(config, layout, sequence_length=128, sequences=8, value_bytes=4)
    assert saved <= bound <= 1.02 * saved
