"""Overlapped outer steps in numbers: with one replica nothing differs from blocking ones, and where an outer step
begins follows from public bytes."""

import pytest
import torch
from torch import Tensor

from orion.common.ids import MicrobatchId
from orion.common.model.config import ModelConfig
from orion.common.model.params import flatten_params, init_params
from orion.common.model.splits import stage_layouts
from orion.common.model.stage import Stage
from orion.common.protocol.reduction import encode_slice, encode_slice_and_read, join_slices
from orion.common.train.compress import CodecName
from orion.common.train.config import InnerConfig, OuterConfig
from orion.common.train.engine import EngineUseError, StageEngine
from orion.common.train.outer import (
    OuterState,
    ahead_start,
    apply_outer_step,
    initial_outer_state,
    weighted_mean_in_order,
)
from orion.common.train.partition import partition_bounds
from orion.common.train.schedule import InnerSchedule

CONFIG = ModelConfig.preset("nano").with_fields(vocab_size=64, width=32, num_heads=2, num_kv_heads=1, ffn_width=48)
INNER = InnerConfig(lr_matrix=5e-3, lr_other=2e-3, schedule=InnerSchedule(num_warmup_steps=2, num_total_steps=20))
PLAIN = OuterConfig(lr=1.0, momentum=0.0, momentum_start=0.0)
"""An outer step that stands where the mean of the replicas stands."""
USUAL = OuterConfig()
INNER_STEPS = 4


def make_engine(outer: OuterConfig = PLAIN) -> StageEngine:
    """A whole model in one stage, at the start of outer step 0."""
    stage = Stage(CONFIG, stage_layouts(CONFIG, 1, "balanced")[0])
    init_params(stage, seed=3)
    engine = StageEngine(
        stage,
        inner=INNER,
        outer=outer,
        total_params=10**6,
        device=torch.device("cpu"),
        compute_dtype=torch.float32,
        wire_dtype=torch.float32,
        graphs_max=2,
    )
    engine.load(initial_outer_state(flatten_params(stage)))
    engine.begin_outer_step()
    return engine


def train(engine: StageEngine, first: int, num_steps: int = INNER_STEPS) -> None:
    for step in range(first, first + num_steps):
        for number in (2 * step, 2 * step + 1):
            ids_BU = torch.randint(0, 64, (2, 17), generator=torch.Generator().manual_seed(number))
            engine.forward(MicrobatchId(number), None, ids_BU)
        assert engine.inner_step(step).refused_reason is None


def merged(state: OuterState, *contributions_N: Tensor, outer: OuterConfig = PLAIN) -> OuterState:
    return apply_outer_step(state, weighted_mean_in_order([(2.0, each_N) for each_N in contributions_N]), outer)


@pytest.mark.parametrize("outer", [PLAIN, USUAL], ids=["plain", "usual"])
@pytest.mark.parametrize("num_steps_ahead", [0, 1, INNER_STEPS])
def test_with_one_replica_overlapped_equals_blocking_bit_for_bit(num_steps_ahead: int, outer: OuterConfig) -> None:
    """Whenever the merge comes, and with momentum: where the outer step begins is where its anchor will be. Both reset
    the inner optimizer's state between outer steps."""
    blocking, overlapped = make_engine(outer), make_engine(outer)
    for outer_step in range(2):
        train(blocking, outer_step * INNER_STEPS)
        blocking.apply_outer(blocking.pseudo_gradient_N())
        blocking.begin_outer_step()
    train(blocking, 2 * INNER_STEPS)

    train(overlapped, 0)
    for outer_step in (1, 2):
        before, own_N = overlapped.outer_state, overlapped.pseudo_gradient_N()
        overlapped.begin_ahead(ahead_start(before, own_N, outer))
        train(overlapped, outer_step * INNER_STEPS, num_steps_ahead)
        overlapped.take_merged(merged(before, own_N, outer=outer))
        train(overlapped, outer_step * INNER_STEPS + num_steps_ahead, INNER_STEPS - num_steps_ahead)

    assert overlapped.outer_state.outer_step == blocking.outer_state.outer_step == 2
    assert torch.equal(overlapped.outer_state.anchor_N, blocking.outer_state.anchor_N)
    assert torch.equal(overlapped.pseudo_gradient_N(), blocking.pseudo_gradient_N())


def test_what_others_did_is_added_and_own_work_stays() -> None:
    engine = make_engine()
    train(engine, 0)
    before, own_N = engine.outer_state, engine.pseudo_gradient_N()
    start_N = ahead_start(before, own_N, USUAL)
    engine.begin_ahead(start_N)
    train(engine, INNER_STEPS, 2)
    other_N = torch.full_like(own_N, 0.25)
    after = merged(before, own_N, other_N, outer=USUAL)
    reference = make_engine()
    reference.load(before)
    reference.begin_ahead(start_N)
    train(reference, INNER_STEPS, 2)
    reference.take_merged(OuterState(start_N, before.momentum_N, 1))  # an anchor that differs by nothing
    engine.take_merged(after)
    assert engine.outer_state is after
    # What this outer step did is the same, measured from either anchor.
    torch.testing.assert_close(engine.pseudo_gradient_N(), reference.pseudo_gradient_N(), rtol=0, atol=1e-6)
    assert float(engine.pseudo_gradient_N().norm()) > 0


@pytest.mark.parametrize("codec", ["none", "bf16", "int8"])
def test_the_beginning_follows_from_the_uploaded_bytes(codec: CodecName) -> None:
    engine = make_engine()
    train(engine, 0)
    values_N = engine.pseudo_gradient_N()
    read_N = torch.empty_like(values_N)
    bodies = []
    for partition in partition_bounds(values_N.numel(), 3):
        part = slice(partition.start, partition.end)
        body, read_N[part], _ = encode_slice_and_read(codec, values_N[part])
        assert body.digest == encode_slice(codec, values_N[part]).digest
        bodies.append(bytearray(body.tobytes()))
    joined_N = join_slices([codec] * 3, values_N.numel(), bodies)
    assert joined_N is not None
    assert torch.equal(joined_N, read_N)
    assert join_slices([codec] * 3, values_N.numel(), [bodies[0], None, bodies[2]]) is None
    assert join_slices([codec] * 3, values_N.numel(), []) is None


def test_gradients_that_wait_and_microbatches_that_are_held_outlive_the_merge() -> None:
    engine = make_engine()
    train(engine, 0, 1)
    before, own_N = engine.outer_state, engine.pseudo_gradient_N()
    engine.begin_ahead(ahead_start(before, own_N, PLAIN))
    engine.forward(MicrobatchId(50), None, torch.zeros(2, 17, dtype=torch.int64))
    assert engine.num_accumulated == 1
    engine.take_merged(merged(before, own_N))
    assert engine.num_accumulated == 1
    assert engine.inner_step(1).num_microbatches == 1


def test_an_anchor_that_is_not_there_cannot_be_used() -> None:
    engine = make_engine()
    with pytest.raises(EngineUseError, match="not begun ahead"):
        engine.take_merged(engine.outer_state)
    train(engine, 0, 1)
    engine.begin_ahead(ahead_start(engine.outer_state, engine.pseudo_gradient_N(), PLAIN))
    assert engine.is_ahead
    with pytest.raises(EngineUseError, match="ahead of its anchor"):
        engine.pseudo_gradient_N()
    engine.load(engine.outer_state)
    assert not engine.is_ahead
