"""Chained stages compute what the whole model computes, forward and backward, whatever the boundary."""

import pytest
import torch
from torch import Tensor
from torch.func import functional_call

from orion.common.errors import ConfigError
from orion.common.model.config import BoundaryKind, ModelConfig
from orion.common.model.params import init_params
from orion.common.model.splits import SplitRule, StageLayout, stage_layouts
from orion.common.model.stage import Stage, Transformer, token_loss

NANO = ModelConfig.preset("nano")
KINDS: tuple[BoundaryKind, ...] = ("anchored", "resbm", "linear", "iota", "subspace", "none")
EXACT = {"atol": 1e-6, "rtol": 1e-5}


def batch() -> tuple[Tensor, Tensor]:
    ids = torch.randint(NANO.vocab_size, (3, 17), generator=torch.Generator().manual_seed(1))
    return ids[:, :-1], ids[:, 1:]


def trained_a_little(config: ModelConfig, num_stages: int, rule: SplitRule = "balanced") -> Transformer:
    """A model whose boundaries have moved away from their near-identity start."""
    model = Transformer(config, num_stages, rule)
    init_params(model, seed=7)
    with torch.no_grad():
        for index, param in enumerate(model.parameters()):
            param.add_(0.05 * torch.randn(param.shape, generator=torch.Generator().manual_seed(index)))
    return model


def stages_of(model: Transformer) -> list[Stage]:
    params = dict(model.named_parameters())
    stages = [Stage(model.config, layout) for layout in model.layouts]
    with torch.no_grad():
        for stage in stages:
            for name, param in stage.named_parameters():
                param.copy_(params[name])
    return stages


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("num_stages", [2, 3])
def test_chained_stages_equal_the_whole_model(kind: BoundaryKind, num_stages: int) -> None:
    model = trained_a_little(NANO.with_boundary(kind, ratio=8), num_stages)
    stages = stages_of(model)
    ids, targets = batch()
    loss = token_loss(model(ids), targets)
    loss.backward()

    # As over a network: each stage sees a detached input and hands back that input's gradient.
    inputs: list[Tensor | None] = [None]
    outputs: list[Tensor] = []
    for stage in stages:
        outputs.append(stage(inputs[-1], ids))
        inputs.append(outputs[-1].detach().requires_grad_())
    chained_loss = token_loss(outputs[-1], targets)
    torch.testing.assert_close(chained_loss, loss, **EXACT)
    chained_loss.backward()
    for output, received in reversed(list(zip(outputs[:-1], inputs[1:-1], strict=True))):
        assert received is not None
        output.backward(received.grad)

    gradients = {name: param.grad for name, param in model.named_parameters()}
    for stage in stages:
        for name, param in stage.named_parameters():
            assert param.grad is not None, f"{name} takes no part"
            expected = gradients[name]
            assert expected is not None
            torch.testing.assert_close(param.grad, expected, **EXACT, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("kind", KINDS)
def test_a_backward_that_recomputes_its_forward_gives_the_same_gradients(kind: BoundaryKind) -> None:
    model = trained_a_little(NANO.with_boundary(kind, ratio=8), 3)
    stage = stages_of(model)[1]
    ids, _ = batch()
    z = torch.randn(*ids.shape, model.config.boundary_width, generator=torch.Generator().manual_seed(2))
    gradient = torch.randn(*ids.shape, model.config.boundary_width, generator=torch.Generator().manual_seed(3))
    params = {name: param.detach() for name, param in stage.named_parameters()}

    def gradients() -> dict[str, Tensor]:
        leaves = {name: param.clone().requires_grad_() for name, param in params.items()}
        received = z.clone().requires_grad_()
        functional_call(stage, leaves, (received, ids)).backward(gradient)
        return {name: leaf.grad for name, leaf in {**leaves, "input": received}.items() if leaf.grad is not None}

    kept, recomputed = gradients(), gradients()
    assert kept.keys() == recomputed.keys() == params.keys() | {"input"}
    assert all(torch.equal(kept[name], recomputed[name]) for name in kept)
    assert all(torch.equal(param, params[name]) for name, param in stage.named_parameters()), "the module is untouched"


@pytest.mark.parametrize("kind", KINDS)
def test_one_stage_has_no_boundary(kind: BoundaryKind) -> None:
    plain, bounded = Transformer(NANO.with_boundary("none")), Transformer(NANO.with_boundary(kind, ratio=8))
    for model in (plain, bounded):
        init_params(model, seed=0)
    ids, _ = batch()
    assert torch.equal(plain(ids), bounded(ids))


def test_without_compression_the_number_of_stages_changes_nothing() -> None:
    config = NANO.with_boundary("none")
    models = [Transformer(config, num_stages) for num_stages in (1, 4)]
    for model in models:
        init_params(model, seed=0)
    ids, _ = batch()
    torch.testing.assert_close(models[0](ids), models[1](ids), **EXACT)


def test_a_split_by_cost_chains_too() -> None:
    model = trained_a_little(NANO, 3, rule="cost")
    assert [layout.num_blocks for layout in model.layouts] != [
        layout.num_blocks for layout in stage_layouts(NANO, 3, "balanced")
    ]
    ids, _ = batch()
    x: Tensor | None = None
    for stage in stages_of(model):
        x = stage(x, ids)
    torch.testing.assert_close(x, model(ids), **EXACT)


def test_a_tied_head_lives_in_one_stage_only() -> None:
    tied = NANO.with_fields(tie_embeddings=True)
    model = Transformer(tied)
    init_params(model, seed=0)
    assert "head.weight" not in dict(model.named_parameters())
    ids, targets = batch()
    token_loss(model(ids), targets).backward()
    with pytest.raises(ConfigError, match="tied"):
        Transformer(tied, 2)
    with pytest.raises(ConfigError, match="tied"):
        Stage(tied, stage_layouts(tied, 2)[0])


def test_a_layout_of_another_model_is_refused() -> None:
    with pytest.raises(ConfigError, match="ends at block 3"):
        Stage(NANO, StageLayout(stage_index=1, num_stages=2, first_block=1, end_block=3))


def test_a_sequence_longer_than_the_context_is_refused() -> None:
    model = Transformer(NANO)
    with pytest.raises(ValueError, match="context of 64"):
        model(torch.zeros(1, 65, dtype=torch.long))


@pytest.mark.parametrize("kind", KINDS)
def test_bfloat16_stays_close_to_float32(kind: BoundaryKind) -> None:
    """Under autocast over float32 parameters, and with bfloat16 parameters: the two ways a device may compute."""
    model = trained_a_little(NANO.with_boundary(kind, ratio=8), 2)
    ids, targets = batch()
    loss = token_loss(model(ids), targets)
    with torch.autocast("cpu", torch.bfloat16):
        mixed = token_loss(model(ids), targets)
    mixed.backward()
    assert all(param.grad is not None and param.grad.isfinite().all() for param in model.parameters())
    torch.testing.assert_close(mixed, loss, atol=0.05, rtol=0)
    half = token_loss(model.to(torch.bfloat16)(ids), targets)
    torch.testing.assert_close(half, loss, atol=0.05, rtol=0)
