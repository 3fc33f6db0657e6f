"""How blocks are divided among stages."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orion.common.errors import ConfigError
from orion.common.model.config import ModelConfig
from orion.common.model.splits import (
    SplitRule,
    StageLayout,
    balanced_stage_sizes,
    cost_stage_sizes,
    stage_layouts,
)

divisible = st.integers(1, 60).flatmap(lambda blocks: st.tuples(st.just(blocks), st.integers(1, blocks)))


@pytest.mark.parametrize(
    ("num_blocks", "num_stages", "sizes"),
    [
        (90, 16, (4, *[6] * 12, 5, 5, 4)),
        (16, 3, (4, 8, 4)),
        (6, 3, (2, 2, 2)),
        (4, 4, (1, 1, 1, 1)),
        (7, 2, (3, 4)),
        (5, 1, (5,)),
        (50, 10, (4, 6, 6, 5, 5, 5, 5, 5, 5, 4)),
    ],
)
def test_the_public_rule(num_blocks: int, num_stages: int, sizes: tuple[int, ...]) -> None:
    assert balanced_stage_sizes(num_blocks, num_stages) == sizes


@given(divisible)
def test_balanced_sizes_cover_all_blocks_and_spare_the_ends(shape: tuple[int, int]) -> None:
    num_blocks, num_stages = shape
    sizes = balanced_stage_sizes(num_blocks, num_stages)
    assert len(sizes) == num_stages
    assert sum(sizes) == num_blocks
    assert min(sizes) >= 1
    inner = sizes[1:-1]
    assert max(inner, default=1) - min(inner, default=1) <= 1
    assert list(inner) == sorted(inner, reverse=True)
    if num_stages > 2:
        assert sizes[0] == sizes[-1] <= min(inner)


def dearest(sizes: tuple[int, ...], embedding_cost: float, head_cost: float) -> float:
    costs = [float(size) for size in sizes]
    costs[0] += embedding_cost
    costs[-1] += head_cost
    return max(costs)


def every_split(num_blocks: int, num_stages: int) -> list[tuple[int, ...]]:
    if num_stages == 1:
        return [(num_blocks,)]
    return [
        (first, *rest)
        for first in range(1, num_blocks - num_stages + 2)
        for rest in every_split(num_blocks - first, num_stages - 1)
    ]


small = st.integers(1, 9).flatmap(lambda blocks: st.tuples(st.just(blocks), st.integers(1, min(blocks, 5))))


@given(small, st.floats(0, 6), st.floats(0, 6))
def test_no_split_has_a_cheaper_dearest_stage(shape: tuple[int, int], embedding_cost: float, head_cost: float) -> None:
    sizes = cost_stage_sizes(*shape, embedding_cost, head_cost)
    assert sum(sizes) == shape[0]
    assert min(sizes) >= 1
    best = min(dearest(split, embedding_cost, head_cost) for split in every_split(*shape))
    assert dearest(sizes, embedding_cost, head_cost) == best


def test_without_end_costs_the_split_by_cost_is_even() -> None:
    assert sorted(cost_stage_sizes(17, 5, 0.0, 0.0)) == [3, 3, 3, 4, 4]


@pytest.mark.parametrize(("num_blocks", "num_stages"), [(3, 4), (3, 0), (3, -1)])
def test_impossible_divisions_are_refused(num_blocks: int, num_stages: int) -> None:
    with pytest.raises(ConfigError, match="stage"):
        balanced_stage_sizes(num_blocks, num_stages)
    with pytest.raises(ConfigError, match="stage"):
        cost_stage_sizes(num_blocks, num_stages, 0.0, 0.0)


def test_a_negative_cost_is_refused() -> None:
    with pytest.raises(ConfigError, match="negative"):
        cost_stage_sizes(4, 2, -0.5, 0.0)


@pytest.mark.parametrize("rule", ["balanced", "cost"])
@given(num_stages=st.integers(1, 6))
def test_layouts_follow_one_another(rule: SplitRule, num_stages: int) -> None:
    config = ModelConfig.preset("local")
    layouts = stage_layouts(config, num_stages, rule)
    assert [layout.stage_index for layout in layouts] == list(range(num_stages))
    assert [layout.first_block for layout in layouts] == [0, *(layout.end_block for layout in layouts[:-1])]
    assert layouts[-1].end_block == config.num_blocks
    assert [layout.is_first for layout in layouts] == [index == 0 for index in range(num_stages)]
    assert [layout.is_last for layout in layouts] == [index == num_stages - 1 for index in range(num_stages)]


def test_a_large_head_takes_blocks_from_its_stage() -> None:
    config = ModelConfig.preset("1b")  # its head costs 4.3 blocks
    assert [layout.num_blocks for layout in stage_layouts(config, 3, "cost")] == [7, 7, 2]


def test_a_layout_needs_blocks_and_a_stage_that_exists() -> None:
    with pytest.raises(ConfigError, match="no blocks"):
        StageLayout(stage_index=0, num_stages=2, first_block=3, end_block=3)
    with pytest.raises(ConfigError, match="stage index 2"):
        StageLayout(stage_index=2, num_stages=2, first_block=0, end_block=3)
