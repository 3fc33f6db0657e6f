"""Partitions, who reduces them, and whose contributions count."""

import itertools
import math
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orion.common.ids import Hotkey
from orion.common.train.partition import (
    ReducerAssignment,
    assign_reducers,
    partition_bounds,
    select_contributions,
    third_reducer,
)

SEEDS = st.integers(0, 2**63 - 1)
HOTKEYS = st.sets(st.integers(0, 999), min_size=1, max_size=12).map(
    lambda numbers: [Hotkey(f"5miner{number}") for number in sorted(numbers)]
)


@given(st.integers(1, 100_000), st.integers(1, 200))
def test_partitions_cover_the_vector_exactly_once(num_params: int, num_partitions: int) -> None:
    num_partitions = min(num_partitions, num_params)

    partitions = partition_bounds(num_params, num_partitions)

    assert [partition.index for partition in partitions] == list(range(num_partitions))
    assert partitions[0].start == 0
    assert partitions[-1].end == num_params
    assert all(left.end == right.start for left, right in itertools.pairwise(partitions))
    sizes = [partition.num_params for partition in partitions]
    assert min(sizes) >= 1
    assert max(sizes) - min(sizes) <= 1


@pytest.mark.parametrize("num_partitions", [0, 6])
def test_empty_partitions_are_refused(num_partitions: int) -> None:
    with pytest.raises(ValueError, match="cannot be cut"):
        partition_bounds(5, num_partitions)


@given(st.integers(1, 60), HOTKEYS, SEEDS)
def test_reducers_are_distinct_balanced_and_independent_of_order(
    num_partitions: int, reducers: list[Hotkey], seed: int
) -> None:
    partitions = partition_bounds(1000, num_partitions)

    assignments = assign_reducers(partitions, reducers, seed)

    assert assign_reducers(partitions, reducers[::-1], seed) == assignments
    assert [assignment.partition for assignment in assignments] == list(partitions)
    for assignment in assignments:
        assert len(assignment.reducers) == min(2, len(reducers))
        assert len(set(assignment.reducers)) == len(assignment.reducers)
    loads = Counter(hotkey for assignment in assignments for hotkey in assignment.reducers)
    counts = [loads[hotkey] for hotkey in reducers]
    assert sum(counts) == num_partitions * min(2, len(reducers))
    assert max(counts) - min(counts) <= 1


def test_pairs_change_with_the_seed() -> None:
    partitions = partition_bounds(1000, 8)
    reducers = [Hotkey(f"5miner{number}") for number in range(5)]

    drawn = {assign_reducers(partitions, reducers, seed) for seed in range(20)}

    assert len(drawn) == 20


def test_draw_is_the_same_in_every_version() -> None:
    reducers = [Hotkey(name) for name in ("5a", "5b", "5c")]

    assignments = assign_reducers(partition_bounds(10, 4), reducers, seed=7)

    assert [assignment.reducers for assignment in assignments] == [
        ("5b", "5c"),
        ("5c", "5a"),
        ("5a", "5b"),
        ("5a", "5c"),
    ]


@pytest.mark.parametrize("reducers", [[], ["5a", "5a"]])
def test_no_reducer_or_one_named_twice_is_refused(reducers: list[Hotkey]) -> None:
    with pytest.raises(ValueError, match="distinct"):
        assign_reducers(partition_bounds(10, 2), reducers, seed=0)


@given(HOTKEYS, SEEDS)
def test_a_dispute_goes_to_somebody_else(reducers: list[Hotkey], seed: int) -> None:
    (assignment,) = assign_reducers(partition_bounds(10, 1), reducers, seed)

    judge = third_reducer(assignment, reducers, seed)

    if len(reducers) <= 2:
        assert judge is None
    else:
        assert judge in set(reducers) - set(assignment.reducers)
        assert third_reducer(assignment, reducers[::-1], seed) == judge


def test_disputes_of_many_partitions_are_spread() -> None:
    reducers = [Hotkey(f"5miner{number}") for number in range(6)]
    pair = (reducers[0], reducers[1])

    judges = {
        third_reducer(ReducerAssignment(partition, pair), reducers, seed=3) for partition in partition_bounds(100, 50)
    }

    assert judges == set(reducers[2:])


def test_a_contribution_far_above_the_median_is_excluded() -> None:
    norms = {Hotkey("5a"): 1.0, Hotkey("5b"): 1.2, Hotkey("5c"): 0.9, Hotkey("5d"): 40.0, Hotkey("5e"): math.nan}

    selection = select_contributions(norms, ratio_max=3.0)

    assert selection.accepted == ("5a", "5b", "5c")
    assert selection.rejected == {"5d": "norm 40 exceeds 3 times the median", "5e": "not finite"}


def test_a_contribution_above_the_median_is_scaled_down() -> None:
    norms = {Hotkey("5a"): 1.0, Hotkey("5b"): 2.0, Hotkey("5c"): 8.0, Hotkey("5d"): 30.0, Hotkey("5e"): 0.5}

    selection = select_contributions(norms, ratio_max=10.0, clip_ratio=3.0)

    assert selection.accepted == ("5a", "5b", "5c", "5e")
    assert selection.scales == {"5c": 0.75}


def test_two_contributions_have_no_median_to_be_measured_by() -> None:
    norms = {Hotkey("5b"): 100.0, Hotkey("5a"): 1.0, Hotkey("5c"): math.inf}

    selection = select_contributions(norms, ratio_max=2.0)

    assert selection.accepted == ("5a", "5b")
    assert selection.rejected == {"5c": "not finite"}


@given(st.dictionaries(st.integers(0, 99).map(lambda n: Hotkey(f"5m{n}")), st.floats(0), max_size=12), st.floats(1, 10))
def test_every_contributor_is_accepted_or_rejected(norms: dict[Hotkey, float], ratio_max: float) -> None:
    selection = select_contributions(norms, ratio_max)

    assert sorted([*selection.accepted, *selection.rejected]) == sorted(norms)
    finite = [hotkey for hotkey, norm in norms.items() if math.isfinite(norm)]
    assert len(selection.accepted) * 2 >= len(finite)
