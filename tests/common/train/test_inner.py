"""The inner optimizer: who gets which rule, clipping, reset."""

import math

import pytest
import torch
from torch import Tensor

from orion.common.train.config import InnerConfig
from orion.common.train.inner import InnerOptimizer, build_inner_optimizer, clip_in_place, clip_share

FACTOR = 0.5


def make_params() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    shapes = {"blocks.0.up": (8, 4), "blocks.0.down": (4, 8), "embedding": (16, 4), "norm": (4,)}
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def make_gradients(seed: int = 2) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(param.shape, generator=generator) for name, param in make_params().items()}


def build(params: dict[str, Tensor], **fields: object) -> InnerOptimizer:
    config = InnerConfig.model_validate({"weight_decay": 0.0, "lr_matrix": 0.02, "lr_other": 0.01, **fields})
    return build_inner_optimizer(params, {"blocks.0.up", "blocks.0.down"}, config)


def test_muon_moves_matrices_by_orthogonal_steps_and_adamw_the_rest_by_signs() -> None:
    params, before = make_params(), make_params()
    gradients = make_gradients()

    build(params).step(gradients, FACTOR)

    for name in ("blocks.0.up", "blocks.0.down"):
        singular = torch.linalg.svdvals(before[name] - params[name])
        # Muon's size for a matrix of 8 by 4 is 0.2 × √8 × rate; its singular values are equal to within its iteration.
        size = 0.02 * FACTOR * 0.2 * math.sqrt(8)
        assert 0.5 * size < float(singular.min()) <= float(singular.max()) < 1.5 * size
    for name in ("embedding", "norm"):
        expected = before[name] - 0.01 * FACTOR * gradients[name].sign()
        torch.testing.assert_close(params[name], expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("optimizer", ["adamw", "nadam"])
def test_other_optimizers_take_everything_at_their_groups_rates(optimizer: str) -> None:
    params, before = make_params(), make_params()

    build(params, optimizer=optimizer).step(make_gradients(), 1.0)

    steps = {name: (before[name] - params[name]).abs() for name in params}
    ratio = float(steps["blocks.0.up"].mean() / steps["embedding"].mean())
    assert ratio == pytest.approx(2.0, rel=1e-3)
    assert float(steps["norm"].std()) == pytest.approx(0.0, abs=1e-5)


def test_weight_decay_spares_norms() -> None:
    params, before = make_params(), make_params()
    zeros = {name: torch.zeros_like(param) for name, param in params.items()}

    build(params, weight_decay=0.1).step(zeros, 1.0)

    torch.testing.assert_close(params["embedding"], before["embedding"] * (1 - 0.01 * 0.1))
    torch.testing.assert_close(params["blocks.0.up"], before["blocks.0.up"] * (1 - 0.02 * 0.1))
    assert torch.equal(params["norm"], before["norm"])


@pytest.mark.parametrize("optimizer", ["muon", "adamw", "nadam"])
def test_reset_is_as_good_as_new(optimizer: str) -> None:
    used, new = make_params(), make_params()
    used_optimizer, new_optimizer = build(used, optimizer=optimizer), build(new, optimizer=optimizer)
    for seed in range(3):
        used_optimizer.step(make_gradients(seed), 1.0)
    for name, param in used.items():
        param.copy_(new[name])

    used_optimizer.reset()
    for seed in range(5, 8):
        used_optimizer.step(make_gradients(seed), 0.3)
        new_optimizer.step(make_gradients(seed), 0.3)

    assert all(torch.equal(used[name], new[name]) for name in new)


def test_gradients_are_not_kept() -> None:
    params = make_params()

    build(params).step(make_gradients(), 1.0)

    assert all(param.grad is None for param in params.values())


def test_unknown_matrix_names_are_refused() -> None:
    with pytest.raises(ValueError, match="no parameters"):
        build_inner_optimizer(make_params(), {"blocks.9.up"}, InnerConfig())


def test_shares_of_the_norm_bound_add_up_to_it() -> None:
    shares = [clip_share(stage_params, 100, 2.0) for stage_params in (20, 30, 50)]

    assert math.hypot(*shares) == pytest.approx(2.0)
    assert clip_share(100, 100, 2.0) == 2.0
    with pytest.raises(ValueError, match="stage of 101"):
        clip_share(101, 100, 2.0)


def test_clipping_scales_all_gradients_together() -> None:
    gradients = [torch.full((3, 4), 2.0), torch.full((4,), 1.0)]

    found = clip_in_place(gradients, 1.0)

    assert found.norm == pytest.approx(math.sqrt(52))
    assert found.clipped
    assert math.sqrt(sum(float(gradient.square().sum()) for gradient in gradients)) == pytest.approx(1.0, rel=1e-4)
    assert float(gradients[0][0, 0] / gradients[1][0]) == pytest.approx(2.0)


@pytest.mark.parametrize(("norm_bound", "expected"), [(1.0, 1.0), (9.0, math.sqrt(13))])
def test_clipping_looks_at_what_was_scaled_first(norm_bound: float, expected: float) -> None:
    gradients = [torch.full((3, 4), 2.0), torch.full((4,), 1.0)]

    found = clip_in_place(gradients, norm_bound, 0.5)

    assert found.norm == pytest.approx(math.sqrt(13))
    assert found.clipped is (norm_bound < found.norm)
    left = math.sqrt(sum(float(gradient.square().sum()) for gradient in gradients))
    assert left == pytest.approx(expected, rel=1e-4)


def test_clipping_leaves_small_and_broken_gradients_alone() -> None:
    small, broken = [torch.ones(4)], [torch.tensor([1.0, math.nan]), torch.tensor([math.inf])]

    assert not clip_in_place(small, 2.0).clipped
    assert torch.equal(small[0], torch.ones(4))
    found = clip_in_place(broken, 2.0)
    assert not found.is_finite
    assert not found.clipped
    assert float(broken[0][0]) == 1.0
