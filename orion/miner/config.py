"""What one miner process cares about; what all processes must agree on is in the run's specification."""

from pathlib import Path
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field


class MinerConfig(BaseModel):
    """Settings of a miner."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    orchestrator_url: str
    """Of the run to take part in, without a trailing slash."""
    data_folder: Path
    """The run's prepared data. Needed on the first stage only; fetched from the orchestrator when it is not there."""
    host: str = "127.0.0.1"
    """Address to listen on; `0.0.0.0` = all."""
    port: Annotated[int, Field(ge=0, le=65_535)] = 0
    """TCP port; 0 = a free one."""
    public_url: str | None = None
    """How other miners reach this one, `http://ADDRESS:PORT`; None = `host` and `port`."""
    stage_index: Annotated[int, Field(ge=0, lt=512)] | None = None
    """A wish, followed when that stage lacks miners."""
    device: str = "auto"
    """Where the stage is computed: `cpu`, `cuda`, `cuda:N`; `auto` = CUDA where there is one."""
    device_memory_bytes: Annotated[int, Field(ge=1)] | None = None
    """Of the device's memory, what this miner may plan with; None = all. Less of it means fewer kept graphs and more
    computing again; too little is refused when the stage is known."""
    num_threads: Annotated[int, Field(ge=1, le=1024)] = 1
    """Threads of the computation on a CPU. More than one only where no other miner shares the machine."""
    state_folder: Path
    """Where the logs and tensors lie that validators may ask for. A miner that loses it fails its checks."""
    evidence_bytes_max: Annotated[int, Field(ge=0)] = 8 * 1024**3
    """Disk for these tensors, shared evenly by the newest outer steps. What does not fit cannot be replayed, and the
    commitment says so; until it is written (`validation.commit_s`) it lies in memory."""
    heartbeat_s: Annotated[float, Field(gt=0, le=60)] = 2.0
    """Between two signs of life; a few must fit into the run's `member_s`."""
    feed_wait_s: Annotated[float, Field(gt=0, le=30)] = 20.0
    """How long the orchestrator may hold a request for the feed when nothing changes."""
    silence_s_max: Annotated[float, Field(gt=0)] = 1800.0
    """Without a feed for this long the process gives up."""
