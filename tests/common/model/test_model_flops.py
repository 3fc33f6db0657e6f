"""The formula counts what the modules really multiply."""

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from orion.common.model.config import BoundaryKind, ModelConfig
from orion.common.model.flops import forward_flops_per_token
from orion.common.model.params import init_params
from orion.common.model.splits import stage_layouts
from orion.common.model.stage import Stage

NANO = ModelConfig.preset("nano")


@pytest.mark.parametrize("kind", ["anchored", "resbm", "linear", "iota", "subspace", "none"])
@pytest.mark.parametrize("options", [{}, {"maps": "mlp"}, {"anchor_rank": 4}])
def test_the_formula_agrees_with_the_operations_counted(kind: BoundaryKind, options: dict[str, object]) -> None:
    config = NANO.with_boundary(kind, ratio=8, **options)
    num_sequences, num_tokens = 3, 16
    ids = torch.zeros(num_sequences, num_tokens, dtype=torch.long)
    x: torch.Tensor | None = None
    for layout in stage_layouts(config, 3):
        stage = Stage(config, layout)
        init_params(stage, seed=0)
        counter = FlopCounterMode(display=False)
        with counter, torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
            x = stage(x, ids)
        counts = counter.get_flop_counts()["Global"]
        # The plain kernel multiplies whole squares; a causal one needs (T + 1) / 2T of each.
        attention = counts[torch.ops.aten.bmm] * (num_tokens + 1) // (2 * num_tokens)
        expected = (counts[torch.ops.aten.mm] + attention) // (num_sequences * num_tokens)
        if kind in ("anchored", "resbm") and config.boundary.maps == "linear" and layout.stage_index > 0:
            # The receiver multiplies with the identity beside its map, to save passes; that is no work of the model's.
            expected -= 2 * config.boundary_width * config.width
        assert forward_flops_per_token(config, layout, num_tokens) == expected


def test_an_inner_stage_of_orion_100b_costs_what_is_published() -> None:
    config = ModelConfig.preset("100b").with_boundary("none")
    inner = stage_layouts(config, 16)[1]
    # 103.7 TFLOP for a microbatch of 8,000 tokens, attention scores not counted.
    per_microbatch = 8000 * (forward_flops_per_token(config, inner, 800) - 6 * 2 * config.attention_width * 801)
    assert per_microbatch == pytest.approx(103.7e12, rel=1e-3)


def test_longer_sequences_cost_more_attention_only() -> None:
    layout = stage_layouts(NANO, 2)[0]
    short, long = (forward_flops_per_token(NANO, layout, length) for length in (16, 32))
    assert long - short == layout.num_blocks * 2 * NANO.attention_width * 16
