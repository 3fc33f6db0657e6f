"""reduce_partition: two reducers get the same bytes, and what is unfit is left out by both."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from orion.common.ids import Hotkey
from orion.common.protocol.age import AGE_MAX
from orion.common.protocol.codec import decode, encode, mean_spec
from orion.common.protocol.reduction import (
    DUPLICATE,
    NORM_CLIP_RATIO,
    WRONG_SIZE,
    Reduction,
    Slice,
    encode_slice,
    reduce_partition,
    slice_spec,
)
from orion.common.train.compress import CodecName
from orion.common.train.outer import contribution_norm, trimmed_mean, weighted_mean_in_order

N = 300


def hotkey_of(replica: int) -> Hotkey:
    return Hotkey("5" + f"R{replica + 1}".ljust(47, "x"))


def values(seed: int, scale: float = 1.0) -> Tensor:
    return torch.randn(N, generator=torch.Generator().manual_seed(seed)) * scale


def slice_of(replica: int, values_N: Tensor, weight: int = 4, codec: CodecName = "none", age: int = 0) -> Slice:
    return Slice(hotkey_of(replica), weight, bytearray(encode_slice(codec, values_N).tobytes()), age)


def mean_of(reduction: Reduction) -> Tensor:
    assert reduction.mean is not None
    return decode(reduction.mean.tobytes(), mean_spec(N), reduction.mean.size_bytes)["mean"]


@settings(max_examples=25, deadline=None)
@given(
    seeds=st.lists(st.integers(0, 10**6), min_size=1, max_size=5, unique=True),
    codec=st.sampled_from(["none", "bf16", "int8"]),
    weights=st.lists(st.integers(1, 1000), min_size=5, max_size=5),
)
def test_two_reducers_get_the_same_bytes(seeds: list[int], codec: CodecName, weights: list[int]) -> None:
    def reduced() -> Reduction:
        slices = [slice_of(place, values(seed), weights[place], codec) for place, seed in enumerate(seeds)]
        return reduce_partition(codec, N, slices)

    first, second = reduced(), reduced()

    assert first.mean is not None and second.mean is not None
    assert first.mean.tobytes() == second.mean.tobytes()
    assert first.excluded == second.excluded == ()


def test_the_mean_is_weighted_in_the_order_of_the_plan() -> None:
    slices = [slice_of(2, values(1), 3), slice_of(0, values(2), 1), slice_of(1, values(3), 7)]

    expected = weighted_mean_in_order([(3.0, values(1)), (1.0, values(2)), (7.0, values(3))])

    assert torch.equal(mean_of(reduce_partition("none", N, slices)), expected)


def broken(kind: str) -> Slice:
    hotkey = hotkey_of(3)
    match kind:
        case "wrong size":
            return Slice(hotkey, 4, None)
        case "not finite":
            bad = values(9)
            bad[7] = float("nan")
            return Slice(hotkey, 4, bytearray(encode({"values": bad}).tobytes()))
        case "far too large":
            return slice_of(3, values(9, scale=1000.0))
        case "other layout":
            return Slice(hotkey, 4, bytearray(encode({"valueS": values(9)}).tobytes()))
        case _:
            return Slice(hotkey, 4, bytearray(b"\xff" * encode_slice("none", values(9)).size_bytes))


@pytest.mark.parametrize("kind", ["wrong size", "not finite", "far too large", "other layout", "garbage"])
def test_what_is_unfit_is_left_out_and_named(kind: str) -> None:
    good = [slice_of(0, values(1)), slice_of(1, values(2)), slice_of(2, values(3))]

    reduction = reduce_partition("none", N, [*good[:2], broken(kind), good[2]])

    assert [exclusion.hotkey for exclusion in reduction.excluded] == [hotkey_of(3)]
    assert reduction.excluded[0].reason
    assert torch.equal(mean_of(reduction), mean_of(reduce_partition("none", N, good)))


def test_with_nothing_fit_there_is_no_mean() -> None:
    reduction = reduce_partition("none", N, [Slice(hotkey_of(0), 1, None)])

    assert reduction.mean is None
    assert [exclusion.reason for exclusion in reduction.excluded] == [WRONG_SIZE]


def test_the_same_work_counts_once() -> None:
    good = [slice_of(0, values(1)), slice_of(1, values(2))]

    reduction = reduce_partition("none", N, [*good, slice_of(2, values(1), weight=100)])

    assert [(exclusion.hotkey, exclusion.reason) for exclusion in reduction.excluded] == [(hotkey_of(2), DUPLICATE)]
    assert torch.equal(mean_of(reduction), mean_of(reduce_partition("none", N, good)))


def test_zeros_are_nobody_s_work() -> None:
    zeros = torch.zeros(N)

    reduction = reduce_partition("none", N, [slice_of(0, zeros), slice_of(1, zeros), slice_of(2, zeros)])

    assert reduction.excluded == ()
    assert torch.equal(mean_of(reduction), zeros)


def test_what_is_large_is_scaled_down_to_the_bound() -> None:
    others = [values(1), values(2), values(3), values(4)]
    large = values(5, scale=6.0)
    norms = sorted(contribution_norm(values_N) for values_N in (*others, large))
    clipped = torch.mul(large, NORM_CLIP_RATIO * norms[2] / norms[-1])

    reduction = reduce_partition("none", N, [slice_of(place, item) for place, item in enumerate((*others, large))])

    expected = weighted_mean_in_order([(4.0, item) for item in (*others, clipped)])
    assert reduction.excluded == ()
    assert torch.equal(mean_of(reduction), expected)
    assert contribution_norm(clipped) == pytest.approx(NORM_CLIP_RATIO * norms[2], rel=1e-6)


@pytest.mark.parametrize("num_replicas", [1, 2])
def test_one_or_two_replicas_are_measured_by_nothing(num_replicas: int) -> None:
    slices = [slice_of(place, values(place, scale=1000.0**place)) for place in range(num_replicas)]

    reduction = reduce_partition("none", N, slices)

    assert reduction.excluded == ()
    expected = weighted_mean_in_order([(4.0, values(place, scale=1000.0**place)) for place in range(num_replicas)])
    assert torch.equal(mean_of(reduction), expected)


def test_a_trimmed_mean_is_moved_by_nobody_who_is_alone() -> None:
    honest = [values(0) + 0.01 * values(seed) for seed in range(1, 5)]
    slices = [slice_of(place, item) for place, item in enumerate((*honest, -2.0 * values(0)))]

    trimmed = mean_of(reduce_partition("none", N, slices, "trimmed"))

    stacked = torch.stack(honest)
    assert bool((trimmed >= stacked.amin(dim=0) - 1e-6).all()) and bool((trimmed <= stacked.amax(dim=0) + 1e-6).all())
    plain = mean_of(reduce_partition("none", N, slices))
    assert not bool((plain >= stacked.amin(dim=0)).all()), "the one that is alone would have moved the plain mean"


def test_of_fewer_than_five_nothing_is_trimmed() -> None:
    slices = [slice_of(place, values(place), weight=place + 1) for place in range(4)]

    assert torch.equal(
        mean_of(reduce_partition("none", N, slices, "trimmed")), mean_of(reduce_partition("none", N, slices))
    )


@settings(max_examples=20, deadline=None)
@given(st.permutations(range(6)), st.integers(1, 2))
def test_any_order_of_arrival_gives_the_same_trimmed_bytes(order: list[int], num_cut: int) -> None:
    tensors = [values(seed) for seed in range(5)]
    tensors.append(torch.where(torch.arange(N) % 2 == 0, torch.zeros(N), -torch.zeros(N)))

    assert (
        trimmed_mean([tensors[place] for place in order], num_cut).numpy().tobytes()
        == trimmed_mean(tensors, num_cut).numpy().tobytes()
    )


def test_a_trimmed_mean_is_the_mean_of_what_is_left() -> None:
    tensors = [torch.tensor([1.0, 9.0]), torch.tensor([2.0, -9.0]), torch.tensor([3.0, 1.0]), torch.tensor([50.0, 2.0])]

    assert torch.equal(trimmed_mean(tensors, 1), torch.tensor([2.5, 1.5]))
    with pytest.raises(ValueError, match="cannot be cut"):
        trimmed_mean(tensors, 2)


@pytest.mark.parametrize("codec", ["none", "bf16", "int8"])
def test_a_slice_has_the_size_that_its_spec_says(codec: CodecName) -> None:
    body = encode_slice(codec, values(1))

    assert decode(body.tobytes(), slice_spec(codec, N), body.size_bytes).keys() == slice_spec(codec, N).keys()


@settings(max_examples=25, deadline=None)
@given(weights=st.lists(st.integers(1, 1000), min_size=2, max_size=2), age=st.integers(0, AGE_MAX))
def test_what_is_late_weighs_less_and_lengthens_no_step(weights: list[int], age: int) -> None:
    slices = [slice_of(0, values(1), weights[0], age=age), slice_of(1, values(2), weights[1])]
    mean_N = mean_of(reduce_partition("none", N, slices))

    discounted = weights[0] * 0.5**age
    share = discounted / (discounted + weights[1])
    torch.testing.assert_close(mean_N, values(1) * share + values(2) * (1 - share), rtol=1e-5, atol=1e-6)
    longest = max(contribution_norm(values(1)), contribution_norm(values(2)))
    assert contribution_norm(mean_N) <= longest * (1 + 1e-6)


@pytest.mark.parametrize("age", [0, AGE_MAX])
def test_the_same_age_for_all_changes_nothing(age: int) -> None:
    slices = [slice_of(replica, values(replica), 3 + replica, age=age) for replica in range(3)]
    timely = [slice_of(replica, values(replica), 3 + replica) for replica in range(3)]
    assert torch.equal(mean_of(reduce_partition("none", N, slices)), mean_of(reduce_partition("none", N, timely)))


def test_a_late_one_and_a_timely_one_of_a_miner_are_one_voice() -> None:
    # Two miners of five that are late on purpose would else be four voices of seven, and set the median.
    loud = [slice_of(replica, values(replica, 100.0), age=1) for replica in range(2)]
    loud += [slice_of(replica, values(10 + replica, 100.0)) for replica in range(2)]
    quiet = [slice_of(replica, values(replica)) for replica in range(2, 5)]

    reduction = reduce_partition("none", N, [*loud, *quiet])

    assert {exclusion.voice for exclusion in reduction.excluded} == {
        (hotkey_of(0), 0),
        (hotkey_of(0), 1),
        (hotkey_of(1), 0),
        (hotkey_of(1), 1),
    }
    assert torch.equal(mean_of(reduction), mean_of(reduce_partition("none", N, quiet)))


def test_a_miner_s_own_late_work_repeated_counts_once() -> None:
    slices = [slice_of(0, values(1), age=1), slice_of(0, values(1)), slice_of(1, values(2))]
    reduction = reduce_partition("none", N, slices)
    assert [(exclusion.voice, exclusion.reason) for exclusion in reduction.excluded] == [((hotkey_of(0), 0), DUPLICATE)]
