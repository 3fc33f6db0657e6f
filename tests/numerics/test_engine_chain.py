"""A chain of engines trains exactly the model that one process would train."""

import pytest
import torch
from torch import Tensor

from orion.common.ids import MicrobatchId
from orion.common.model.config import BoundaryKind, ModelConfig
from orion.common.model.params import flatten_params, init_params, matrix_params, param_layout, project_params
from orion.common.model.splits import stage_layouts
from orion.common.model.stage import Stage, Transformer, token_loss
from orion.common.train.config import InnerConfig, OuterConfig
from orion.common.train.engine import StageEngine
from orion.common.train.inner import build_inner_optimizer
from orion.common.train.outer import initial_outer_state
from orion.common.train.schedule import InnerSchedule, learning_rate_factor

NUM_STAGES = 3
NUM_INNER_STEPS = 4
NUM_MICROBATCHES = 3
# Nothing is clipped: a stage clips by its own share, one process by the whole norm.
MUON = InnerConfig(
    lr_matrix=5e-3, lr_other=2e-3, clip_norm=1e6, schedule=InnerSchedule(num_warmup_steps=2, num_total_steps=8)
)
# Muon's iteration and Adam's division of tiny numbers magnify the last digits of a gradient, in which a sum over
# a batch and a sum over microbatches differ. With a large eps nothing is magnified, and the two must agree closely.
SMOOTH = MUON.model_copy(update={"optimizer": "adamw", "eps": 1e-2})


def make_config(boundary: BoundaryKind) -> ModelConfig:
    config = ModelConfig.preset("nano").with_fields(vocab_size=64, width=32, num_heads=2, num_kv_heads=1, ffn_width=48)
    return config.with_boundary(boundary, ratio=8)


def make_ids(number: int) -> Tensor:
    return torch.randint(0, 64, (2, 17), generator=torch.Generator().manual_seed(number))


def make_engines(config: ModelConfig, inner: InnerConfig, graphs_max: int) -> list[StageEngine]:
    engines = []
    for layout in stage_layouts(config, NUM_STAGES, "balanced"):
        stage = Stage(config, layout)
        init_params(stage, seed=3)
        engine = StageEngine(
            stage,
            inner=inner,
            outer=OuterConfig(),
            total_params=10**6,
            device=torch.device("cpu"),
            compute_dtype=torch.float32,
            wire_dtype=torch.float32,
            graphs_max=graphs_max,
        )
        engine.load(initial_outer_state(flatten_params(stage)))
        engine.begin_outer_step()
        engines.append(engine)
    return engines


def train_chain(engines: list[StageEngine], step: int) -> list[float]:
    """One inner step of all stages: every microbatch forward before the first one comes back."""
    losses, gradients = [], {}
    for number in range(NUM_MICROBATCHES):
        microbatch_id, x_BTC = MicrobatchId(step * NUM_MICROBATCHES + number), None
        for engine in engines[:-1]:
            x_BTC = engine.forward(microbatch_id, x_BTC, make_ids(microbatch_id)).output_BTC
        result = engines[-1].forward(microbatch_id, x_BTC, make_ids(microbatch_id))
        assert result.loss is not None
        losses.append(result.loss)
        gradients[microbatch_id] = result.input_grad_BTC
    for microbatch_id, last_grad_BTC in gradients.items():
        grad_BTC = last_grad_BTC
        for engine in reversed(engines[:-1]):
            assert grad_BTC is not None
            grad_BTC = engine.backward(microbatch_id, grad_BTC).input_grad_BTC
    for engine in engines:
        assert engine.inner_step(step).refused_reason is None
    return losses


def local_params(config: ModelConfig, engines: list[StageEngine]) -> dict[str, Tensor]:
    named = {}
    for layout, engine in zip(stage_layouts(config, NUM_STAGES, "balanced"), engines, strict=True):
        local_N = engine.outer_state.anchor_N - engine.pseudo_gradient_N()
        for place in param_layout(Stage(config, layout)):
            named[place.name] = local_N[place.start : place.end].view(place.shape)
    return named


@pytest.mark.parametrize("graphs_max", [0, NUM_MICROBATCHES])
@pytest.mark.parametrize("boundary", ["anchored", "subspace", "none"])
@pytest.mark.parametrize(("inner", "tolerance"), [(SMOOTH, 2e-6), (MUON, 5e-5)], ids=["smooth", "muon"])
def test_chain_of_engines_equals_training_in_one_process(
    inner: InnerConfig, tolerance: float, boundary: BoundaryKind, graphs_max: int
) -> None:
    config = make_config(boundary)
    engines = make_engines(config, inner, graphs_max)
    whole = Transformer(config, NUM_STAGES)
    init_params(whole, seed=3)
    params = dict(whole.named_parameters())
    optimizer = build_inner_optimizer(params, matrix_params(whole), inner)

    for step in range(NUM_INNER_STEPS):
        losses = []
        for number in range(step * NUM_MICROBATCHES, (step + 1) * NUM_MICROBATCHES):
            ids_BU = make_ids(number)
            loss = token_loss(whole(ids_BU[:, :-1]), ids_BU[:, 1:])
            (loss / NUM_MICROBATCHES).backward()
            losses.append(float(loss.detach()))
        gradients = {name: param.grad for name, param in params.items() if param.grad is not None}
        optimizer.step(gradients, learning_rate_factor(inner.schedule, step))
        project_params(whole)

        assert train_chain(engines, step) == pytest.approx(losses, rel=max(tolerance, 1e-5))

    found = local_params(config, engines)
    assert found.keys() == params.keys()
    for name, param in params.items():
        torch.testing.assert_close(found[name], param.detach(), rtol=tolerance, atol=tolerance, msg=name)
