"""What the page shows, as it travels to the browser. Every list is bounded by where it comes from (`view`).

These are no messages of the protocol: they may change with the page.
"""

from pydantic import BaseModel, ConfigDict

from orion.common.ids import Hotkey, MemberState
from orion.orchestrator.dashboard.chronicle import Level, Part


class _Model(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Head(_Model):
    """The run in figures."""

    run_id: str
    model: str
    num_params: int
    num_stages: int
    replicas: int
    """Wanted for each stage."""
    sync: str
    finished: bool
    finish_reason: str
    started_s: float | None
    outer_step: int
    first_outer_step: int
    outer_steps: int
    inner_steps: int
    fraction: float
    remaining_s: float | None
    loss: float | None
    """Mean of the newest microbatches."""
    tokens: int
    tokens_per_s: float
    flops_per_s: float
    """Of forwards and backwards that were applied; no recomputing, no lost work."""
    busy: float | None
    """Mean share of the time in which active miners' devices computed."""
    mfu: float | None
    """Achieved ÷ peak operations, over the active miners whose device's peak is known; None when there is none."""
    num_peaks: int
    """Active miners whose device's peak is known."""
    num_active: int
    num_present: int
    started: int
    applied: int
    cancelled: int
    in_flight: int
    rerouted: int
    spliced: int
    released: int
    num_checks: int
    num_failed: int
    anchors_equal: bool
    checkpoint_step: int | None
    """Of the newest durable checkpoint of the whole model."""


class MinerCell(_Model):
    """One miner on the map."""

    hotkey: Hotkey
    state: MemberState
    health: str
    """`good`, `joining`, `suspect`, `barred` or `gone`."""
    why: str
    """In words."""
    device: str
    busy: float | None
    tokens_per_s: float | None
    flops_per_s: float | None
    mfu: float | None
    queued: int | None
    in_flight: int | None
    applied: int | None
    inner_step: int | None
    staleness_max: int | None
    upload_bytes_per_s: float | None
    download_bytes_per_s: float | None
    credited: int
    silent_s: int
    """Since it was last heard of."""
    is_equal: bool | None
    """Whether its newest told anchor was the one that its stage agreed on; None while it told none."""


class StageColumn(_Model):
    """One stage on the map."""

    stage_index: int
    blocks: str
    num_params: int
    part: Part
    outer_step: int
    trains: int | None
    """The outer step of which it takes work."""
    deadline_s: float | None
    digest: str | None
    """First letters of the agreed anchor's digest."""
    miners: tuple[MinerCell, ...]
    num_hidden: int
    """Further miners that are not listed."""


class Edge(_Model):
    """Microbatches that lately went from one miner to another."""

    source: Hotkey
    target: Hotkey
    share: float
    """Of all that crossed this boundary."""


class Map(_Model):
    """Stages × replicas, and what flows between them."""

    stages: tuple[StageColumn, ...]
    edges: tuple[Edge, ...]
    num_paths: int
    """Newest applied microbatches that the shares are of."""
    microbatches_per_s: float


class Curves(_Model):
    """Columns of equal length: the loss by bins, and the run's rates by samples."""

    bin_size: int
    tokens: tuple[int, ...]
    steps: tuple[float, ...]
    loss: tuple[float, ...]
    deviation: tuple[float, ...]
    """Standard deviation within the bin."""
    times_s: tuple[float, ...]
    tokens_per_s: tuple[float, ...]
    flops_per_s: tuple[float, ...]
    busy: tuple[float | None, ...]


class Span(_Model):
    part: Part
    begin_s: float
    end_s: float | None
    """None: it goes on."""


class MinerBar(_Model):
    """When a miner had done its part of an outer step; Unix seconds."""

    hotkey: Hotkey
    announced_s: float | None
    stored_s: float | None
    reduced_s: float | None
    applied_s: float | None
    upload_s: float | None
    """Seconds from the upload phase's beginning until all was in the store."""
    is_straggler: bool
    """It took much longer than the usual replica of its stage."""


class StepRow(_Model):
    stage_index: int
    outer_step: int
    spans: tuple[Span, ...]
    miners: tuple[MinerBar, ...]


class Timeline(_Model):
    """The newest outer steps, stage by stage."""

    rows: tuple[StepRow, ...]


class Agreement(_Model):
    """Whether a stage's replicas stood on the same anchor after an outer step."""

    stage_index: int
    outer_step: int
    num_told: int
    num_equal: int
    digest: str
    """First letters of what most told."""


class Staleness(_Model):
    stage_index: int
    counts: tuple[int, ...]


class Ranked(_Model):
    """A row of the leaderboard."""

    rank: int
    hotkey: Hotkey
    stage_index: int
    score: float
    share: float
    """Of all scores."""
    waits: float
    """Share of its counted work that waits for verification."""
    credited: int
    verified_step: int | None
    failed: bool


class Trust(_Model):
    agreement: tuple[Agreement, ...]
    staleness: tuple[Staleness, ...]
    ranking: tuple[Ranked, ...]
    num_unranked: int
    """Miners with a score beyond the last row."""


class LogLine(_Model):
    number: int
    time_s: float
    level: Level
    text: str
    hotkey: Hotkey | None


class Log(_Model):
    lines: tuple[LogLine, ...]
    """Newest last."""
    num_lines: int
    """Ever written."""


class Page(_Model):
    """All of it."""

    now_s: float
    head: Head
    map: Map
    curves: Curves
    timeline: Timeline
    trust: Trust
    log: Log
