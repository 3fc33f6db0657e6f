"""What each kind of boundary sends and makes of what it receives."""

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from orion.common.model.boundary import Boundary
from orion.common.model.config import BoundaryKind, ModelConfig
from orion.common.model.params import init_params, project_params
from orion.common.model.splits import StageLayout, stage_layouts
from orion.common.model.stage import Pipeline, Stage, Transformer, token_loss

NANO = ModelConfig.preset("nano")
KINDS: tuple[BoundaryKind, ...] = ("anchored", "resbm", "linear", "iota", "subspace", "none")


def config_of(kind: BoundaryKind) -> ModelConfig:
    return NANO.with_boundary(kind, ratio=8)


def some_ids(num_tokens: int = 12, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(NANO.vocab_size, (2, num_tokens), generator=generator)


def two_stages(config: ModelConfig) -> tuple[Stage, Stage]:
    first, second = (Stage(config, layout) for layout in stage_layouts(config, 2))
    for stage in (first, second):
        init_params(stage, seed=3)
        with torch.no_grad():
            # Boundaries start near an identity; larger values show what they really compute.
            for name, param in stage.named_parameters():
                if name.startswith("boundaries."):
                    param.mul_(30)
    return first, second


@pytest.mark.parametrize("kind", KINDS)
def test_only_the_narrow_tensor_leaves_a_stage(kind: BoundaryKind) -> None:
    config = config_of(kind)
    first, _ = two_stages(config)
    width = config.width if kind == "none" else config.width // 8
    assert first(None, some_ids()).shape == (2, 12, width)


@pytest.mark.parametrize("kind", KINDS)
def test_a_token_changes_nothing_before_it(kind: BoundaryKind) -> None:
    model = Transformer(config_of(kind), 2)
    init_params(model, seed=0)
    ids = some_ids()
    changed = ids.clone()
    changed[:, 7] = (changed[:, 7] + 1) % NANO.vocab_size
    before, after = model(ids), model(changed)
    torch.testing.assert_close(before[:, :7], after[:, :7])
    assert not torch.allclose(before[:, 7:], after[:, 7:])


@pytest.mark.parametrize("kind", KINDS)
def test_ids_may_be_of_any_integer_type(kind: BoundaryKind) -> None:
    first, second = two_stages(config_of(kind))
    ids = some_ids()
    narrow = ids.int()
    assert torch.equal(second(first(None, ids), ids), second(first(None, narrow), narrow))
    logits = second(first(None, ids), ids)
    assert torch.equal(token_loss(logits, ids), token_loss(logits, narrow))


@pytest.mark.parametrize("kind", ["anchored", "subspace"])
def test_the_receiver_knows_the_tokens(kind: BoundaryKind) -> None:
    _, second = two_stages(config_of(kind))
    z = torch.zeros(2, 12, NANO.width // 8)
    assert not torch.allclose(second(z, some_ids(seed=1)), second(z, some_ids(seed=2)))


@pytest.mark.parametrize("kind", ["resbm", "linear", "iota"])
def test_without_an_anchor_only_the_narrow_tensor_speaks(kind: BoundaryKind) -> None:
    _, second = two_stages(config_of(kind))
    z = torch.randn(2, 12, NANO.width // 8, generator=torch.Generator().manual_seed(0))
    assert torch.equal(second(z, some_ids(seed=1)), second(z, some_ids(seed=2)))


@pytest.mark.parametrize("kind", ["anchored", "resbm"])
@pytest.mark.parametrize("maps", ["linear", "mlp"])
def test_residual_boundaries_start_near_the_identity_on_the_first_coordinates(kind: BoundaryKind, maps: str) -> None:
    config = NANO.with_boundary(kind, ratio=8, maps=maps)
    first = Stage(config, stage_layouts(config, 2)[0])
    plain = Stage(config_of("none"), stage_layouts(config, 2)[0])
    for stage in (first, plain):
        init_params(stage, seed=0)
    z, x = first(None, some_ids()), plain(None, some_ids())
    torch.testing.assert_close(z, x[..., : config.boundary_width], atol=0.05, rtol=0)


def test_a_factorised_anchor_has_its_rank() -> None:
    config = NANO.with_boundary("anchored", ratio=8, anchor_rank=4)
    second = Stage(config, stage_layouts(config, 2)[1])
    assert second.get_parameter("boundaries.0.receiver.anchor.table.weight").shape == (NANO.vocab_size, 4)
    assert second.get_parameter("boundaries.0.receiver.anchor.up.weight").shape == (NANO.width, 4)
    init_params(second, seed=0)
    z = torch.zeros(2, 12, config.boundary_width)
    assert not torch.allclose(second(z, some_ids(seed=1)), second(z, some_ids(seed=2)))


def attention_of(stage: Pipeline, block: int, x_BTD: Tensor) -> Tensor:
    cos_sin = stage.rotary(0, x_BTD.shape[1])
    module = stage.get_submodule(f"blocks.{block}")
    out: Tensor = module.get_submodule("attention")(module.get_submodule("attention_norm")(x_BTD), cos_sin)
    return out


def ffn_of(stage: Pipeline, block: int, x_BTD: Tensor) -> Tensor:
    module = stage.get_submodule(f"blocks.{block}")
    out: Tensor = module.get_submodule("ffn")(module.get_submodule("ffn_norm")(x_BTD))
    return out


def test_iota_is_the_public_module() -> None:
    """One block that receives a narrow tensor and sends one, written out as the published equations."""
    config = config_of("iota")
    stage = Stage(config, StageLayout(stage_index=1, num_stages=3, first_block=1, end_block=2))
    init_params(stage, seed=3)
    z = torch.randn(2, 12, config.boundary_width, generator=torch.Generator().manual_seed(0))
    u = functional.relu(z @ stage.get_parameter("boundaries.0.receiver.decoder.weight").T)
    t = attention_of(stage, 1, u)
    h = torch.cat((t[..., : config.boundary_width] + z, t[..., config.boundary_width :]), dim=-1)
    squeezed = functional.silu(ffn_of(stage, 1, h)) @ stage.get_parameter("boundaries.1.sender.encoder.weight").T
    torch.testing.assert_close(stage(z, some_ids()), squeezed + h[..., : config.boundary_width])


def test_resbm_is_a_narrow_identity_plus_normalised_maps() -> None:
    config = config_of("resbm")
    stage = Stage(config, StageLayout(stage_index=1, num_stages=3, first_block=1, end_block=2))
    init_params(stage, seed=3)
    z = torch.randn(2, 12, config.boundary_width, generator=torch.Generator().manual_seed(0))

    def unit(x: Tensor) -> Tensor:
        return x / (x.square().mean(-1, keepdim=True) + config.norm_eps).sqrt()

    x = unit(z) @ stage.get_parameter("boundaries.0.receiver.decoder.weight").T
    x = x + torch.cat((z, torch.zeros(2, 12, config.width - config.boundary_width)), dim=-1)
    a = x + attention_of(stage, 1, x)
    y = a + ffn_of(stage, 1, a)
    sent = y[..., : config.boundary_width] + unit(y) @ stage.get_parameter("boundaries.1.sender.encoder.weight").T
    torch.testing.assert_close(stage(z, some_ids()), sent)


@pytest.mark.parametrize("loudness", [1e-3, 1.0, 1e3])
def test_gradients_through_a_boundary_are_those_of_its_formula(loudness: float) -> None:
    """The shortcuts around the model's width: dividing after the map, identity and map as one matrix."""
    config = config_of("anchored")
    ids = some_ids(5)
    halves = Boundary(config, None, has_sender=True, has_receiver=True).double()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for param in halves.parameters():
            param.copy_(torch.randn(param.shape, generator=generator))
    encoder, decoder, table = (
        halves.get_parameter(name)
        for name in ("sender.encoder.weight", "receiver.decoder.weight", "receiver.anchor.table.weight")
    )
    after_BTD, ffn_BTD = (
        (loudness * torch.randn(2, 5, config.width, generator=generator, dtype=torch.float64)).requires_grad_()
        for _ in range(2)
    )

    def unit(x: Tensor) -> Tensor:
        return x / (x.square().mean(-1, keepdim=True) + config.norm_eps).sqrt()

    x_BTD = after_BTD + ffn_BTD
    z_BTC = x_BTD[..., : config.boundary_width] + unit(x_BTD) @ encoder.T
    padded_BTD = functional.pad(z_BTC, (0, config.width - config.boundary_width))
    expected_BTD = padded_BTD + unit(z_BTC) @ decoder.T + table[ids]
    input_BTD, _ = halves.receive(halves.send(after_BTD, ffn_BTD, ids), ids)
    torch.testing.assert_close(input_BTD, expected_BTD)
    outer_BTD = torch.randn(input_BTD.shape, generator=generator, dtype=torch.float64)
    sources = (after_BTD, ffn_BTD, encoder, decoder, table)
    gradients = torch.autograd.grad(input_BTD, sources, outer_BTD)
    torch.testing.assert_close(gradients, torch.autograd.grad(expected_BTD, sources, outer_BTD))


def test_the_subspace_boundary_loses_nothing() -> None:
    config = config_of("subspace")
    split = Transformer(config, 3)
    init_params(split, seed=0)
    ids = some_ids()
    assert split.subspace is not None
    whole = Transformer(config, 1)
    params = dict(split.named_parameters())
    with torch.no_grad():
        for name, param in whole.named_parameters():
            param.copy_(params[name])
    # One stage has no boundary and so no token table: its own embedding can hold the sum of both.
    with torch.no_grad():
        whole.get_parameter("embedding.weight").add_(split.subspace.tokens_VD)
    torch.testing.assert_close(split(ids), whole(ids), atol=1e-4, rtol=1e-4)


def test_projection_repairs_what_an_optimizer_step_moved_out_of_the_subspace() -> None:
    config = config_of("subspace")
    model = Transformer(config, 2)
    init_params(model, seed=0)
    assert model.subspace is not None
    basis = model.subspace.basis_DC
    with torch.no_grad():
        for param in model.parameters():
            param.add_(torch.randn(param.shape, generator=torch.Generator().manual_seed(1)))
    untouched = model.get_parameter("blocks.3.ffn.down.weight").clone()
    project_params(model)
    for name in ("blocks.0.attention.o.weight", "blocks.1.ffn.down.weight"):
        weight = model.get_parameter(name)
        torch.testing.assert_close(basis @ (basis.T @ weight), weight, atol=1e-5, rtol=1e-5)
    embedding = model.get_parameter("embedding.weight")
    torch.testing.assert_close(embedding @ basis @ basis.T, embedding, atol=1e-5, rtol=1e-5)
    assert torch.equal(model.get_parameter("blocks.3.ffn.down.weight"), untouched), "the last two blocks are free"


def test_projection_works_on_parameters_kept_apart() -> None:
    config = config_of("subspace")
    model = Transformer(config, 2)
    init_params(model, seed=0)
    apart = {name: param.detach().clone() + 1.0 for name, param in model.named_parameters()}
    before = model.get_parameter("blocks.0.ffn.down.weight").clone()
    project_params(model, apart)
    assert torch.equal(model.get_parameter("blocks.0.ffn.down.weight"), before)
    assert model.subspace is not None
    basis, moved = model.subspace.basis_DC, apart["blocks.0.ffn.down.weight"]
    torch.testing.assert_close(basis @ (basis.T @ moved), moved, atol=1e-5, rtol=1e-5)


def test_projection_leaves_other_kinds_alone() -> None:
    model = Transformer(config_of("anchored"), 2)
    init_params(model, seed=0)
    before = [param.clone() for param in model.parameters()]
    project_params(model)
    assert all(torch.equal(old, new) for old, new in zip(before, model.parameters(), strict=True))


@pytest.mark.parametrize("kind", ["anchored", "subspace"])
def test_tables_survive_materialising_and_casting(kind: BoundaryKind) -> None:
    config = config_of(kind)
    with torch.device("meta"):
        built = Transformer(config, 2)
    model = built.to_empty(device="cpu")
    init_params(model, seed=0)
    expected = Transformer(config, 2)
    init_params(expected, seed=0)
    ids = some_ids()
    assert torch.equal(model(ids), expected(ids))
    half = model.to(torch.bfloat16)
    assert half.rotary.cos.dtype == torch.float32
    assert half(ids).dtype == torch.bfloat16
    torch.testing.assert_close(half(ids).float(), expected(ids), atol=0.05, rtol=0.1)
