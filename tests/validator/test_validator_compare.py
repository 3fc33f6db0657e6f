"""What counts as the same tensor."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from orion.common.config import Tolerance
from orion.validator.compare import compare

RULES = Tolerance(cosine_min=0.999, norm_ratio_min=0.99)
X = torch.linspace(-1, 2, 60).reshape(3, 4, 5)


def test_equal_bits_pass() -> None:
    comparison = compare(X, X.clone(), RULES)
    assert comparison.bit_equal
    assert (comparison.cosine, comparison.norm_ratio, comparison.failure) == (1.0, 1.0, None)


def test_the_replay_is_rounded_as_it_would_have_been_on_the_wire() -> None:
    assert compare(X.bfloat16(), X, RULES).bit_equal


def test_honest_noise_passes_without_being_equal() -> None:
    comparison = compare(X * (1 + 1e-3 * torch.sin(X)), X, RULES)
    assert comparison.failure is None
    assert not comparison.bit_equal
    assert compare(torch.zeros(3), -torch.zeros(3), RULES).failure is None


@pytest.mark.parametrize(
    ("claimed", "reason"),
    [
        (X * 1.02, "norm ratio"),
        (X * 0.98, "norm ratio"),
        (-X, "cosine"),
        (X.flip(0), "cosine"),
        (torch.zeros_like(X), "cosine"),
        (X[:2], "shape"),
        (torch.full_like(X, math.nan), "not finite"),
        (torch.full_like(X, math.inf), "not finite"),
    ],
)
def test_what_differs_fails(claimed: Tensor, reason: str) -> None:
    assert reason in str(compare(claimed, X, RULES).failure)


def test_a_replay_that_is_not_finite_passes_nobody() -> None:
    assert compare(X, torch.full_like(X, math.nan), RULES).failure is not None
    assert compare(X.to(torch.float16), X * 1e6, RULES).failure is not None


@given(st.floats(0, 2), st.integers(0, 1000))
def test_likeness_is_symmetric_and_bounded(noise: float, seed: int) -> None:
    other = X + noise * torch.randn(X.shape, generator=torch.Generator().manual_seed(seed))
    there, back = compare(X, other, RULES), compare(other, X, RULES)
    assert there.cosine == pytest.approx(back.cosine)
    assert there.norm_ratio == pytest.approx(back.norm_ratio)
    assert (there.failure is None) == (back.failure is None)
    assert -1 <= there.cosine <= 1
    assert 0 <= there.norm_ratio <= 1
