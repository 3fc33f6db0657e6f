"""The outer step: golden numbers, equality of bytes, and the mean it starts from."""

import itertools
import math

import pytest
import torch
from blake3 import blake3
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from orion.common.train.config import OuterConfig
from orion.common.train.outer import (
    OuterState,
    apply_outer_step,
    contribution_check,
    contribution_norm,
    initial_outer_state,
    momentum_at,
    outline_digest,
    part_bytes,
    state_bounds,
    state_digest,
    state_outline,
    weighted_mean_in_order,
)

CONFIG = OuterConfig(lr=0.7, momentum=0.9)


def random_N(seed: int, num_params: int = 1003) -> Tensor:
    return torch.randn(num_params, generator=torch.Generator().manual_seed(seed))


def bits(tensor_N: Tensor) -> bytes:
    return tensor_N.numpy().tobytes()


def test_golden_numbers_of_three_steps() -> None:
    state = initial_outer_state(torch.tensor([1.0, -2.0, 0.5]))
    for d_N in ([0.1, -0.2, 0.0], [0.05, 0.1, -0.3], [0.0, 0.0, 0.1]):
        state = apply_outer_step(state, torch.tensor(d_N), CONFIG)

    # By hand: m1 = d1, m2 = 0.9 m1 + d2, m3 = 0.9 m2 + d3, θ = θ − 0.7 (d + 0.9 m) at each.
    torch.testing.assert_close(state.momentum_N, torch.tensor([0.126, -0.072, -0.17]), rtol=1e-6, atol=0)
    torch.testing.assert_close(state.anchor_N, torch.tensor([0.66442, -1.70824, 0.9361]), rtol=1e-6, atol=0)
    assert state.outer_step == 3


def test_golden_digest_of_bytes() -> None:
    ramp_N = torch.arange(101, dtype=torch.float32) / 128
    state = initial_outer_state(ramp_N)
    for step in range(4):
        state = apply_outer_step(state, (ramp_N - 0.5) * (step + 1), CONFIG)

    assert state_digest(state) == "d1dbc80e86677ebf7371db62879732363cf0f20628bf00536bc0ec6700a3f47c"


def test_plain_averaging_is_the_step_without_momentum() -> None:
    anchor_N, local_N = random_N(1), random_N(2)

    state = apply_outer_step(initial_outer_state(anchor_N), anchor_N - local_N, OuterConfig(lr=1.0, momentum=0.0))

    torch.testing.assert_close(state.anchor_N, local_N, rtol=1e-5, atol=1e-6)


@given(st.integers(0, 2**31), st.lists(st.integers(0, 1003), max_size=5))
def test_steps_of_slices_are_slices_of_the_step(seed: int, cuts: list[int]) -> None:
    state = OuterState(random_N(seed), random_N(seed + 1), 3)
    d_N = random_N(seed + 2)
    bounds = sorted({0, *cuts, 1003})

    whole = apply_outer_step(state, d_N, CONFIG)
    parts = [
        apply_outer_step(state.slice(start, end), d_N[start:end].clone(), CONFIG)
        for start, end in itertools.pairwise(bounds)
    ]

    assert bits(torch.cat([part.anchor_N for part in parts])) == bits(whole.anchor_N)
    assert bits(torch.cat([part.momentum_N for part in parts])) == bits(whole.momentum_N)


def test_each_operation_is_rounded_on_its_own() -> None:
    state, d_N = OuterState(random_N(1), random_N(2), 0), random_N(3)
    # The same in fp64, rounded to fp32 after every single operation, as IEEE 754 demands of any device.
    mu, lr = (torch.tensor(x, dtype=torch.float32).double() for x in (CONFIG.momentum, CONFIG.lr))

    def rounded(x_N: Tensor) -> Tensor:
        return x_N.float().double()

    momentum_N = rounded(rounded(mu * state.momentum_N.double()) + d_N.double())
    update_N = rounded(lr * rounded(rounded(mu * momentum_N) + d_N.double()))
    anchor_N = rounded(state.anchor_N.double() - update_N)

    stepped = apply_outer_step(state, d_N, CONFIG)

    assert bits(stepped.momentum_N) == bits(momentum_N.float())
    assert bits(stepped.anchor_N) == bits(anchor_N.float())


def test_the_given_state_is_left_alone() -> None:
    state = OuterState(random_N(1), random_N(2), 5)
    before = state_digest(state)

    apply_outer_step(state, random_N(3), CONFIG)

    assert state_digest(state) == before


def test_digest_covers_anchor_momentum_and_step() -> None:
    state = OuterState(random_N(1), random_N(2), 5)
    changed_N = state.momentum_N.clone()
    changed_N[-1] = torch.nextafter(changed_N[-1], torch.tensor(9.0))

    digests = {
        state_digest(state),
        state_digest(OuterState(state.anchor_N, changed_N, 5)),
        state_digest(OuterState(state.momentum_N, state.anchor_N, 5)),
        state_digest(OuterState(state.anchor_N, state.momentum_N, 6)),
    }

    assert len(digests) == 4
    assert state_digest(OuterState(state.anchor_N.clone(), state.momentum_N.clone(), 5)) in digests


@pytest.mark.parametrize("num_params", [1, 1023, 1024, 1025, 16 * 1024 + 5, 100_000])
def test_a_state_is_its_parts_and_each_can_be_checked_by_itself(num_params: int) -> None:
    state = OuterState(random_N(1, num_params), random_N(2, num_params), 5)
    bounds, outline = state_bounds(num_params), state_outline(state)

    assert [start for start, _ in bounds[1:]] == [end for _, end in bounds[:-1]]
    assert (bounds[0][0], bounds[-1][1]) == (0, num_params)
    assert len(outline) == len(bounds) <= 18
    assert state_digest(state) == outline_digest(5, num_params, outline)
    for (start, end), digest in zip(bounds, outline, strict=True):
        body = part_bytes(state, start, end)
        assert blake3(body).hexdigest() == digest
        both_N = torch.frombuffer(bytearray(body), dtype=torch.float32)
        assert torch.equal(both_N, torch.cat([state.anchor_N[start:end], state.momentum_N[start:end]]))


def test_momentum_warms_up_linearly() -> None:
    config = OuterConfig(momentum=0.9, momentum_start=0.5, num_momentum_warmup_steps=4)

    assert [momentum_at(config, step) for step in (0, 2, 4, 100)] == pytest.approx([0.5, 0.7, 0.9, 0.9])


@pytest.mark.parametrize("wrong_N", [torch.zeros(4), torch.zeros(3, dtype=torch.float64), torch.zeros(3, 1)])
def test_a_mean_that_does_not_fit_is_refused(wrong_N: Tensor) -> None:
    with pytest.raises(ValueError, match="mean pseudo-gradient"):
        apply_outer_step(initial_outer_state(torch.zeros(3)), wrong_N, CONFIG)


def test_a_state_must_be_flat_fp32_of_one_length() -> None:
    with pytest.raises(ValueError, match="flat fp32"):
        OuterState(torch.zeros(2, 2), torch.zeros(2, 2), 0)
    with pytest.raises(ValueError, match="differ"):
        OuterState(torch.zeros(2), torch.zeros(3), 0)
    with pytest.raises(ValueError, match="negative"):
        OuterState(torch.zeros(2), torch.zeros(2), -1)


@given(st.lists(st.tuples(st.integers(1, 10_000), st.integers(0, 2**31)), min_size=1, max_size=6))
def test_mean_is_near_the_exact_one_and_repeats_its_bytes(parts: list[tuple[int, int]]) -> None:
    slices = [(float(weight), random_N(seed, 37)) for weight, seed in parts]

    mean_N = weighted_mean_in_order(slices)

    exact_N = sum(weight * tensor_N.double() for weight, tensor_N in slices) / sum(weight for weight, _ in slices)
    torch.testing.assert_close(mean_N.double(), exact_N, rtol=1e-5, atol=1e-5)
    assert bits(weighted_mean_in_order([(weight, tensor_N.clone()) for weight, tensor_N in slices])) == bits(mean_N)
    assert bits(weighted_mean_in_order([(weight, tensor_N[5:20].clone()) for weight, tensor_N in slices])) == bits(
        mean_N[5:20].clone()
    )


def test_mean_of_equals_is_exact() -> None:
    x_N = random_N(4)

    assert bits(weighted_mean_in_order([(3.0, x_N), (3.0, x_N)])) == bits(x_N)


@pytest.mark.parametrize(
    ("slices", "reason"),
    [
        ([], "at least one"),
        ([(0.0, torch.zeros(2))], "not positive"),
        ([(math.inf, torch.zeros(2))], "not positive"),
        ([(1.0, torch.zeros(2)), (1.0, torch.zeros(3))], "shape"),
        ([(1.0, torch.zeros(2, dtype=torch.bfloat16))], "bfloat16"),
    ],
)
def test_slices_that_have_no_mean_are_refused(slices: list[tuple[float, Tensor]], reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        weighted_mean_in_order(slices)


@pytest.mark.parametrize(
    ("value", "reason"),
    [(1.0, None), (math.nan, "not finite"), (math.inf, "not finite"), (-math.inf, "not finite"), (50.0, "exceeds 10")],
)
def test_contributions_are_checked(value: float, reason: str | None) -> None:
    tensor_N = torch.zeros(1000)
    tensor_N[500] = value

    found = contribution_check(tensor_N, norm_bound=10.0)

    assert found is None if reason is None else found is not None and reason in found


def test_norm_is_exact_where_fp32_sums_are_not() -> None:
    assert contribution_norm(torch.full((3_000_000,), 0.5)) == pytest.approx(0.5 * math.sqrt(3_000_000), rel=1e-13)


def test_a_norm_does_not_depend_on_how_a_vector_is_stored_or_added_up() -> None:
    tensor_N = random_N(7, num_params=1_500_007)
    strided_N = torch.stack((tensor_N, torch.zeros_like(tensor_N)), dim=1)[:, 0]
    before = torch.get_num_threads()
    norm = contribution_norm(tensor_N)
    torch.set_num_threads(before + 1)
    try:
        assert contribution_norm(strided_N) == norm == contribution_norm(tensor_N.clone())
    finally:
        torch.set_num_threads(before)
    assert norm == pytest.approx(float(tensor_N.double().norm()), rel=1e-12)
