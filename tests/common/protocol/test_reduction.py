"""reduce_partition: two reducers get the same bytes, and what is unfit is left out by both."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from orion.common.ids import Hotkey
from orion.common.protocol.codec import decode, encode, mean_spec
from orion.common.protocol.reduction import WRONG_SIZE, Reduction, Slice, encode_slice, reduce_partition, slice_spec
from orion.common.train.compress import CodecName
from orion.common.train.outer import weighted_mean_in_order

N = 300


def hotkey_of(replica: int) -> Hotkey:
    return Hotkey("5" + f"R{replica + 1}".ljust(47, "x"))


def values(seed: int, scale: float = 1.0) -> Tensor:
    return torch.randn(N, generator=torch.Generator().manual_seed(seed)) * scale


def slice_of(replica: int, values_N: Tensor, weight: int = 4, codec: CodecName = "none") -> Slice:
    return Slice(hotkey_of(replica), weight, bytearray(encode_slice(codec, values_N).tobytes()))


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


@pytest.mark.parametrize("codec", ["none", "bf16", "int8"])
def test_a_slice_has_the_size_that_its_spec_says(codec: CodecName) -> None:
    body = encode_slice(codec, values(1))

    assert decode(body.tobytes(), slice_spec(codec, N), body.size_bytes).keys() == slice_spec(codec, N).keys()
