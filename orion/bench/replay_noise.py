"""How far honest replays lie from what a miner did, and how far the smallest cheats that are of any use do.

One pipeline of real engines works for an outer step and keeps every tensor, as miners do. Each stage's log is then
repeated under other conditions (threads, compute dtype, kept graphs or recomputing, another device), fed with the
logged inputs as a validator's replay is, and once for each cheat. Owns what is measured; the validator's own `compare`
measures it. Made-up text; deterministic but for the arithmetic that it measures.

Letters in names: B sequences, T tokens, U = T + 1, C boundary width, N flat parameters.
"""

import statistics
from collections import defaultdict, deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from enum import StrEnum

import torch
from torch import Tensor

from orion.common.config import RunSpec, Tolerance
from orion.common.ids import MicrobatchId, Operation
from orion.common.model.stage import Stage
from orion.common.train.anchor import initial_anchor
from orion.common.train.engine import StageEngine, Version
from orion.common.train.outer import OuterState
from orion.common.train.partition import partition_bounds
from orion.simulator.tokens import SyntheticTokens
from orion.validator.compare import Comparison, compare

IN_FLIGHT = 2
"""Microbatches between forward and backward, so that gradients come late by a step now and then."""

GRAPHS_MAX = 64
NOTHING_FAILS = Tolerance(cosine_min=-1.0, norm_ratio_min=0.0)
NOISE_SHARES = (0.01, 0.05)
LEVELS_MAX = 127
"""Of weights that are rounded to 8 bits."""


class Quantity(StrEnum):
    """What is compared."""

    FORWARD = "forward output"
    INPUT_GRADIENT = "input gradient"
    PSEUDO_GRADIENT = "pseudo-gradient"


class Cheat(StrEnum):
    """Deviations that save work or do harm, each as small as it is of any use."""

    NONE = "none"
    ROUNDED = "weights rounded to 8 bits"
    STALE = "parameters one inner step old"
    SKIPPED_STEP = "one inner step left out"
    SKIPPED_BACKWARD = "one backward pass left out"


@dataclass(frozen=True, slots=True)
class Conditions:
    """What arithmetic depends on beside its inputs."""

    device: str = "cpu"
    num_threads: int = 1
    compute_dtype: torch.dtype = torch.float32
    keeps_graphs: bool = True

    def __str__(self) -> str:
        dtype = "fp32" if self.compute_dtype == torch.float32 else "bf16"
        threads = "" if self.device != "cpu" else f", {self.num_threads} thread{'s' if self.num_threads > 1 else ''}"
        return f"{self.device}{threads}, {dtype}, {'kept graph' if self.keeps_graphs else 'recompute'}"


@dataclass(frozen=True, slots=True, eq=False)
class LoggedOperation:
    """One operation of a log with its tensors."""

    operation: Operation
    microbatch_id: MicrobatchId
    """Of an inner step: of no meaning."""
    input_BTC: Tensor | None = None
    ids_BU: Tensor | None = None
    output_BTC: Tensor | None = None
    """Sent on or back; None where nothing is."""


@dataclass(slots=True, eq=False)
class StageLog:
    """What one stage's miner did in the outer step."""

    stage_index: int
    miner: Conditions
    state: OuterState
    operations: list[LoggedOperation]
    pseudo_gradient_N: Tensor


@dataclass(frozen=True, slots=True)
class NoiseRow:
    """How alike tensors were over all seeds, stages and operations."""

    miner: str
    validator: str
    cheat: str
    quantity: Quantity
    num_tensors: int
    bit_equal_share: float
    cosine_least: float
    cosine_median: float
    cosine_most: float
    norm_ratio_least: float
    norm_ratio_median: float


Samples = dict[tuple[str, str, str, Quantity], list[Comparison]]


def noise_spec(preset: str, *, inner_steps: int, sequence_length: int, sequences_per_microbatch: int) -> RunSpec:
    """A run of three stages like the local one, with steps as small as asked for."""
    return RunSpec.parse(
        {
            "run_id": "replay-noise",
            "seed": 0,
            "model": {"preset": preset},
            "data": {"sequence_length": sequence_length, "sequences_per_microbatch": sequences_per_microbatch},
            "num_stages": 3,
            "replicas": 1,
            "outer_steps": 10,
            "inner_steps": inner_steps,
            "microbatches_per_step": 2,
        },
        "replay-noise",
    )


def validators_of(*, with_cuda: bool) -> Mapping[Conditions, Sequence[Conditions]]:
    """Kinds of miners, and the validators that each is replayed by."""
    fp32, bf16 = Conditions(), Conditions(compute_dtype=torch.bfloat16)
    two = replace(fp32, num_threads=2)
    validators: dict[Conditions, list[Conditions]] = {
        fp32: [fp32, replace(fp32, keeps_graphs=False), two, bf16],
        two: [two],
        bf16: [bf16, replace(bf16, keeps_graphs=False), replace(bf16, num_threads=2)],
    }
    if with_cuda:
        gpu = Conditions(device="cuda", compute_dtype=torch.bfloat16)
        validators[fp32] += [replace(gpu, compute_dtype=torch.float32), gpu]
        validators[gpu] = [gpu, replace(gpu, keeps_graphs=False), fp32]
    return validators


def measure(spec: RunSpec, num_seeds: int, validators: Mapping[Conditions, Sequence[Conditions]]) -> list[NoiseRow]:
    """All rows over so many seeds; the first kind of miner cheats too. Sets torch's threads, and puts them back."""
    samples: Samples = defaultdict(list)
    cheater = next(iter(validators))
    for seed in range(num_seeds):
        seeded = spec.model_copy(update={"seed": seed})
        for miner, others in validators.items():
            for log in work(seeded, miner):
                for validator in others:
                    repeat(seeded, log, validator, Cheat.NONE, samples)
                if miner == cheater:
                    _measure_cheats(seeded, log, samples)
    return [_row(key, comparisons) for key, comparisons in samples.items()]


def _measure_cheats(spec: RunSpec, log: StageLog, samples: Samples) -> None:
    for cheat in Cheat:
        if cheat is not Cheat.NONE:
            repeat(spec, log, log.miner, cheat, samples)
    _measure_noise(spec, log, samples)


def work(spec: RunSpec, conditions: Conditions) -> list[StageLog]:
    """One outer step of a whole pipeline, honestly."""
    tokens = SyntheticTokens(spec.model.vocab_size, spec.data.sequences_per_microbatch, spec.data.sequence_width)
    with _threads(conditions.num_threads):
        states = [initial_anchor(spec, stage_index) for stage_index in range(spec.num_stages)]
        logs = [StageLog(index, conditions, state, [], torch.empty(0)) for index, state in enumerate(states)]
        stages = [_Worker(spec, log, conditions) for log in logs]
        waiting: deque[tuple[MicrobatchId, Tensor]] = deque()
        for number in range(spec.inner_steps * spec.microbatches_per_step):
            microbatch_id = MicrobatchId(number)
            ids_BU = torch.from_numpy(tokens.microbatch(spec.seed, number))
            tensor_BTC: Tensor | None = None
            for stage in stages:
                tensor_BTC = stage.forward(microbatch_id, tensor_BTC, ids_BU)
            assert tensor_BTC is not None
            waiting.append((microbatch_id, tensor_BTC))
            if len(waiting) == IN_FLIGHT:
                _bring_back(stages, waiting)
        while waiting:
            _bring_back(stages, waiting)
        for stage, log in zip(stages, logs, strict=True):
            log.pseudo_gradient_N = stage.engine.pseudo_gradient_N().cpu()
    return logs


def repeat(spec: RunSpec, log: StageLog, validator: Conditions, cheat: Cheat, samples: Samples) -> None:
    """Repeats a log, cheating as told, and compares all that it leaves behind."""
    key = (str(log.miner), str(validator), str(cheat))
    middle = len(log.operations) // 2
    steps = [place for place, each in enumerate(log.operations) if each.operation is Operation.INNER_STEP]
    skipped_step = min(steps, key=lambda place: abs(place - middle))
    with _threads(validator.num_threads):
        engine = build_engine(spec, log, validator, cheat)
        num_steps, has_skipped = 0, False
        for place, each in enumerate(log.operations):
            if each.operation is Operation.INNER_STEP:
                if not (cheat is Cheat.SKIPPED_STEP and place == skipped_step):
                    engine.inner_step(num_steps)
                num_steps += 1
                continue
            is_backward = each.operation is Operation.BACKWARD
            if cheat is Cheat.SKIPPED_BACKWARD and is_backward and place >= middle and not has_skipped:
                engine.drop(each.microbatch_id)  # the gradient that it would send on is made up
                has_skipped = True
                continue
            _compare_output(engine, each, samples, key)
        own_N = engine.pseudo_gradient_N().cpu()
    for partition in partition_bounds(own_N.numel(), spec.num_partitions):
        cut = slice(partition.start, partition.end)
        comparison = compare(log.pseudo_gradient_N[cut], own_N[cut], NOTHING_FAILS)
        samples[*key, Quantity.PSEUDO_GRADIENT].append(comparison)


def build_engine(spec: RunSpec, log: StageLog, conditions: Conditions, cheat: Cheat = Cheat.NONE) -> StageEngine:
    """An engine that stands where the log begins."""
    engine = {Cheat.ROUNDED: _RoundingEngine, Cheat.STALE: _StaleEngine}.get(cheat, StageEngine)(
        Stage(spec.model, spec.layouts[log.stage_index]),
        inner=spec.inner,
        outer=spec.outer,
        total_params=sum(spec.stage_sizes),
        device=torch.device(conditions.device),
        compute_dtype=conditions.compute_dtype,
        wire_dtype=torch.float32,
        graphs_max=GRAPHS_MAX if conditions.keeps_graphs else 0,
    )
    engine.load(log.state)
    engine.begin_outer_step()
    return engine


def _compare_output(engine: StageEngine, each: LoggedOperation, samples: Samples, key: tuple[str, str, str]) -> None:
    if each.operation is Operation.FORWARD:
        assert each.ids_BU is not None
        result = engine.forward(each.microbatch_id, each.input_BTC, each.ids_BU)
        own_BTC = result.output_BTC if result.output_BTC is not None else result.input_grad_BTC
        quantity = Quantity.FORWARD if result.output_BTC is not None else Quantity.INPUT_GRADIENT
    else:
        assert each.input_BTC is not None
        own_BTC, quantity = engine.backward(each.microbatch_id, each.input_BTC).input_grad_BTC, Quantity.INPUT_GRADIENT
    if each.output_BTC is not None and own_BTC is not None:
        samples[*key, quantity].append(compare(each.output_BTC, own_BTC, NOTHING_FAILS))


def _measure_noise(spec: RunSpec, log: StageLog, samples: Samples) -> None:
    """Noise that is added to what is sent: useless to whoever adds it, unless it is meant to harm."""
    miner = str(log.miner)
    generator = torch.Generator().manual_seed(log.stage_index)
    for each in log.operations:
        if each.output_BTC is None:
            continue
        is_forward = each.operation is Operation.FORWARD and log.stage_index < spec.num_stages - 1
        quantity = Quantity.FORWARD if is_forward else Quantity.INPUT_GRADIENT
        for share in NOISE_SHARES:
            noise_BTC = torch.randn(each.output_BTC.shape, generator=generator) * each.output_BTC.std() * share
            comparison = compare(each.output_BTC + noise_BTC, each.output_BTC, NOTHING_FAILS)
            samples[miner, miner, f"noise of {share:.0%} added", quantity].append(comparison)


def _bring_back(stages: "Sequence[_Worker]", waiting: deque[tuple[MicrobatchId, Tensor]]) -> None:
    microbatch_id, grad_BTC = waiting.popleft()
    for stage in reversed(stages[:-1]):
        back_BTC = stage.backward(microbatch_id, grad_BTC)
        if back_BTC is not None:
            grad_BTC = back_BTC


class _Worker:
    """A miner's engine and log."""

    def __init__(self, spec: RunSpec, log: StageLog, conditions: Conditions) -> None:
        self.engine = build_engine(spec, log, conditions)
        self._log = log
        self._per_step = spec.microbatches_per_step
        self._num_steps = 0

    def forward(self, microbatch_id: MicrobatchId, input_BTC: Tensor | None, ids_BU: Tensor) -> Tensor:
        """The activation for the next stage, or the last one's gradient."""
        result = self.engine.forward(microbatch_id, input_BTC, ids_BU)
        output_BTC = result.output_BTC if result.output_BTC is not None else result.input_grad_BTC
        assert output_BTC is not None
        entry = LoggedOperation(Operation.FORWARD, microbatch_id, input_BTC, ids_BU, output_BTC)
        self._log.operations.append(entry)
        self._step_when_full()
        return output_BTC

    def backward(self, microbatch_id: MicrobatchId, grad_BTC: Tensor) -> Tensor | None:
        """The gradient for the stage before."""
        back_BTC = self.engine.backward(microbatch_id, grad_BTC).input_grad_BTC
        entry = LoggedOperation(Operation.BACKWARD, microbatch_id, grad_BTC, None, back_BTC)
        self._log.operations.append(entry)
        self._step_when_full()
        return back_BTC

    def _step_when_full(self) -> None:
        if self.engine.num_accumulated == self._per_step:
            self.engine.inner_step(self._num_steps)
            self._num_steps += 1
            self._log.operations.append(LoggedOperation(Operation.INNER_STEP, MicrobatchId(0)))


class _RoundingEngine(StageEngine):
    """Computes with matrices of 8 bits, one scale a row: what quarters the memory traffic of weights."""

    def _publish(self, number: int) -> Version:
        version = super()._publish(number)
        return Version(version.number, {name: _rounded(param) for name, param in version.params.items()})


class _StaleEngine(StageEngine):
    """Computes with the version before the newest, as one that takes its inner steps late."""

    def _publish(self, number: int) -> Version:
        newest: Version | None = getattr(self, "_newest", None)
        self._newest = super()._publish(number)
        before = newest if newest is not None and number > 0 else self._newest
        return Version(number, before.params)


def _rounded(param: Tensor) -> Tensor:
    if param.ndim < 2:
        return param
    values = param.detach()
    scales = values.abs().amax(dim=-1, keepdim=True).clamp(min=torch.finfo(values.dtype).tiny) / LEVELS_MAX
    return ((values / scales).round() * scales).requires_grad_()


@contextmanager
def _threads(num_threads: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(num_threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _row(key: tuple[str, str, str, Quantity], comparisons: Sequence[Comparison]) -> NoiseRow:
    cosines = [comparison.cosine for comparison in comparisons]
    norm_ratios = [comparison.norm_ratio for comparison in comparisons]
    return NoiseRow(
        miner=key[0],
        validator=key[1],
        cheat=key[2],
        quantity=key[3],
        num_tensors=len(comparisons),
        bit_equal_share=sum(comparison.bit_equal for comparison in comparisons) / len(comparisons),
        cosine_least=min(cosines),
        cosine_median=statistics.median(cosines),
        cosine_most=max(cosines),
        norm_ratio_least=min(norm_ratios),
        norm_ratio_median=statistics.median(norm_ratios),
    )


def format_row(row: NoiseRow) -> str:
    """A row for people."""
    cosines = f"least {1 - row.cosine_most:.1e} median {1 - row.cosine_median:.1e} most {1 - row.cosine_least:.1e}"
    who = f"{row.miner} → {row.validator}" if row.cheat == Cheat.NONE else f"cheat: {row.cheat}"
    return (
        f"{who:<66} {row.quantity:<16} {row.bit_equal_share:7.1%} bit-equal"
        f"  1 − cosine: {cosines}"
        f"  norm ratio: median {row.norm_ratio_median:.6f} least {row.norm_ratio_least:.6f}"
    )
