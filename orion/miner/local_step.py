"""What a miner did in one outer step, and, in overlapped runs, how the one before it comes to its end meanwhile. Pure.

Owns these records and what each says by itself; when they begin and end is in `outer`.
"""

from dataclasses import dataclass, field

from orion.common.ids import Digest, Hotkey, Phase
from orion.common.protocol.messages import Manifest, ObjectRef
from orion.miner.notices import Backoff
from orion.miner.view import View


@dataclass(slots=True)
class LocalStep:
    """What this miner did in an outer step, from its first microbatch on."""

    outer_step: int
    inner_steps: int = 0
    """Done, the refused ones too: as the log counts them."""
    num_accumulated: int = 0
    """Microbatches whose gradients wait for the next inner step."""
    num_stepped: int = 0
    """Microbatches that went into inner steps that were taken: the weight of the pseudo-gradient."""
    is_sealed: bool = False
    """Nothing more is computed in it and its log is closed."""
    objects: tuple[ObjectRef, ...] | None = None
    """The encoded pseudo-gradient; None before it is encoded."""
    error_digest: Digest | None = None
    """Of the error state that encoding left behind."""
    is_announced: bool = False
    """The orchestrator was told what it is."""
    is_uploading: bool = False
    is_uploaded: bool = False
    backoff: Backoff = field(default_factory=Backoff)
    """Of the upload."""

    def is_awaited(self, view: View, hotkey: Hotkey) -> bool:
        """Whether the stage still takes what this upload is: in time; or late, up to the end of the next upload phase.

        Between the two, before the manifest says which, it may be either."""
        stage, manifest = view.stage, view.manifest
        if stage.outer_step == self.outer_step and not view.is_merged(self.outer_step):
            return stage.phase is Phase.UPLOAD or (self.is_announced and stage.phase is Phase.MERGE)
        if manifest is None or manifest.outer_step != self.outer_step or hotkey not in manifest.late:
            return False
        return stage.outer_step == self.outer_step or stage.phase in (Phase.TRAIN, Phase.UPLOAD)


@dataclass(slots=True)
class Unmerged:
    """The outer step before the one that trains, while it is uploaded and merged.

    The engine stands on its anchor, less what this miner uploaded; `merged_digest` is of the state that it leads to,
    once that lies beside the device. There is one only while the engine has begun the next outer step ahead.
    """

    local: LocalStep
    is_fetching: bool = False
    merged_digest: Digest | None = None
    backoff: Backoff = field(default_factory=Backoff)

    @property
    def outer_step(self) -> int:
        return self.local.outer_step

    def is_left_out(self, manifest: Manifest | None, hotkey: Hotkey) -> bool:
        """Whether it was merged without this miner, which is not late either: then what was begun ahead began where
        nobody can follow. Who is late began where its upload leads, once that is there."""
        if manifest is None or manifest.outer_step < self.outer_step:
            return False
        return manifest.outer_step > self.outer_step or not manifest.takes(hotkey)
