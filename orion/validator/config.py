"""What one validator process cares about; what all processes must agree on is in the run's specification."""

from pathlib import Path
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field


class Budget(BaseModel):
    """What one validator can afford; what it leaves undone by that is said in its log."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    compute_s: Annotated[float, Field(gt=0)] = 3600.0
    """Seconds of replaying and reducing per outer step; the round ends early once they are spent."""
    evidence_bytes: Annotated[int, Field(gt=0)] = 4 * 1024**3
    """Host memory for the tensors of one replay; a log that needs more is replayed in part."""


class ValidatorConfig(BaseModel):
    """Settings of a validator."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    orchestrator_url: str
    """Of the run to validate, without a trailing slash."""
    data_folder: Path
    """The run's prepared data; fetched from the orchestrator when it is not there."""
    device: str = "cpu"
    """Where replays are computed: `cpu`, `cuda`, `cuda:N`. Bits can only be equal on what the miners use."""
    num_threads: Annotated[int, Field(ge=1, le=1024)] = 1
    """Threads of a replay on the CPU. With as many as the miners have, results are equal bit for bit; one leaves the
    rest of a shared machine to training."""
    niceness: Annotated[int, Field(ge=0, le=19)] = 0
    """Added to the process's niceness, so that on a shared machine checks give way to training."""
    budget: Budget = Budget()
    bundle_folder: Path | None = None
    """Where a replay that failed leaves what a third party needs to repeat it (`orion replay`); None = nowhere."""
    bundle_bytes_max: Annotated[int, Field(gt=0)] = 4 * 1024**3
    """Of that folder; the oldest bundles make room."""
    follow: bool = False
    """Stay after the run has finished."""
    tick_s: Annotated[float, Field(gt=0, le=10)] = 0.5
    """How often deadlines are looked at."""
    feed_wait_s: Annotated[float, Field(gt=0, le=30)] = 20.0
    """How long the orchestrator may hold a request for the feed when nothing changes."""
    silence_s_max: Annotated[float, Field(gt=0)] = 1800.0
    """Without a feed for this long the process gives up."""
