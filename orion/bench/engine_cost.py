"""What a stage costs the device's thread: `StageEngine` beside plain PyTorch, the same stage, tokens and optimizer.

Plain PyTorch is what somebody would write who needs no versions, no refusals and no replay: parameters that autograd
accumulates into, one backward a microbatch, clipping, the same optimizer's step. All ways go round and round in turn,
so that noise hits all alike; processor time of the one thread, not the wall's, because a miner shares its machine.

Letters in names: B sequences, T tokens, U = T + 1, C boundary width.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median
from typing import Protocol

import torch
from torch import Tensor

from orion.common.ids import MicrobatchId
from orion.common.model.config import ModelConfig
from orion.common.model.params import flatten_params, init_params, matrix_params, project_params
from orion.common.model.splits import StageLayout, stage_layouts
from orion.common.model.stage import Stage, token_loss
from orion.common.train.config import InnerConfig, OuterConfig
from orion.common.train.engine import StageEngine
from orion.common.train.inner import build_inner_optimizer, clip_share
from orion.common.train.outer import initial_outer_state

NUM_STAGES = 4
SEED = 1


@dataclass(frozen=True, slots=True)
class Workload:
    """What one round is: so many microbatches forward and backward, then one inner step."""

    config: ModelConfig
    sequences: int
    tokens: int
    microbatches: int

    @classmethod
    def usual(cls) -> "Workload":
        """The 8 M parameter Llama of `orion bench pipeline`, microbatches of 1,024 tokens, 4 to an inner step."""
        config = ModelConfig.preset("local").with_fields(name="8 blocks of local", num_blocks=8)
        return cls(config, sequences=8, tokens=128, microbatches=4)

    @classmethod
    def quick(cls) -> "Workload":
        """Over in a moment: for a test."""
        config = ModelConfig.preset("nano").with_fields(name="quick", num_blocks=NUM_STAGES)
        return cls(config, sequences=2, tokens=16, microbatches=2)

    def as_json(self) -> dict[str, object]:
        """For a report."""
        sizes = {"sequences": self.sequences, "tokens": self.tokens, "microbatches": self.microbatches}
        return {"model": self.config.name, "width": self.config.width, "blocks": self.config.num_blocks, **sizes}


@dataclass(frozen=True, slots=True)
class Round:
    """Milliseconds of one round of one way."""

    forward_ms: float
    """All microbatches' forwards; on the last stage with their backwards."""
    backward_ms: float
    step_ms: float

    @property
    def total_ms(self) -> float:
        return self.forward_ms + self.backward_ms + self.step_ms


@dataclass(frozen=True, slots=True)
class WayCost:
    """Medians over the rounds of one way on one stage; the ratio is the median of each round's, as are its bounds."""

    way: str
    forward_ms: float
    backward_ms: float
    step_ms: float
    total_ms: float
    ratio: float
    """Its round ÷ plain PyTorch's of the same repetition."""
    ratio_quarter: float
    """A quarter of the repetitions had a ratio below this."""
    ratio_three_quarters: float


@dataclass(frozen=True, slots=True)
class StageCost:
    """One stage, all ways."""

    stage: int
    num_params: int
    ways: tuple[WayCost, ...]


@dataclass(frozen=True, slots=True, eq=False)
class Inputs:
    """Of one microbatch; made up."""

    ids_BU: Tensor
    x_BTC: Tensor | None
    grad_BTC: Tensor


class Way(Protocol):
    """One way to run a stage."""

    def forward(self, number: int, inputs: Inputs) -> None: ...

    def backward(self, number: int, inputs: Inputs) -> None: ...

    def step(self) -> None: ...


class PlainWay:
    """Autograd accumulates into the parameters' own gradients."""

    def __init__(self, workload: Workload, layout: StageLayout, inner: InnerConfig) -> None:
        self._stage = Stage(workload.config, layout)
        init_params(self._stage, SEED)
        self._is_last = layout.is_last
        self._params = dict(self._stage.named_parameters())
        self._optimizer = build_inner_optimizer(self._params, matrix_params(self._stage), inner)
        num_params = sum(param.numel() for param in self._params.values())
        self._norm_bound = clip_share(num_params, NUM_STAGES * num_params, inner.clip_norm)
        self._share = 1.0 / workload.microbatches
        self._outputs: dict[int, Tensor] = {}

    def forward(self, number: int, inputs: Inputs) -> None:
        x_BTC = None if inputs.x_BTC is None else inputs.x_BTC.detach().requires_grad_()
        output = self._stage(x_BTC, inputs.ids_BU[:, :-1])
        if not self._is_last:
            self._outputs[number] = output
            return
        loss = token_loss(output, inputs.ids_BU[:, 1:]) * self._share
        loss.backward()  # type: ignore[no-untyped-call]  # torch leaves it without types

    def backward(self, number: int, inputs: Inputs) -> None:
        if not self._is_last:
            self._outputs.pop(number).backward(inputs.grad_BTC)  # type: ignore[no-untyped-call]

    def step(self) -> None:
        torch.nn.utils.clip_grad_norm_(self._params.values(), self._norm_bound)
        gradients = {name: param.grad for name, param in self._params.items() if param.grad is not None}
        self._optimizer.step(gradients, 1.0)
        project_params(self._stage)


class EngineWay:
    """What miners and validators run."""

    def __init__(self, workload: Workload, layout: StageLayout, inner: InnerConfig, *, keeps_graphs: bool) -> None:
        stage = Stage(workload.config, layout)
        init_params(stage, SEED)
        num_params = sum(param.numel() for param in stage.parameters())
        self._engine = StageEngine(
            stage,
            inner=inner,
            outer=OuterConfig(),
            total_params=NUM_STAGES * num_params,
            device=torch.device("cpu"),
            compute_dtype=torch.float32,
            wire_dtype=torch.float32,
            graphs_max=workload.microbatches if keeps_graphs else 0,
        )
        self._engine.load(initial_outer_state(flatten_params(stage)))
        self._engine.begin_outer_step()
        self._is_last = layout.is_last

    def forward(self, number: int, inputs: Inputs) -> None:
        self._engine.forward(MicrobatchId(number), inputs.x_BTC, inputs.ids_BU)

    def backward(self, number: int, inputs: Inputs) -> None:
        if not self._is_last:
            self._engine.backward(MicrobatchId(number), inputs.grad_BTC)

    def step(self) -> None:
        assert self._engine.inner_step(0).refused_reason is None


def engine_costs(workload: Workload, repetitions: int) -> tuple[StageCost, ...]:
    """Measures the first, a middle and the last stage."""
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        layouts = stage_layouts(workload.config, NUM_STAGES, "balanced")
        return tuple(_stage_cost(workload, layouts[index], repetitions) for index in (0, 1, NUM_STAGES - 1))
    finally:
        torch.set_num_threads(num_threads)


def _stage_cost(workload: Workload, layout: StageLayout, repetitions: int) -> StageCost:
    inner = InnerConfig()
    ways: dict[str, Way] = {
        "plain": PlainWay(workload, layout, inner),
        "kept graphs": EngineWay(workload, layout, inner, keeps_graphs=True),
    }
    if not layout.is_last:  # there, forward and backward are one
        ways["recompute"] = EngineWay(workload, layout, inner, keeps_graphs=False)
    batch = [_inputs(workload, layout, number) for number in range(workload.microbatches)]
    rounds: dict[str, list[Round]] = {name: [] for name in ways}
    for repetition in range(repetitions + 1):
        for name, way in ways.items():
            taken = _round(way, batch)
            if repetition > 0:  # the first warms up
                rounds[name].append(taken)
    costs = tuple(_way_cost(name, taken, rounds["plain"]) for name, taken in rounds.items())
    num_params = sum(param.numel() for param in Stage(workload.config, layout).parameters())
    return StageCost(layout.stage_index, num_params, costs)


def _round(way: Way, batch: Sequence[Inputs]) -> Round:
    began_s = time.process_time()
    for number, inputs in enumerate(batch):
        way.forward(number, inputs)
    forward_s = time.process_time()
    for number, inputs in enumerate(batch):
        way.backward(number, inputs)
    backward_s = time.process_time()
    way.step()
    step_s = time.process_time()
    return Round(1e3 * (forward_s - began_s), 1e3 * (backward_s - forward_s), 1e3 * (step_s - backward_s))


def _way_cost(name: str, rounds: Sequence[Round], plain: Sequence[Round]) -> WayCost:
    ratios = sorted(own.total_ms / other.total_ms for own, other in zip(rounds, plain, strict=True))
    return WayCost(
        way=name,
        forward_ms=median(taken.forward_ms for taken in rounds),
        backward_ms=median(taken.backward_ms for taken in rounds),
        step_ms=median(taken.step_ms for taken in rounds),
        total_ms=median(taken.total_ms for taken in rounds),
        ratio=median(ratios),
        ratio_quarter=ratios[len(ratios) // 4],
        ratio_three_quarters=ratios[3 * len(ratios) // 4],
    )


def _inputs(workload: Workload, layout: StageLayout, number: int) -> Inputs:
    generator = torch.Generator().manual_seed(number)
    shape = (workload.sequences, workload.tokens, workload.config.boundary_width)
    ids_shape = (workload.sequences, workload.tokens + 1)
    return Inputs(
        ids_BU=torch.randint(0, workload.config.vocab_size, ids_shape, generator=generator),
        x_BTC=None if layout.is_first else torch.randn(shape, generator=generator),
        grad_BTC=torch.randn(shape, generator=generator) / (workload.sequences * workload.tokens),
    )
