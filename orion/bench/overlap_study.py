"""What overlapping and compression save of the time that merging takes, and what they cost in loss at equal tokens.

A simulated swarm with real tensors and virtual time: two stages of two replicas train a real model, every byte of every
merge travels over simulated links, and devices take as long as their profile says. Links are as slow as makes merging
take a fifth to a sixth of a blocking run. Every mode gets the same tokens in the same number of inner steps; what
differs is when, and what the codec loses.

Idle share: of all devices, from the end of the first train phase to the end of the last, so that each outer step is
counted with one merge. Loss: nats per token of the last anchors, on tokens that nobody trained on. Runs of one seed
begin with the same parameters and see the same data, so losses are compared within each seed; what is reported is the
mean over seeds, and the spread beside it.
"""

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch

from orion.common.config import FlowLimits, RunSpec, TimeLimits, ValidationRules
from orion.common.ids import Phase
from orion.common.model.config import ModelConfig
from orion.common.model.stage import Stage
from orion.common.train.compress import CodecName
from orion.common.train.config import InnerConfig, OuterConfig
from orion.common.train.data_config import DataConfig
from orion.common.train.engine import StageEngine
from orion.common.train.outer import OuterState
from orion.common.train.schedule import InnerSchedule
from orion.orchestrator.events import Announce
from orion.simulator.device import DeviceProfile
from orion.simulator.host import Host
from orion.simulator.network import LinkProfile
from orion.simulator.orchestrator_host import OrchestratorHost
from orion.simulator.swarm import Scenario, Swarm
from orion.simulator.tokens import SyntheticTokens

NUM_STAGES = 2
REPLICAS = 2
HELD_OUT_FROM = 1 << 40
"""Data ids that no run reaches."""
HELD_OUT_MICROBATCHES = 64
IDLE_SHARE_MAX = 0.02
LOSS_RATIO_MAX = 1.01
BLOCKING_SHARE = (0.15, 0.20)
"""Of a blocking run's time that merging should take, so that there is something to hide."""

ModeName = Literal["blocking", "overlapped", "overlapped_int8", "overlapped_topk"]
MODES: tuple[ModeName, ...] = ("blocking", "overlapped", "overlapped_int8", "overlapped_topk")
_CODECS: dict[ModeName, CodecName] = {
    "blocking": "none",
    "overlapped": "none",
    "overlapped_int8": "int8",
    "overlapped_topk": "topk",
}


@dataclass(frozen=True, slots=True)
class Workload:
    """What every mode trains, and on what."""

    model: ModelConfig
    sequences: int
    tokens: int
    """Of a sequence."""
    num_token_ids: int
    """Of the made-up text: few enough to be learned in the time."""
    outer_steps: int
    inner_steps: int
    microbatches_per_step: int
    up_bytes_per_s: float
    """Of each miner's link; down is twice that."""
    lr: float = 2e-3
    """Full inner learning rate."""

    @classmethod
    def usual(cls, outer_steps: int = 6) -> "Workload":
        """A Llama of 0.6 M parameters, H = 10. Model and microbatches are small, because a run computes them all, and
        there are many, because the pipeline drains at the end of an outer step whatever its length. The loss of the
        blocking run falls up to the last of six outer steps: where nothing is left to be learned nothing is compared.
        Links make merging take as large a part of the time as it does on slow ones."""
        model = ModelConfig.preset("nano").with_fields(
            name="2 blocks of width 128",
            num_blocks=2,
            width=128,
            head_dim=32,
            ffn_width=384,
            boundary={"kind": "anchored", "ratio": 32},
        )
        return cls(model, 1, 32, 512, outer_steps, 10, 36, up_bytes_per_s=1.3e5, lr=1e-3)

    @classmethod
    def quick(cls) -> "Workload":
        """Over in a moment: for a test. Merging takes a large part of so short an outer step."""
        model = ModelConfig.preset("nano").with_fields(name="quick", num_blocks=NUM_STAGES)
        return cls(model, 1, 16, 32, 3, 4, 4, up_bytes_per_s=2e6)

    @property
    def num_tokens(self) -> int:
        """Of a whole run."""
        return (
            self.outer_steps * self.inner_steps * self.microbatches_per_step * REPLICAS * self.sequences * self.tokens
        )


@dataclass(frozen=True, slots=True)
class ModeResult:
    """One run of a mode, or the mean of several."""

    mode: ModeName
    idle_share: float
    loss: float
    tokens_per_s: float
    """Of virtual time, within the same window as the idle share."""
    seed: int = 0
    """Of parameters, data, links and devices."""

    def as_json(self) -> dict[str, float]:
        """For a report."""
        return {"idle_share": self.idle_share, "loss": self.loss, "tokens_per_s": self.tokens_per_s}


@dataclass(frozen=True, slots=True)
class OverlapStudy:
    """All modes on one workload, each with the same seeds."""

    workload: Workload
    results: tuple[ModeResult, ...]

    def runs(self, mode: ModeName) -> list[ModeResult]:
        """A mode's runs, by seed."""
        return sorted((result for result in self.results if result.mode == mode), key=lambda result: result.seed)

    @property
    def modes(self) -> list[ModeName]:
        """Those that were run, in their order."""
        return [mode for mode in MODES if self.runs(mode)]

    def of(self, mode: ModeName) -> ModeResult:
        """A mode's mean over its seeds."""
        runs = self.runs(mode)
        idle_share, loss, tokens_per_s = (
            statistics.fmean(values) for values in zip(*(run.as_json().values() for run in runs), strict=True)
        )
        return ModeResult(mode, idle_share, loss, tokens_per_s)

    def spread(self, mode: ModeName) -> dict[str, float]:
        """Standard deviations between seeds; zeros for a single one."""
        columns = {name: [run.as_json()[name] for run in self.runs(mode)] for name in self.of(mode).as_json()}
        return {name: _deviation(values) for name, values in columns.items()}

    def loss_ratios(self, mode: ModeName) -> list[float]:
        """A mode's loss ÷ that of the blocking run of the same seed, by seed."""
        pairs = zip(self.runs(mode), self.runs("blocking"), strict=True)
        return [run.loss / blocking.loss for run, blocking in pairs]

    @property
    def merging_share(self) -> float:
        """Of a blocking run's time: what it takes longer for the same tokens than the overlapped one."""
        return 1.0 - self.of("blocking").tokens_per_s / self.of("overlapped").tokens_per_s

    def faults(self) -> list[str]:
        """The bars that do not hold."""
        faults = []
        if not BLOCKING_SHARE[0] <= self.merging_share <= BLOCKING_SHARE[1]:
            faults.append(f"merging takes {self.merging_share:.1%} of a blocking run, not 15 to 20 %")
        for mode in self.modes[1:]:
            idle_share, ratio = self.of(mode).idle_share, statistics.fmean(self.loss_ratios(mode))
            if idle_share > IDLE_SHARE_MAX:
                faults.append(f"{mode}: devices idle {idle_share:.1%}, bar {IDLE_SHARE_MAX:.0%}")
            if ratio > LOSS_RATIO_MAX:
                faults.append(f"{mode}: loss {ratio:.4f} times that of blocking, bar {LOSS_RATIO_MAX:g}")
        return faults

    def as_json(self) -> dict[str, object]:
        """For a report."""
        return {
            "model": self.workload.model.name,
            "tokens": self.workload.num_tokens,
            "merging_share": self.merging_share,
            "seeds": [run.seed for run in self.runs("blocking")],
            "modes": {mode: self.of(mode).as_json() for mode in self.modes},
            "spread": {mode: self.spread(mode) for mode in self.modes},
            "loss_ratios": {mode: self.loss_ratios(mode) for mode in self.modes[1:]},
            "faults": self.faults(),
        }


def overlap_study(
    workload: Workload,
    seeds: Sequence[int] = (1,),
    on_result: Callable[[ModeResult], None] | None = None,
    modes: Sequence[ModeName] = MODES,
) -> OverlapStudy:
    """Runs all modes, `blocking` first, for each seed; `on_result` hears of each. Raises RuntimeError for a run that
    did not end."""
    results = []
    for seed in seeds:
        for mode in modes:
            results.append(run_mode(workload, mode, seed))
            if on_result is not None:
                on_result(results[-1])
    return OverlapStudy(workload, tuple(results))


def _deviation(values: Sequence[float]) -> float:
    return statistics.stdev(values) if len(values) > 1 else 0.0


def format_result(result: ModeResult) -> str:
    """One line for people."""
    return (
        f"{result.mode:>16}, seed {result.seed}: devices idle {result.idle_share:6.1%}, loss {result.loss:.4f}, "
        f"{result.tokens_per_s:8.0f} tokens/s (virtual)"
    )


def run_mode(workload: Workload, mode: ModeName, seed: int = 1) -> ModeResult:
    """Trains a swarm in that mode. Raises RuntimeError when it does not end."""
    spec = spec_of(workload, mode, seed)
    scenario = Scenario(
        name=mode,
        spec=spec,
        virtual_s_max=24 * 3600.0,
        link=LinkProfile(
            up_bytes_per_s=workload.up_bytes_per_s,
            down_bytes_per_s=2 * workload.up_bytes_per_s,
            bulk_share=0.8,
            timeout_s=600.0,
        ),
        device=DeviceProfile(),
        store_rate_share=8.0 * NUM_STAGES * REPLICAS,
    )
    swarm = Swarm(scenario, seed)
    tokens = SyntheticTokens(workload.num_token_ids, workload.sequences, spec.data.sequence_width)
    swarm.world.tokens = tokens
    window = _Window(swarm)
    swarm.world.observers.append(window)
    swarm.start()
    if not swarm.run():
        raise RuntimeError(f"{mode}: the run did not end; its last notices: {swarm.status().notices[-5:]}")
    states = [swarm.miners[stage_index * REPLICAS].worker.outer_state for stage_index in range(NUM_STAGES)]
    losses = held_out_loss(spec, [state for state in states if state is not None], tokens)
    num_tokens = workload.num_tokens * (workload.outer_steps - 1) / workload.outer_steps
    return ModeResult(mode, window.idle_share, losses, num_tokens / window.seconds, seed)


def spec_of(workload: Workload, mode: ModeName, seed: int) -> RunSpec:
    """The run of a mode: nothing is checked, so that no device time goes there."""
    num_total_steps = workload.outer_steps * workload.inner_steps
    schedule = InnerSchedule(num_warmup_steps=min(10, num_total_steps // 4), num_total_steps=num_total_steps)
    return RunSpec(
        run_id="overlap",
        seed=seed,
        model=workload.model,
        data=DataConfig(sequence_length=workload.tokens, sequences_per_microbatch=workload.sequences),
        num_stages=NUM_STAGES,
        replicas=REPLICAS,
        outer_steps=workload.outer_steps,
        inner_steps=workload.inner_steps,
        microbatches_per_step=workload.microbatches_per_step,
        sync="blocking" if mode == "blocking" else "overlapped",
        codec=_CODECS[mode],
        inner=InnerConfig(lr_matrix=workload.lr, lr_other=workload.lr, schedule=schedule),
        outer=OuterConfig(),
        time_limits=TimeLimits(train_s=3600.0, transfer_grace_s=600.0, microbatch_s=600.0, member_s=60.0),
        flow=FlowLimits(in_flight_max=24),
        validation=ValidationRules(
            checks_per_outer_step=0, reductions_per_outer_step=0, replay_ops_max=1, whole_share=0.0, answer_s=1.0
        ),
    )


def held_out_loss(spec: RunSpec, states: Sequence[OuterState], tokens: SyntheticTokens) -> float:
    """Mean nats per token of a model in stages on data that no run trains on."""
    engines = []
    for layout, state in zip(spec.layouts, states, strict=True):
        engine = StageEngine(
            Stage(spec.model, layout),
            inner=spec.inner,
            outer=spec.outer,
            total_params=sum(spec.stage_sizes),
            device=torch.device("cpu"),
            compute_dtype=torch.float32,
            wire_dtype=torch.float32,
            graphs_max=0,
        )
        engine.load(state)
        engines.append(engine)
    total = 0.0
    for number in range(HELD_OUT_MICROBATCHES):
        ids_BU = torch.from_numpy(tokens.microbatch(spec.seed, HELD_OUT_FROM + number))
        x_BTC = None
        for engine in engines[:-1]:
            x_BTC = engine.evaluate(x_BTC, ids_BU).output_BTC
        loss = engines[-1].evaluate(x_BTC, ids_BU).loss
        assert loss is not None
        total += loss
    return total / HELD_OUT_MICROBATCHES


@dataclass(frozen=True, slots=True)
class _Mark:
    at_s: float
    busy_s: float
    """Of all devices together."""


class _Window:
    """Notes when the first train phase ended and when the last one did, and how busy devices were between."""

    def __init__(self, swarm: Swarm) -> None:
        self._swarm = swarm
        self._marks: dict[int, _Mark] = {}
        """By the outer step whose train phase ended then."""

    def handled(self, host: Host, event: object, effects: Sequence[object]) -> None:
        """As every observer of a simulated world."""
        if not isinstance(host, OrchestratorHost) or not any(isinstance(effect, Announce) for effect in effects):
            return
        stage = host.stage_states()[0]
        if stage.phase is Phase.UPLOAD and stage.outer_step not in self._marks:
            busy_s = sum(device.busy_s for device in self._swarm.devices)
            self._marks[stage.outer_step] = _Mark(self._swarm.world.clock.now_s(), busy_s)

    @property
    def seconds(self) -> float:
        """From the first mark to the last."""
        first, last = self._ends()
        return last.at_s - first.at_s

    @property
    def idle_share(self) -> float:
        """Of the devices' time between."""
        first, last = self._ends()
        return 1.0 - (last.busy_s - first.busy_s) / (self.seconds * len(self._swarm.devices))

    def _ends(self) -> tuple[_Mark, _Mark]:
        return self._marks[min(self._marks)], self._marks[max(self._marks)]


def with_links(workload: Workload, up_bytes_per_s: float) -> Workload:
    """The same over other links."""
    return replace(workload, up_bytes_per_s=up_bytes_per_s)
