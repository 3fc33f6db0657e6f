"""Outer steps held against what they must equal: plain training, an independent DiLoCo, the unsplit model, any order of
arrival."""

import itertools
import random
from collections.abc import Callable, Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from orion.common.ids import Hotkey, MicrobatchId
from orion.common.model.config import ModelConfig
from orion.common.model.params import flatten_params, init_params, load_flat_params, matrix_params, param_layout
from orion.common.model.splits import stage_layouts
from orion.common.model.stage import Stage, Transformer, token_loss
from orion.common.protocol.codec import decode, mean_spec
from orion.common.protocol.messages import Contribution, ObjectRef
from orion.common.protocol.reduction import encode_slice, reduce_partition, slices_in_order
from orion.common.train.anchor import apply_means
from orion.common.train.config import InnerConfig, OuterConfig
from orion.common.train.engine import StageEngine
from orion.common.train.inner import build_inner_optimizer
from orion.common.train.outer import OuterState, initial_outer_state, state_digest, weighted_mean_in_order
from orion.common.train.partition import partition_bounds
from orion.common.train.schedule import InnerSchedule

NUM_PARTITIONS = 3
CONSTANT = InnerSchedule(shape="constant", num_warmup_steps=0)
PLAIN_OUTER = OuterConfig(lr=1.0, momentum=0.0)
CONFIG = (
    ModelConfig.preset("nano")
    .with_fields(vocab_size=64, width=32, num_heads=2, num_kv_heads=1, ffn_width=48)
    .with_boundary("anchored", ratio=8)
)


def hotkey(replica: int) -> Hotkey:
    return Hotkey(f"5Rep{replica + 1}".ljust(48, "z"))


def merged(state: OuterState, locals_: Sequence[tuple[int, Tensor]], config: OuterConfig) -> OuterState:
    """The outer step as a swarm makes it: slices encoded, each partition reduced, the means applied."""
    means = []
    for partition in partition_bounds(state.anchor_N.numel(), NUM_PARTITIONS):
        contributions, bodies = [], {}
        for replica, (num_microbatches, local_N) in enumerate(locals_):
            pseudo_gradient_N = torch.sub(state.anchor_N, local_N)[partition.start : partition.end]
            body = encode_slice("none", pseudo_gradient_N)
            ref = ObjectRef(key="x", digest=body.digest, size_bytes=body.size_bytes)
            contributions.append(
                Contribution(hotkey=hotkey(replica), num_microbatches=num_microbatches, objects=(ref,))
            )
            bodies[replica] = bytearray(body.tobytes())
        reduction = reduce_partition("none", partition.num_params, slices_in_order(contributions, bodies))
        assert reduction.mean is not None and not reduction.excluded
        body = reduction.mean
        means.append(decode(bytearray(body.tobytes()), mean_spec(partition.num_params), body.size_bytes)["mean"])
    return apply_means(state, means, config)


# --- plain training ---------------------------------------------------------------------------------------------------


def ids_of(number: int) -> Tensor:
    return torch.randint(0, 64, (2, 17), generator=torch.Generator().manual_seed(number))


def off_zero(params_N: Tensor) -> Tensor:
    """Every parameter at least 2⁻⁴ in size, and every step much smaller: then anchor − (anchor − local) is the local
    parameter to the last bit, because both differences are exact."""
    return torch.where(params_N < 0, params_N - 2.0**-4, params_N + 2.0**-4)


@pytest.mark.parametrize("inner_state", ["reset", "kept"])
@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
@pytest.mark.parametrize("num_stages", [1, 3])
def test_one_replica_that_merges_after_every_step_is_plain_training(
    num_stages: int, optimizer: str, inner_state: str
) -> None:
    inner = InnerConfig.model_validate(
        {
            "optimizer": optimizer,
            "inner_state": inner_state,
            "lr_matrix": 1e-3,
            "lr_other": 1e-3,
            "clip_norm": 1e6,
            "schedule": CONSTANT,
        }
    )
    engines = []
    for layout in stage_layouts(CONFIG, num_stages, "balanced"):
        stage = Stage(CONFIG, layout)
        init_params(stage, seed=3)
        engine = engine_of(stage, inner)
        engine.load(initial_outer_state(off_zero(flatten_params(stage))))
        engine.begin_outer_step()
        engines.append(engine)
    whole = Transformer(CONFIG, num_stages)
    init_params(whole, seed=3)
    load_flat_params(whole, off_zero(flatten_params(whole)))
    params = dict(whole.named_parameters())
    plain = build_inner_optimizer(params, matrix_params(whole), inner)

    for step in range(4):
        ids_BU = ids_of(step)
        loss = token_loss(whole(ids_BU[:, :-1]), ids_BU[:, 1:])
        loss.backward()
        gradients = {name: param.grad for name, param in params.items() if param.grad is not None}
        if inner_state == "reset":
            plain.reset()
        plain.step(gradients, 1.0)

        assert through_pipeline(engines, step, ids_BU) == float(loss.detach())
        for engine in engines:
            assert engine.inner_step(step).refused_reason is None
            state = engine.outer_state
            local_N = torch.sub(state.anchor_N, engine.pseudo_gradient_N())
            engine.load(merged(state, [(1, local_N)], PLAIN_OUTER))
            engine.begin_outer_step()

    for layout, engine in zip(stage_layouts(CONFIG, num_stages, "balanced"), engines, strict=True):
        anchor_N = engine.outer_state.anchor_N
        assert engine.outer_state.outer_step == 4
        for place in param_layout(Stage(CONFIG, layout)):
            found = anchor_N[place.start : place.end].view(place.shape)
            assert torch.equal(found, params[place.name].detach()), place.name


def engine_of(stage: Stage, inner: InnerConfig) -> StageEngine:
    return StageEngine(
        stage,
        inner=inner,
        outer=PLAIN_OUTER,
        total_params=10**6,
        device=torch.device("cpu"),
        compute_dtype=torch.float32,
        wire_dtype=torch.float32,
        graphs_max=4,
    )


def through_pipeline(engines: list[StageEngine], number: int, ids_BU: Tensor) -> float:
    """One microbatch forward and back; its loss."""
    microbatch_id, x_BTC = MicrobatchId(number), None
    for engine in engines[:-1]:
        x_BTC = engine.forward(microbatch_id, x_BTC, ids_BU).output_BTC
    last = engines[-1].forward(microbatch_id, x_BTC, ids_BU)
    grad_BTC = last.input_grad_BTC
    for engine in reversed(engines[:-1]):
        assert grad_BTC is not None
        grad_BTC = engine.backward(microbatch_id, grad_BTC).input_grad_BTC
    assert last.loss is not None
    return last.loss


# --- golden histories -------------------------------------------------------------------------------------------------

TARGETS = ([1.0, -2.0, 0.5, 4.0], [0.0, 1.0, -1.5, 2.0], [3.0, 0.5, 0.25, -1.0])
"""Replica r descends on ½·|θ − TARGETS[r]|², so its gradient is θ − TARGETS[r]."""
INNER_LR = 0.125
START = [0.75, -0.5, 2.0, 1.0]

# Worked out in exact fractions.
GOLDEN_SGD = [
    [0.903651367, -0.17074707, 0.869564941, 1.219501953],
    [1.055353188, 0.15432826, -0.246527025, 1.43621884],
    [1.170654407, 0.4014023, -1.094814563, 1.600934867],
    [1.234123673, 0.537407871, -1.561767025, 1.691605248],
    [1.247057725, 0.565123697, -1.656924695, 1.710082465],
]
GOLDEN_WARMUP = [
    [0.836645508, -0.314331055, 1.362536621, 1.123779297],
    [0.926982475, -0.120751839, 0.697914646, 1.252832108],
    [1.013805151, 0.065296753, 0.059147815, 1.376864502],
    [1.092684706, 0.23432437, -0.521180336, 1.48954958],
    [1.160440806, 0.379516014, -1.019671647, 1.586344009],
]


def descend(params_N: Tensor, target: list[float], num_steps: int) -> Tensor:
    for _ in range(num_steps):
        params_N = params_N - INNER_LR * (params_N - torch.tensor(target, dtype=params_N.dtype))
    return params_N


def history(config: OuterConfig, weights: Sequence[int], num_inner_steps: int, num_outer_steps: int) -> list[Tensor]:
    state = initial_outer_state(torch.tensor(START))
    anchors = []
    for _ in range(num_outer_steps):
        locals_ = [
            (weight, descend(state.anchor_N, target, num_inner_steps))
            for weight, target in zip(weights, TARGETS, strict=True)
        ]
        pseudo_gradients = [(float(weight), torch.sub(state.anchor_N, local_N)) for weight, local_N in locals_]
        means = [
            weighted_mean_in_order([(weight, d_N[part.start : part.end]) for weight, d_N in pseudo_gradients])
            for part in partition_bounds(len(START), NUM_PARTITIONS)
        ]  # without the rule on norms, which DiLoCo does not have
        state = apply_means(state, means, config)
        anchors.append(state.anchor_N)
    return anchors


def reference(
    momentum_of: Callable[[int], float], lr: float, weights: Sequence[int], num_inner_steps: int, num_outer_steps: int
) -> list[Tensor]:
    """DiLoCo in a few lines of float64: torch's own SGD is the outer optimizer."""
    params_N = torch.tensor(START, dtype=torch.float64).requires_grad_(True)
    outer = torch.optim.SGD([params_N], lr=lr, momentum=0.5, nesterov=True)
    anchors = []
    for outer_step in range(num_outer_steps):
        outer.param_groups[0]["momentum"] = momentum_of(outer_step)
        anchor_N = params_N.detach().clone()
        total_N = torch.zeros_like(anchor_N)
        for weight, target in zip(weights, TARGETS, strict=True):
            total_N += weight * (anchor_N - descend(anchor_N, target, num_inner_steps))
        params_N.grad = total_N / sum(weights)
        outer.step()
        anchors.append(params_N.detach().clone())
    return anchors


@pytest.mark.parametrize(
    ("config", "golden"),
    [
        (OuterConfig(lr=0.7, momentum=0.9), GOLDEN_SGD),
        (OuterConfig(lr=0.5, momentum=0.9, momentum_start=0.5, num_momentum_warmup_steps=4), GOLDEN_WARMUP),
    ],
    ids=["constant momentum", "warm-up"],
)
def test_histories_are_those_of_diloco(config: OuterConfig, golden: list[list[float]]) -> None:
    weights = (2, 5, 3)

    def momentum_of(outer_step: int) -> float:
        share = min(1.0, outer_step / max(1, config.num_momentum_warmup_steps))
        is_warm = config.num_momentum_warmup_steps == 0
        return config.momentum if is_warm else config.momentum_start + share * (config.momentum - config.momentum_start)

    found = history(config, weights, num_inner_steps=3, num_outer_steps=5)

    expected = reference(momentum_of, config.lr, weights, 3, 5)
    for anchor_N, expected_N, golden_N in zip(found, expected, golden, strict=True):
        torch.testing.assert_close(anchor_N.double(), expected_N, rtol=2e-6, atol=2e-6)
        torch.testing.assert_close(anchor_N, torch.tensor(golden_N), rtol=2e-6, atol=2e-6)


# --- split and order --------------------------------------------------------------------------------------------------


@settings(max_examples=30)
@given(st.integers(0, 2**31), st.lists(st.integers(1, 199), max_size=4), st.integers(1, 4))
def test_outer_steps_of_stages_are_the_outer_steps_of_the_whole(seed: int, cuts: list[int], num_steps: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    bounds = list(itertools.pairwise(sorted({0, *cuts, 200})))
    whole = initial_outer_state(torch.randn(200, generator=generator))
    stages = [initial_outer_state(whole.anchor_N[start:end]) for start, end in bounds]
    config = OuterConfig(lr=0.7, momentum=0.9)
    for _ in range(num_steps):
        mean_N = torch.randn(200, generator=generator)
        whole = apply_means(whole, [mean_N], config)
        stages = [
            apply_means(stage, [mean_N[start:end]], config) for stage, (start, end) in zip(stages, bounds, strict=True)
        ]

    assert torch.equal(torch.cat([stage.anchor_N for stage in stages]), whole.anchor_N)
    assert torch.equal(torch.cat([stage.momentum_N for stage in stages]), whole.momentum_N)


@settings(max_examples=30)
@given(st.integers(0, 2**31), st.lists(st.integers(1, 1000), min_size=2, max_size=6))
def test_bodies_that_arrive_in_any_order_give_the_same_bytes(seed: int, weights: list[int]) -> None:
    generator = torch.Generator().manual_seed(seed)
    contributions, arrived = [], []
    for replica, weight in enumerate(weights):
        body = encode_slice("none", torch.randn(50, generator=generator))
        ref = ObjectRef(key="x", digest=body.digest, size_bytes=body.size_bytes)
        contributions.append(Contribution(hotkey=hotkey(replica), num_microbatches=weight, objects=(ref,)))
        arrived.append((replica, bytearray(body.tobytes())))
    found = set()
    for number in range(4):
        random.Random(seed + number).shuffle(arrived)
        mean = reduce_partition("none", 50, slices_in_order(contributions, dict(arrived))).mean
        assert mean is not None
        found.add(mean.digest)
    assert len(found) == 1


def test_the_order_in_the_mean_shows_in_its_bytes() -> None:
    """Which is why the plan fixes it: sums in another order are other bytes."""
    bodies = [
        encode_slice("none", torch.randn(500, generator=torch.Generator().manual_seed(seed))) for seed in range(3)
    ]
    contributions = [
        Contribution(
            hotkey=hotkey(replica),
            num_microbatches=replica + 1,
            objects=(ObjectRef(key="x", digest=body.digest, size_bytes=body.size_bytes),),
        )
        for replica, body in enumerate(bodies)
    ]
    digests = set()
    for order in itertools.permutations(range(3)):
        arrived = {place: bytearray(bodies[replica].tobytes()) for place, replica in enumerate(order)}
        plan = [contributions[replica] for replica in order]
        mean = reduce_partition("none", 500, slices_in_order(plan, arrived)).mean
        assert mean is not None
        digests.add(mean.digest)
    assert len(digests) > 1


def test_a_state_that_was_stored_goes_on_bit_for_bit() -> None:
    generator = torch.Generator().manual_seed(1)
    config = OuterConfig(lr=0.7, momentum=0.9)
    state = initial_outer_state(torch.randn(100, generator=generator))
    means = [torch.randn(100, generator=generator) for _ in range(4)]
    for mean_N in means[:2]:
        state = apply_means(state, [mean_N], config)
    restored = OuterState(state.anchor_N.clone(), state.momentum_N.clone(), state.outer_step)
    for mean_N in means[2:]:
        state, restored = (apply_means(each, [mean_N], config) for each in (state, restored))
    assert state_digest(restored) == state_digest(state)
