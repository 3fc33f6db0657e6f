"""What is measured: the run that all systems train, the links between its stages, and which steps are timed. Pure."""

from dataclasses import dataclass
from enum import StrEnum

from orion.bench.links.profile import LinkProfile
from orion.common.config import RunSpec
from orion.common.model.config import ModelConfig

NUM_STAGES = 4
NUM_STAGES_QUICK = 2
RATIO_BAR = 0.95
"""Of the co-located pipeline's throughput, which Orion must reach in every setting."""


class System(StrEnum):
    """Who trains."""

    SINGLE = "single"
    """One process, two threads, no boundary."""
    TORCH = "torch_1f1b"
    """torch.distributed.pipelining over gloo, a process with one thread for each stage, no boundary."""
    TORCH_BOUNDARY = "torch_1f1b_boundary"
    """The same with Orion's boundary between the stages."""
    ORION = "orion"
    """An orchestrator and a miner for each stage, with one thread of computing each."""


@dataclass(frozen=True, slots=True)
class Window:
    """Which inner steps are timed: from the end of the last warm-up step to the end of the last measured one."""

    num_warm_up: int
    num_measured: int

    @property
    def num_steps(self) -> int:
        return self.num_warm_up + self.num_measured


@dataclass(frozen=True, slots=True)
class Setting:
    """The network between the stages."""

    name: str
    upload_mbit: float | None = None
    """Each peer's; None = unlimited."""
    rtt_ms: float = 0.0
    torch_window: Window | None = None
    """What is timed of torch without a boundary, where the usual window would take it minutes; None: that one."""

    @property
    def profile(self) -> LinkProfile | None:
        """Each peer's link; None: plain loopback."""
        if self.upload_mbit is None and not self.rtt_ms:
            return None
        return LinkProfile(upload_mbit=self.upload_mbit, delay_ms=self.rtt_ms / 2)

    @property
    def systems(self) -> tuple[System, ...]:
        """Who is measured in it: one process meets no network, and over distance only Orion is of interest."""
        if self.profile is None:
            return tuple(System)
        return (System.ORION,) if self.rtt_ms else (System.TORCH, System.TORCH_BOUNDARY, System.ORION)


UNSHAPED = Setting("unshaped")
SETTINGS = (
    UNSHAPED,
    Setting("856", 856.0),
    Setting("100", 100.0, torch_window=Window(1, 2)),
    Setting("20", 20.0, torch_window=Window(1, 1)),
    Setting("856_rtt60", 856.0, 60.0),
    Setting("20_rtt60", 20.0, 60.0),
)
MORE_SETTINGS = (Setting("856_rtt20", 856.0, 20.0), Setting("20_rtt20", 20.0, 20.0))
"""Measured when they are asked for by name."""


@dataclass(frozen=True, slots=True)
class Workload:
    """What every system trains."""

    spec: RunSpec
    """Orion's; the others take model, data and inner optimizer from it."""
    window: Window

    def window_of(self, system: System, setting: Setting) -> Window:
        """What is timed of that system there."""
        if system is System.TORCH and setting.torch_window is not None:
            return setting.torch_window
        return self.window

    @property
    def tokens_per_step(self) -> int:
        return self.spec.microbatches_per_step * self.spec.tokens_per_microbatch

    def model(self, *, with_boundary: bool) -> ModelConfig:
        """The model as a system trains it."""
        return self.spec.model if with_boundary else self.spec.model.with_boundary("none")


def workload(*, quick: bool, staleness_max: int | None = None) -> Workload:
    """About 8 M parameters and 8,192 tokens a step; quick: a toy that is through in seconds and says nothing of
    speed. `staleness_max`: of Orion's gradients, in inner steps (0: it begins no microbatch before the step for the
    last batch); None: what runs usually allow."""
    window = Window(1, 2) if quick else Window(2, 4)
    num_stages = NUM_STAGES_QUICK if quick else NUM_STAGES
    model = {
        "name": "pipeline-bench",
        "vocab_size": 512 if quick else 1024,
        "width": 64 if quick else 384,
        "num_blocks": num_stages,
        "num_heads": 2 if quick else 6,
        "num_kv_heads": 2 if quick else 6,
        "head_dim": 32 if quick else 64,
        "ffn_width": 128 if quick else 1024,
        "context_length": 128,
    }
    tree = {
        "run_id": "pipeline-bench",
        "seed": 1,
        "num_stages": num_stages,
        "replicas": 1,
        "outer_steps": 1,
        # Two steps more than are timed: the last ones, in which the pipeline runs empty, are no steady state.
        "inner_steps": window.num_steps + 2,
        "microbatches_per_step": 4 if quick else 8,
        "model": model,
        "data": {
            "source": "kjv",
            "tokenizer": "bpe:512" if quick else "bpe:1024",
            "sequence_length": 32 if quick else 128,
            "sequences_per_microbatch": 4 if quick else 8,
        },
        "flow": {"in_flight_max": 8} if staleness_max is None else {"in_flight_max": 8, "staleness_max": staleness_max},
        "time_limits": {"train_s": 3600.0},
    }
    return Workload(RunSpec.parse(tree, "pipeline benchmark"), window)
