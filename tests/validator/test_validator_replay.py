"""Honest logs replay bit for bit; each planted cheat is caught, and the honest miners beside it pass."""

import dataclasses
from collections.abc import Callable

import numpy as np
import numpy.typing as npt
import pytest
import torch
from torch import Tensor
from working_miner import CPU, Body, Cheat, Tokens, WorkingMiner, hotkey, make_spec, trained

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


def replayed_whole(miner: WorkingMiner, uploaded: list[bytearray | None] | None = None) -> ReplayResult:
    """The whole log, and the pseudo-gradient that the miner uploads, or another one."""
    return replay(
        dataclasses.replace(task_of(miner), contribution=miner.contribution()),
        initial_anchor(miner.spec, miner.stage_index),
        spec=miner.spec,
        tokens=Tokens(),
        device=CPU,
        compute_dtype=torch.float32,
        uploaded=miner.pseudo_gradient_bodies() if uploaded is None else uploaded,
    )


@pytest.mark.parametrize("codec", ["none", "bf16", "int8"])
def test_an_honest_pseudo_gradient_is_the_same_bit_for_bit_whatever_its_codec_loses(codec: str) -> None:
    for miner in trained(make_spec(codec=codec)):
        result = replayed_whole(miner)
        assert result.failure is None
        assert result.num_partitions == miner.spec.num_partitions
        assert result.pseudo_gradient_cosine_least == result.pseudo_gradient_norm_ratio_least == 1.0


def no_gradient(values_N: Tensor) -> Tensor:
    return torch.zeros_like(values_N)


@pytest.mark.parametrize("stage_index", (0, 1, 2))
@pytest.mark.parametrize("pseudo_gradient", [noisy, no_gradient, lambda x: -x, lambda x: 1.1 * x, lambda x: x.roll(1)])
def test_another_pseudo_gradient_than_the_log_leads_to_is_caught(
    stage_index: int, pseudo_gradient: Callable[[Tensor], Tensor]
) -> None:
    for miner in trained(SPEC, {stage_index: Cheat(pseudo_gradient=pseudo_gradient)}):
        result = replayed_whole(miner)
        assert result.num_bit_equal == result.num_compared, "the log is honest"
        if miner.stage_index == stage_index:
            assert "pseudo-gradient, partition" in str(result.failure)
        else:
            assert result.failure is None


def test_the_pseudo_gradient_of_a_replica_is_not_this_miners(honest: list[WorkingMiner]) -> None:
    class OtherTokens(Tokens):
        def microbatch(self, run_seed: int, data_id: int) -> npt.NDArray[np.int64]:
            return super().microbatch(run_seed, data_id + 1000)

    for miner, replica in zip(honest, trained(SPEC, tokens=OtherTokens()), strict=True):
        copied: list[bytearray | None] = [*replica.pseudo_gradient_bodies()]
        assert "cosine" in str(replayed_whole(miner, copied).failure)


@pytest.mark.parametrize("body", [None, bytearray(b"no such thing")])
def test_objects_that_are_no_pseudo_gradient_fail(honest: list[WorkingMiner], body: bytearray | None) -> None:
    bodies: list[bytearray | None] = [*honest[1].pseudo_gradient_bodies()]
    bodies[2] = body
    assert "pseudo-gradient, partition 2" in str(replayed_whole(honest[1], bodies).failure)


def test_a_log_that_fails_says_so_before_its_pseudo_gradient() -> None:
    miner = trained(SPEC, {1: Cheat(skips_steps=True, pseudo_gradient=no_gradient)})[1]
    result = replayed_whole(miner)
    assert "of the log" in str(result.failure)
    assert result.num_partitions == 0


@pytest.fixture(scope="module")
def honest() -> list[WorkingMiner]:
    return trained(SPEC)
