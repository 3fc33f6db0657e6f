"""What is measured: the run, the links, the faults, and the least time that the links allow. Pure."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from enum import StrEnum
from typing import Any

from orion.bench.links.profile import LinkProfile
from orion.bench.sync.trace import Trace
from orion.common.config import RunSpec

NUM_REPLICAS = 4
RATIO_BAR = 1.1
"""Times the floor, for shaped links without a fault."""
SLOW_FACTOR = 10.0
"""By how much the slow peer's link gets slower, when the outer step that is timed begins to synchronise."""
NUM_WARM_UP = 1
"""Outer steps before the first that is timed; in it nobody's rate is known yet."""


class Fault(StrEnum):
    """What goes wrong in the outer step that is timed."""

    NONE = "none"
    SLOW = "slow"
    """One peer's link turns ten times slower."""
    KILLED_UPLOAD = "killed_upload"
    """One miner is killed while it uploads."""
    KILLED_REDUCE = "killed_reduce"
    """… while it reduces."""
    KILLED_APPLY = "killed_apply"
    """… once the manifest is out."""
    LIAR = "liar"
    """One reducer lies about every mean."""


@dataclass(frozen=True, slots=True)
class Setting:
    """The links of all replicas, and what goes wrong."""

    name: str
    upload_mbit: float | None = None
    download_mbit: float | None = None
    fault: Fault = Fault.NONE

    @property
    def is_shaped(self) -> bool:
        return self.upload_mbit is not None

    @property
    def profiles(self) -> list[LinkProfile]:
        """Of the replicas, and last of the orchestrator with its store, which stands where bandwidth is no matter."""
        replica = LinkProfile(upload_mbit=self.upload_mbit, download_mbit=self.download_mbit)
        return [*[replica] * NUM_REPLICAS, LinkProfile()]

    def floor_s(self, stage_bytes: int) -> float | None:
        """What reduce-scatter and all-gather take at least: 2(R−1)/R of the stage up and down; None: no limit."""
        if self.upload_mbit is None or self.download_mbit is None:
            return None
        return 8 * floor_bytes(stage_bytes) / (1e6 * min(self.upload_mbit, self.download_mbit))


def floor_bytes(stage_bytes: int, replicas: int = NUM_REPLICAS) -> float:
    """What each replica must send, and receive, when nobody checks anybody."""
    return 2 * (replicas - 1) / replicas * stage_bytes


def scheme_bytes(stage_bytes: int, replicas: int = NUM_REPLICAS) -> tuple[float, float]:
    """What each replica sends and receives when every partition is reduced by two: up its own contribution, once, and
    the means that it writes; down others' slices of the partitions that it reduces, and the means that it did not
    make."""
    if replicas == 1:
        return 2.0 * stage_bytes, 0.0
    up = stage_bytes * (1 + 1 / replicas)
    down = stage_bytes * (2 * (replicas - 1) / replicas + (replicas - 2) / replicas)
    return up, down


UNSHAPED = Setting("unshaped")
SETTINGS = (
    UNSHAPED,
    Setting("856", 856.0, 1322.0),
    Setting("100", 100.0, 200.0),
    *(Setting("100", 100.0, 200.0, fault) for fault in Fault if fault is not Fault.NONE),
)


@dataclass(frozen=True, slots=True)
class Row:
    """One setting, measured."""

    name: str
    fault: str
    seconds: float
    """From the end of training until the last replica has applied the outer step."""
    all_s: tuple[float, ...]
    """Of every timed outer step; `seconds` is their median."""
    floor_s: float | None
    ratio: float | None
    bytes_up: float | None
    """Of one replica in one outer step, the mean of all; None where they share an interface."""
    bytes_down: float | None
    gloo_s: float | None
    hivemind_s: float | None = None
    """None unless an interpreter that has hivemind was named."""
    phases_s: tuple[float, float, float] = (0.0, 0.0, 0.0)
    """Of the median outer step: until all contributions were there, until the manifest, until all had applied."""
    anchors_equal: bool = True
    notices: tuple[str, ...] = ()
    marks_s: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    """When the first and the last replica told of what it had done in the median outer step."""
    trace: Trace | None = None
    """Of the median outer step."""

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


def delay_s(row: Row, rows: Sequence[Row]) -> float | None:
    """By how much a fault delays the others: beyond what the same links take without one; None: not measured."""
    healthy = [other.seconds for other in rows if other.name == row.name and other.fault == Fault.NONE]
    return row.seconds - healthy[0] if healthy and row.fault != Fault.NONE else None


def misses(rows: list[Row], grace_s: float, stage_bytes: int = 0) -> list[str]:
    """Bars that do not hold, in words."""
    found: list[str] = []
    up, _ = scheme_bytes(stage_bytes)
    for row in rows:
        where = f"{row.name}, fault {row.fault}"
        if not row.anchors_equal:
            found.append(f"{where}: anchors differ")
        if row.fault == Fault.NONE:
            if row.bytes_up is not None and row.bytes_up < 0.95 * up:
                found.append(f"{where}: {row.bytes_up / 1e6:.1f} MB up a replica: not all of them contributed")
            if row.ratio is not None and row.ratio > RATIO_BAR:
                found.append(f"{where}: {row.ratio:.2f} times the floor, the bar is {RATIO_BAR:g}")
        elif (late_s := delay_s(row, rows)) is not None and late_s > grace_s:
            found.append(f"{where}: {row.seconds:.1f} s, {late_s:.1f} s more than without; the grace is {grace_s:g} s")
    return found


def sync_spec(*, quick: bool) -> RunSpec:
    """A stage of about 100 MB in fp32 and four replicas; quick: of some hundred kilobytes."""
    model = {
        "name": "sync-bench",
        "vocab_size": 512 if quick else 1024,
        "width": 64 if quick else 768,
        "num_blocks": 1 if quick else 3,
        "num_heads": 2 if quick else 12,
        "num_kv_heads": 2 if quick else 12,
        "head_dim": 32 if quick else 64,
        "ffn_width": 128 if quick else 2432,
        "context_length": 32,
    }
    tree = {
        "run_id": "sync-bench",
        "seed": 1,
        "num_stages": 1,
        "replicas": NUM_REPLICAS,
        "outer_steps": 16,
        "inner_steps": 1,
        # Enough that each replica gets some, however unequally fast they ask: who has none contributes nothing.
        "microbatches_per_step": 32,
        "flow": {"in_flight_max": 4},
        "num_partitions": 8 if quick else 32,
        "checkpoint_every": 32,
        "keep_outer_steps": 33,
        "model": model,
        "data": {
            "source": "kjv",
            "tokenizer": "bpe:512" if quick else "bpe:1024",
            "sequence_length": 32,
            "sequences_per_microbatch": 1,
        },
        "time_limits": {
            "train_s": 600.0,
            "transfer_grace_s": 5.0,
            "member_s": 5.0,
            "bandwidth_floor_bytes_per_s": 1.25e6,
        },
        "validation": {"commit_s": 1.0},
    }
    return RunSpec.parse(tree, "sync benchmark")
