"""What only the orchestrator's process cares about: where it listens, where it keeps things, how often it looks."""

from pathlib import Path
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

JOURNAL_FILE = "journal.sqlite"


class OrchestratorConfig(BaseModel):
    """The orchestrator's own settings; what all processes must agree on is in the RunSpec."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    state_folder: Path
    """Holds the public ledger and, unless they are elsewhere, journal and object store; belongs to one orchestrator of
    one run."""
    journal: str | None = None
    """Address of the journal: `postgresql://USER@HOST/NAME` or `sqlite:///PATH`; None: a file in the state folder."""
    store: str | None = None
    """Address of the object store on S3 (`orion.common.net.s3_address`); None: a directory in the state folder."""
    data_folder: Path | None = None
    """The prepared data, for miners to fetch; None = they have it from elsewhere."""
    start_paths: tuple[Path, ...] = ()
    """Where the run goes on from a checkpoint: the file of every stage. Only needed when it begins."""
    host: str = "127.0.0.1"
    """Address to listen on; `0.0.0.0` = all."""
    port: Annotated[int, Field(ge=0, le=65_535)] = 8700
    """TCP port; 0 = a free one."""
    tick_s: Annotated[float, Field(gt=0, le=5)] = 0.25
    """Between two looks at deadlines."""
    chain_poll_s: Annotated[float, Field(gt=0, le=3600)] = 3.0
    """Between two looks at the metagraph."""
    grant_s: Annotated[float, Field(gt=0, le=86_400)] = 600.0
    """How long a signed URL may be used for starting a transfer."""
    clock_skew_s: Annotated[float, Field(ge=0, le=60)] = 2.0
    """How far a sender's clock may be ahead of ours. Started again, the orchestrator refuses requests for this long."""
    snapshot_events: Annotated[int, Field(ge=1)] = 20_000
    """Between two snapshots of the state; as many are replayed at a restart, at worst."""
    queue_max: Annotated[int, Field(ge=1, le=1_000_000)] = 10_000
    """Events that may wait to be decided; beyond, requests are answered BUSY."""

    @property
    def journal_address(self) -> str:
        """Where the journal is."""
        return self.journal or f"sqlite:///{self.state_folder / JOURNAL_FILE}"
