"""Honest logs replay bit for bit; each planted cheat is caught, and the honest miners beside it pass."""

import pytest
import torch
from torch import Tensor
from validator_world import CPU, Body, Cheat, Tokens, WorkingMiner, hotkey, make_spec, trained

from orion.common.errors import DataError
from orion.common.ids import Operation
from orion.common.train.anchor import initial_anchor
from orion.validator.events import ReplayOperation, ReplayResult, ReplayTask
from orion.validator.replay import replay

SPEC = make_spec()


def noisy(tensor: Tensor) -> Tensor:
    noise = torch.randn(tensor.shape, generator=torch.Generator().manual_seed(1))
    return tensor + 0.2 * tensor.std() * noise


def task_of(miner: WorkingMiner, num_operations: int | None = None) -> ReplayTask:
    operations = []
    for entry in miner.entries[:num_operations]:
        sides: list[Body | None] = [None, None]
        if entry.microbatch_id is not None:
            sides = [miner.bodies.get((entry.microbatch_id, entry.operation, side)) for side in ("input", "output")]
        operations.append(ReplayOperation(entry, sides[0], sides[1]))
    return ReplayTask(hotkey(miner.stage_index), miner.stage_index, 0, None, tuple(operations))


def replayed(miner: WorkingMiner, num_operations: int | None = None) -> ReplayResult:
    return replay(
        task_of(miner, num_operations),
        initial_anchor(SPEC, miner.stage_index),
        spec=SPEC,
        tokens=Tokens(),
        device=CPU,
        compute_dtype=torch.float32,
    )


def test_honest_logs_replay_bit_for_bit() -> None:
    for miner in trained(SPEC):
        result = replayed(miner)
        assert result.failure is None
        assert result.num_operations == len(miner.entries)
        assert (
            result.num_bit_equal
            == result.num_compared
            == sum(entry.output_digest is not None for entry in miner.entries)
        )
        assert result.cosine_least == result.norm_ratio_least == 1.0
        assert result.num_foreign_inputs == 0
        kinds = {entry.operation for entry in miner.entries}
        assert kinds == {Operation.FORWARD, Operation.INNER_STEP} | (
            {Operation.BACKWARD} if miner.stage_index < 2 else set()
        )


@pytest.mark.parametrize("num_operations", (1, 2, 5, 9, 14))
def test_every_prefix_of_an_honest_log_passes(honest: list[WorkingMiner], num_operations: int) -> None:
    for miner in honest:
        result = replayed(miner, num_operations)
        assert result.failure is None
        assert result.num_bit_equal == result.num_compared


@pytest.mark.parametrize(
    ("stage_index", "cheat"),
    [
        (0, Cheat(output=noisy)),
        (1, Cheat(output=noisy)),
        (1, Cheat(gradient=noisy)),
        (1, Cheat(gradient=lambda gradient: 1.1 * gradient)),
        (2, Cheat(gradient=noisy)),
        (2, Cheat(gradient=lambda gradient: -gradient)),
        (0, Cheat(skips_backward=True)),
        (1, Cheat(skips_backward=True)),
        (0, Cheat(skips_steps=True)),
        (1, Cheat(skips_steps=True)),
        (2, Cheat(skips_steps=True)),
        (0, Cheat(ids=lambda ids: (ids + 1) % 512)),
        (1, Cheat(ids=lambda ids: (ids + 1) % 512)),
    ],
    ids=lambda value: None if isinstance(value, Cheat) else f"stage{value}",
)
def test_a_cheat_is_caught_and_its_neighbours_pass(stage_index: int, cheat: Cheat) -> None:
    for miner in trained(SPEC, {stage_index: cheat}):
        result = replayed(miner)
        if miner.stage_index == stage_index:
            assert result.failure is not None
            assert result.num_operations <= len(miner.entries)
        else:
            assert result.failure is None
            assert result.num_bit_equal == result.num_compared


def test_changed_token_ids_are_counted_where_they_arrive() -> None:
    miners = trained(SPEC, {1: Cheat(ids=lambda ids: (ids + 1) % 512)})
    assert replayed(miners[2]).num_foreign_inputs == 7
    assert replayed(miners[1]).num_foreign_inputs == 0


def test_the_first_stage_needs_the_data(honest: list[WorkingMiner]) -> None:
    with pytest.raises(DataError, match="data"):
        replay(
            task_of(honest[0]), initial_anchor(SPEC, 0), spec=SPEC, tokens=None, device=CPU, compute_dtype=torch.float32
        )


def test_an_anchor_of_another_outer_step_is_our_own_mistake(honest: list[WorkingMiner]) -> None:
    task = ReplayTask(hotkey(1), 1, 1, None, task_of(honest[1]).operations)
    with pytest.raises(ValueError, match="outer step"):
        replay(task, initial_anchor(SPEC, 1), spec=SPEC, tokens=None, device=CPU, compute_dtype=torch.float32)


@pytest.fixture(scope="module")
def honest() -> list[WorkingMiner]:
    return trained(SPEC)
