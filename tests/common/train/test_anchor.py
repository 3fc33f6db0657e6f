"""Anchors from merged means: the same bytes whatever the partitions, and nothing moves where nobody delivered."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from orion.common.config import RunSpec
from orion.common.train.anchor import apply_means, checkpoint_tensors, initial_anchor, state_from_checkpoint
from orion.common.train.config import OuterConfig
from orion.common.train.outer import OuterState, apply_outer_step, state_digest
from orion.common.train.partition import partition_bounds

CONFIG = OuterConfig(lr=0.7, momentum=0.9)


def state_of(num_params: int, seed: int, outer_step: int = 3) -> OuterState:
    generator = torch.Generator().manual_seed(seed)
    anchor_N, momentum_N = torch.randn(2, num_params, generator=generator)
    return OuterState(anchor_N, momentum_N, outer_step)


@given(st.integers(1, 40), st.integers(1, 12), st.integers(0, 1000))
def test_partitions_do_not_show_in_the_result(num_params: int, num_partitions: int, seed: int) -> None:
    state = state_of(num_params, seed)
    mean_N = torch.randn(num_params, generator=torch.Generator().manual_seed(seed + 1))
    before = state_digest(state)
    bounds = partition_bounds(num_params, min(num_partitions, num_params))
    after = apply_means(state, [mean_N[part.start : part.end] for part in bounds], CONFIG)
    assert state_digest(after) == state_digest(apply_outer_step(state, mean_N, CONFIG))
    assert state_digest(state) == before


@given(st.lists(st.booleans(), min_size=1, max_size=6))
def test_a_partition_that_nobody_delivered_keeps_parameters_and_momentum(delivered: list[bool]) -> None:
    state = state_of(20, 1)
    bounds = partition_bounds(20, len(delivered))
    means = [torch.ones(part.num_params) if there else None for part, there in zip(bounds, delivered, strict=True)]
    after = apply_means(state, means, CONFIG)
    assert after.outer_step == 4
    for part, there in zip(bounds, delivered, strict=True):
        old, new = state.slice(part.start, part.end), after.slice(part.start, part.end)
        assert torch.equal(old.anchor_N, new.anchor_N) is not there
        assert torch.equal(old.momentum_N, new.momentum_N) is not there


def test_a_mean_of_another_length_is_refused() -> None:
    with pytest.raises(ValueError, match="shape"):
        apply_means(state_of(10, 1), [torch.zeros(5), torch.zeros(4)], CONFIG)


def test_a_checkpoint_holds_the_whole_state() -> None:
    state = state_of(10, 2)
    assert state_digest(state_from_checkpoint(checkpoint_tensors(state), 3)) == state_digest(state)


def test_the_initial_anchor_is_a_function_of_seed_and_stage() -> None:
    tree = {
        "run_id": "test",
        "seed": 7,
        "model": {"preset": "nano"},
        "data": {"sequence_length": 16},
        "num_stages": 2,
        "replicas": 1,
        "outer_steps": 1,
        "inner_steps": 1,
        "microbatches_per_step": 1,
    }
    spec, other = RunSpec.parse(tree, "test"), RunSpec.parse({**tree, "seed": 8}, "test")
    anchor = initial_anchor(spec, 0)
    assert anchor.outer_step == 0
    assert not anchor.momentum_N.any()
    assert state_digest(anchor) == state_digest(initial_anchor(spec, 0))
    assert state_digest(anchor) not in {state_digest(initial_anchor(spec, 1)), state_digest(initial_anchor(other, 0))}
