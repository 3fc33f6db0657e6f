"""StageEngine through its public methods: versions, recomputation, replay, refusals."""

import math
import random
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from orion.common.ids import MicrobatchId
from orion.common.model.config import ModelConfig
from orion.common.model.params import flatten_params, init_params, load_flat_params, project_params
from orion.common.model.splits import stage_layouts
from orion.common.model.stage import Stage, token_loss
from orion.common.train.config import InnerConfig, OuterConfig
from orion.common.train.engine import EngineUseError, NonFiniteError, StageEngine
from orion.common.train.outer import OuterState, initial_outer_state, state_digest, weighted_mean_in_order
from orion.common.train.schedule import InnerSchedule

CONFIG = ModelConfig.preset("nano").with_fields(vocab_size=64, width=32, num_heads=2, num_kv_heads=1, ffn_width=48)
NUM_STAGES = 3
FIRST, MIDDLE, LAST = range(NUM_STAGES)
TOKENS = 12
INNER = InnerConfig(
    lr_matrix=0.02, lr_other=0.01, schedule=InnerSchedule(shape="constant", num_warmup_steps=0, num_total_steps=1)
)


def make_stage(stage_index: int, config: ModelConfig = CONFIG) -> Stage:
    stage = Stage(config, stage_layouts(config, NUM_STAGES, "balanced")[stage_index])
    init_params(stage, seed=5)
    return stage


def make_engine(
    stage_index: int,
    *,
    graphs_max: int = 4,
    inner: InnerConfig = INNER,
    config: ModelConfig = CONFIG,
    dtype: torch.dtype = torch.float32,
) -> StageEngine:
    stage = make_stage(stage_index, config)
    engine = StageEngine(
        stage,
        inner=inner,
        outer=OuterConfig(),
        total_params=10**6,
        device=torch.device("cpu"),
        compute_dtype=dtype,
        wire_dtype=dtype,
        graphs_max=graphs_max,
    )
    engine.load(initial_outer_state(flatten_params(stage)))
    engine.begin_outer_step()
    return engine


def make_ids(seed: int, num_sequences: int = 2) -> Tensor:
    return torch.randint(0, 64, (num_sequences, TOKENS + 1), generator=torch.Generator().manual_seed(seed))


def make_x(seed: int, num_sequences: int = 2, dtype: torch.dtype = torch.float32) -> Tensor:
    shape = (num_sequences, TOKENS, CONFIG.boundary_width)
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def input_of(stage_index: int, seed: int, dtype: torch.dtype = torch.float32) -> Tensor | None:
    return None if stage_index == FIRST else make_x(seed, dtype=dtype)


def train_once(engine: StageEngine, stage_index: int, seed: int, inner_step_index: int = 0) -> None:
    """One microbatch all the way, then an inner step."""
    engine.forward(MicrobatchId(seed), input_of(stage_index, seed), make_ids(seed))
    if stage_index != LAST:
        engine.backward(MicrobatchId(seed), make_x(seed + 1000))
    engine.inner_step(inner_step_index)


class Calls:
    """A log of calls and the bytes of what they gave, for one stage; the same seed makes the same calls."""

    def __init__(self, stage_index: int, dtype: torch.dtype = torch.float32) -> None:
        self.stage_index, self.dtype = stage_index, dtype
        self.log: list[Callable[[StageEngine], list[object]]] = []

    def forward(self, number: int) -> None:
        x_BTC = input_of(self.stage_index, number, self.dtype)

        def call(engine: StageEngine) -> list[object]:
            result = engine.forward(MicrobatchId(number), x_BTC, make_ids(number))
            return [as_bytes(result.output_BTC), result.loss, as_bytes(result.input_grad_BTC), result.version]

        self.log.append(call)

    def backward(self, number: int) -> None:
        def call(engine: StageEngine) -> list[object]:
            result = engine.backward(MicrobatchId(number), make_x(number + 1000, dtype=self.dtype))
            return [as_bytes(result.input_grad_BTC), result.version, result.staleness]

        self.log.append(call)

    def inner_step(self, index: int) -> None:
        self.log.append(lambda engine: [engine.inner_step(index)])

    def play(self, engine: StageEngine) -> list[list[object]]:
        return [call(engine) for call in self.log]


def as_bytes(tensor: Tensor | None) -> bytes | None:
    return None if tensor is None else tensor.float().numpy().tobytes()


def random_calls(stage_index: int, seed: int, dtype: torch.dtype = torch.float32) -> Calls:
    """Forwards, backwards out of order and inner steps between them, as a miner's day would have it."""
    rng, calls = random.Random(seed), Calls(stage_index, dtype)
    waiting: list[int] = []
    num_ready = num_steps = 0
    for number in range(12):
        calls.forward(number)
        if stage_index == LAST:
            num_ready += 1
        else:
            waiting.append(number)
        while waiting and rng.random() < 0.6:
            calls.backward(waiting.pop(rng.randrange(len(waiting))))
            num_ready += 1
        if num_ready >= 2:
            calls.inner_step(num_steps)
            num_ready, num_steps = 0, num_steps + 1
    return calls


@pytest.mark.parametrize("stage_index", [FIRST, MIDDLE, LAST])
def test_recomputed_backward_equals_kept_graph_backward(stage_index: int) -> None:
    calls = random_calls(stage_index, seed=1)
    keeping, recomputing = make_engine(stage_index, graphs_max=100), make_engine(stage_index, graphs_max=0)

    assert calls.play(keeping) == calls.play(recomputing)
    assert torch.equal(keeping.pseudo_gradient_N(), recomputing.pseudo_gradient_N())
    assert float(keeping.pseudo_gradient_N().abs().max()) > 0


def test_graphs_are_kept_up_to_the_budget() -> None:
    engine = make_engine(FIRST, graphs_max=2)

    for number in range(4):
        engine.forward(MicrobatchId(number), None, make_ids(number))

    assert (engine.num_held, engine.num_graphs) == (4, 2)
    engine.drop(MicrobatchId(0))
    engine.forward(MicrobatchId(9), None, make_ids(9))
    assert (engine.num_held, engine.num_graphs) == (4, 2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("stage_index", [FIRST, MIDDLE, LAST])
def test_replayed_calls_give_the_same_bytes(stage_index: int, dtype: torch.dtype) -> None:
    calls = random_calls(stage_index, seed=2, dtype=dtype)
    miner, validator = (make_engine(stage_index, dtype=dtype) for _ in range(2))

    assert calls.play(miner) == calls.play(validator)
    assert torch.equal(miner.pseudo_gradient_N(), validator.pseudo_gradient_N())


@pytest.mark.parametrize("graphs_max", [0, 4])
def test_gradient_is_that_of_the_version_that_was_sent(graphs_max: int) -> None:
    engine = make_engine(MIDDLE, graphs_max=graphs_max)
    stage, x_BTC, grad_BTC, ids_BU = make_stage(MIDDLE), make_x(3), make_x(4), make_ids(5)
    leaf_BTC = x_BTC.clone().requires_grad_()
    output_BTC = stage(leaf_BTC, ids_BU[:, :-1])
    output_BTC.backward(grad_BTC)

    sent = engine.forward(MicrobatchId(1), x_BTC, ids_BU)
    train_once(engine, MIDDLE, seed=50)
    train_once(engine, MIDDLE, seed=51)
    result = engine.backward(MicrobatchId(1), grad_BTC)
    report = engine.inner_step(2)

    assert (result.version, result.staleness, engine.version) == (0, 2, 3)
    assert sent.output_BTC is not None
    assert result.input_grad_BTC is not None
    assert leaf_BTC.grad is not None
    torch.testing.assert_close(sent.output_BTC, output_BTC.detach(), rtol=0, atol=0)
    torch.testing.assert_close(result.input_grad_BTC, leaf_BTC.grad, rtol=0, atol=0)
    exact_norm = torch.stack([param.grad.norm() for param in stage.parameters() if param.grad is not None]).norm()
    assert report.grad_norm == pytest.approx(float(exact_norm), rel=1e-5)


def test_versions_live_as_long_as_something_was_forwarded_with_them() -> None:
    engine = make_engine(FIRST)
    for number in range(3):
        engine.forward(MicrobatchId(number), None, make_ids(number))
        train_once(engine, FIRST, seed=100 + number)

    assert (engine.version, engine.num_held, engine.num_versions) == (3, 3, 4)
    engine.backward(MicrobatchId(1), make_x(1))
    assert engine.num_versions == 3
    engine.drop(MicrobatchId(0))
    engine.drop(MicrobatchId(2))
    assert (engine.num_held, engine.num_versions) == (0, 1)


def test_last_stage_gives_loss_and_input_gradient_at_once() -> None:
    engine, stage = make_engine(LAST), make_stage(LAST)
    x_BTC, ids_BU = make_x(3), make_ids(4)
    leaf_BTC = x_BTC.clone().requires_grad_()
    loss = token_loss(stage(leaf_BTC, ids_BU[:, :-1]), ids_BU[:, 1:])
    loss.backward()

    result = engine.forward(MicrobatchId(1), x_BTC, ids_BU)

    assert result.loss == pytest.approx(float(loss.detach()))
    assert result.output_BTC is None
    assert leaf_BTC.grad is not None
    assert result.input_grad_BTC is not None
    torch.testing.assert_close(result.input_grad_BTC, leaf_BTC.grad, rtol=0, atol=0)
    assert (engine.num_held, engine.num_accumulated) == (0, 1)


def test_microbatches_count_by_their_tokens() -> None:
    together, apart = make_engine(LAST), make_engine(LAST)
    x_BTC, ids_BU = make_x(1, num_sequences=3), make_ids(2, num_sequences=3)

    together.forward(MicrobatchId(1), x_BTC, ids_BU)
    apart.forward(MicrobatchId(1), x_BTC[:1], ids_BU[:1])
    apart.forward(MicrobatchId(2), x_BTC[1:], ids_BU[1:])

    reports = [engine.inner_step(0) for engine in (together, apart)]
    assert reports[0].grad_norm == pytest.approx(reports[1].grad_norm, rel=1e-5)
    assert [report.num_microbatches for report in reports] == [1, 2]
    torch.testing.assert_close(together.pseudo_gradient_N(), apart.pseudo_gradient_N(), rtol=1e-3, atol=1e-4)


def test_inner_steps_follow_the_schedule_and_clip_to_the_stages_share() -> None:
    schedule = InnerSchedule(num_warmup_steps=10, num_total_steps=100)
    inner = InnerConfig(optimizer="adamw", weight_decay=0.0, clip_norm=1e-3, schedule=schedule)
    early, late = make_engine(MIDDLE, inner=inner), make_engine(MIDDLE, inner=inner)
    for engine, index in ((early, 0), (late, 9)):
        engine.forward(MicrobatchId(0), make_x(0), make_ids(0))
        engine.backward(MicrobatchId(0), make_x(1))
        report = engine.inner_step(index)
        assert report.clipped
        assert report.grad_norm > 1e-3
    ratio = late.pseudo_gradient_N().norm() / early.pseudo_gradient_N().norm()
    assert float(ratio) == pytest.approx(10.0, rel=0.02)


def test_a_step_from_part_of_a_batch_is_proportionally_smaller() -> None:
    inner = INNER.model_copy(update={"weight_decay": 0.0})
    whole, part = make_engine(LAST, inner=inner), make_engine(LAST, inner=inner)
    for engine, share in ((whole, 1.0), (part, 0.25)):
        engine.forward(MicrobatchId(0), make_x(0), make_ids(0))
        engine.inner_step(0, share=share)

    torch.testing.assert_close(part.pseudo_gradient_N(), whole.pseudo_gradient_N() * 0.25, rtol=1e-2, atol=1e-6)


def test_reset_makes_an_outer_step_a_function_of_anchor_and_calls() -> None:
    veteran, newcomer = make_engine(MIDDLE), make_engine(MIDDLE)
    keeper = make_engine(MIDDLE, inner=INNER.model_copy(update={"inner_state": "kept"}))
    for engine in (veteran, keeper):
        for step in range(3):
            train_once(engine, MIDDLE, seed=step, inner_step_index=step)
    state = veteran.apply_outer(veteran.pseudo_gradient_N())
    for engine in (newcomer, keeper):
        engine.load(state)

    pseudo_gradients_N = []
    for engine in (veteran, newcomer, keeper):
        engine.begin_outer_step()
        train_once(engine, MIDDLE, seed=9, inner_step_index=3)
        pseudo_gradients_N.append(engine.pseudo_gradient_N())

    assert torch.equal(pseudo_gradients_N[0], pseudo_gradients_N[1])
    assert not torch.equal(pseudo_gradients_N[0], pseudo_gradients_N[2])


def test_replicas_with_different_histories_end_with_the_same_bytes() -> None:
    replicas = [make_engine(MIDDLE) for _ in range(3)]
    for outer_step in range(2):
        for number, engine in enumerate(replicas):
            for step in range(1 + number):
                train_once(engine, MIDDLE, seed=100 * number + step, inner_step_index=outer_step)
        slices = [(float(1 + number), engine.pseudo_gradient_N()) for number, engine in enumerate(replicas)]
        mean_N = weighted_mean_in_order(slices)
        digests = {state_digest(engine.apply_outer(mean_N.clone())) for engine in replicas}
        for engine in replicas:
            engine.begin_outer_step()

        assert len(digests) == 1
        assert all(engine.outer_state.outer_step == outer_step + 1 for engine in replicas)
        assert all(float(engine.pseudo_gradient_N().abs().max()) == 0.0 for engine in replicas)
    outputs = {as_bytes(engine.evaluate(make_x(1), make_ids(1)).output_BTC) for engine in replicas}
    assert len(outputs) == 1


def test_pseudo_gradient_is_anchor_minus_local() -> None:
    engine = make_engine(FIRST)
    anchor_N = engine.outer_state.anchor_N.clone()
    train_once(engine, FIRST, seed=1)

    stage = make_stage(FIRST)
    load_flat_params(stage, anchor_N - engine.pseudo_gradient_N())

    expected_BTC = stage(None, make_ids(7)[:, :-1]).detach()
    found_BTC = engine.evaluate(None, make_ids(7)).output_BTC
    assert found_BTC is not None
    torch.testing.assert_close(found_BTC, expected_BTC, rtol=1e-4, atol=1e-5)
    assert torch.equal(engine.outer_state.anchor_N, anchor_N)


def test_a_new_outer_step_lets_go_of_everything() -> None:
    engine = make_engine(FIRST)
    for number in (4, 2, 7):
        engine.forward(MicrobatchId(number), None, make_ids(number))
    engine.backward(MicrobatchId(4), make_x(4))

    lost = engine.begin_outer_step()

    assert lost == (2, 7)
    assert (engine.num_held, engine.num_accumulated, engine.version, engine.num_versions) == (0, 0, 0, 1)


def test_evaluation_holds_and_changes_nothing() -> None:
    engine = make_engine(LAST)
    x_BTC, ids_BU = make_x(1), make_ids(2)

    found = engine.evaluate(x_BTC, ids_BU)

    assert found.loss == pytest.approx(engine.forward(MicrobatchId(1), x_BTC, ids_BU).loss)
    assert found.input_grad_BTC is None
    assert (engine.num_held, engine.num_accumulated) == (0, 1)


@pytest.mark.parametrize("stage_index", [FIRST, MIDDLE])
def test_what_crosses_is_in_the_wire_dtype(stage_index: int) -> None:
    engine = make_engine(stage_index, dtype=torch.bfloat16)
    x_BTC = input_of(stage_index, 1, torch.bfloat16)

    forward = engine.forward(MicrobatchId(1), x_BTC, make_ids(1))
    backward = engine.backward(MicrobatchId(1), make_x(2, dtype=torch.bfloat16))

    assert forward.output_BTC is not None
    assert forward.output_BTC.dtype == torch.bfloat16
    assert (backward.input_grad_BTC is None) == (stage_index == FIRST)
    if backward.input_grad_BTC is not None:
        assert backward.input_grad_BTC.dtype == torch.bfloat16
    engine.inner_step(0)
    assert engine.pseudo_gradient_N().dtype == torch.float32


def test_the_subspace_boundary_is_restored_after_every_inner_step() -> None:
    config = CONFIG.with_boundary("subspace", ratio=8)
    engine, stage = make_engine(FIRST, config=config), make_stage(FIRST, config)
    train_once(engine, FIRST, seed=1)
    local_N = engine.outer_state.anchor_N - engine.pseudo_gradient_N()
    load_flat_params(stage, local_N)

    project_params(stage)

    torch.testing.assert_close(flatten_params(stage), local_N, rtol=1e-4, atol=1e-5)


def test_microbatch_ids_are_held_once_and_must_be_known() -> None:
    engine = make_engine(MIDDLE)
    engine.forward(MicrobatchId(1), make_x(1), make_ids(1))

    with pytest.raises(EngineUseError, match="held already"):
        engine.forward(MicrobatchId(1), make_x(1), make_ids(1))
    engine.backward(MicrobatchId(1), make_x(2))
    with pytest.raises(EngineUseError, match="is not held"):
        engine.backward(MicrobatchId(1), make_x(2))
    with pytest.raises(EngineUseError, match="is not held"):
        engine.drop(MicrobatchId(1))
    assert engine.num_accumulated == 1


def test_calls_that_do_not_fit_are_refused() -> None:
    engine = make_engine(MIDDLE)

    with pytest.raises(EngineUseError, match="first stage"):
        engine.forward(MicrobatchId(1), None, make_ids(1))
    with pytest.raises(EngineUseError, match="first stage"):
        make_engine(FIRST).evaluate(make_x(1), make_ids(1))
    with pytest.raises(EngineUseError, match="bfloat16"):
        engine.forward(MicrobatchId(1), make_x(1, dtype=torch.bfloat16), make_ids(1))
    engine.forward(MicrobatchId(1), make_x(1), make_ids(1))
    with pytest.raises(EngineUseError, match="gradient is"):
        engine.backward(MicrobatchId(1), make_x(1)[:1])
    assert engine.num_held == 1
    with pytest.raises(EngineUseError, match="no gradients"):
        engine.inner_step(0)


def test_a_stage_without_an_outer_state_says_so() -> None:
    engine = StageEngine(
        make_stage(FIRST),
        inner=INNER,
        outer=OuterConfig(),
        total_params=10**6,
        device=torch.device("cpu"),
        compute_dtype=torch.float32,
        wire_dtype=torch.float32,
        graphs_max=0,
    )

    with pytest.raises(EngineUseError, match="no outer state"):
        engine.pseudo_gradient_N()
    with pytest.raises(ValueError, match="parameters"):
        engine.load(OuterState(torch.zeros(3), torch.zeros(3), 0))


@pytest.mark.parametrize("stage_index", [MIDDLE, LAST])
def test_a_forward_that_is_not_finite_leaves_nothing_behind(stage_index: int) -> None:
    engine = make_engine(stage_index)
    anchor_N = engine.outer_state.anchor_N
    engine.load(initial_outer_state(torch.full_like(anchor_N, math.nan)))

    with pytest.raises(NonFiniteError):
        engine.forward(MicrobatchId(1), make_x(1), make_ids(1))

    assert (engine.num_held, engine.num_accumulated) == (0, 0)


def test_a_backward_that_is_not_finite_leaves_nothing_behind() -> None:
    engine = make_engine(MIDDLE)
    engine.forward(MicrobatchId(1), make_x(1), make_ids(1))

    with pytest.raises(NonFiniteError):
        engine.backward(MicrobatchId(1), make_x(1) * 1e38)

    assert (engine.num_held, engine.num_accumulated) == (0, 0)


def test_an_inner_step_that_is_not_finite_is_refused_and_training_goes_on() -> None:
    engine, untouched = make_engine(FIRST), make_engine(FIRST)
    engine.forward(MicrobatchId(1), None, make_ids(1))
    engine.backward(MicrobatchId(1), make_x(1).clamp(-1, 1) * 3e38)

    report = engine.inner_step(0)

    assert report.refused_reason == "the gradient is not finite"
    assert (report.num_microbatches, report.version, engine.num_accumulated) == (1, 0, 0)
    assert float(engine.pseudo_gradient_N().abs().max()) == 0.0
    for each in (engine, untouched):
        train_once(each, FIRST, seed=2, inner_step_index=1)
    assert torch.equal(engine.pseudo_gradient_N(), untouched.pseudo_gradient_N())
