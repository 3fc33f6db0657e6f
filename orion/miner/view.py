"""What a feed says to one member: its place, its stage's phase, its neighbours.

Owns the reading of feeds and nothing else; a view is frozen and asks nobody. Everything here is level-triggered: a view
tells how things are, never what changed.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from orion.common.ids import Hotkey, MemberState, Phase
from orion.common.protocol.messages import (
    Feed,
    Manifest,
    MergePlan,
    Peer,
    StageState,
)


@dataclass(frozen=True, slots=True)
class View:
    """One feed as a member of stage `stage_index` reads it."""

    stage_index: int
    state: MemberState
    stage: StageState
    stages: Mapping[int, StageState]
    peers: Mapping[Hotkey, Peer]
    merge_plan: MergePlan | None
    manifest: Manifest | None

    @property
    def training_step(self) -> int | None:
        """The outer step that this member may compute for now, None when it may not."""
        return self.stage.training_step if self.state is MemberState.ACTIVE else None

    @property
    def target_step(self) -> int:
        """The outer step whose anchor a member of the stage should hold: a published manifest counts at once."""
        if self.manifest is None:
            return self.stage.outer_step
        return max(self.stage.outer_step, self.manifest.outer_step + 1)

    def is_in(self, phase: Phase, outer_step: int) -> bool:
        """Whether the member's own stage is there now."""
        return self.stage.phase is phase and self.stage.outer_step == outer_step

    def is_merged(self, outer_step: int) -> bool:
        """Whether the manifest of that outer step (or a later one) is out."""
        return self.manifest is not None and self.manifest.outer_step >= outer_step

    def trains(self, stage_index: int, outer_step: int) -> bool:
        """Whether that stage takes work of that outer step now."""
        stage = self.stages.get(stage_index)
        return stage is not None and stage.training_step == outer_step

    def all_train(self, outer_step: int) -> bool:
        """Whether every stage takes work of that outer step now."""
        return all(self.trains(stage_index, outer_step) for stage_index in self.stages)

    def active(self, stage_index: int) -> tuple[Hotkey, ...]:
        """The stage's members that take work, in the order of their hotkeys."""
        return tuple(
            hotkey
            for hotkey, peer in sorted(self.peers.items())
            if peer.stage_index == stage_index and peer.state is MemberState.ACTIVE
        )

    def holders(self, asker: Hotkey) -> tuple[Peer, ...]:
        """The other members of this stage that hold its anchor, as far as the orchestrator knows, by hotkey."""
        return tuple(
            peer
            for hotkey, peer in sorted(self.peers.items())
            if hotkey != asker
            and peer.stage_index == self.stage_index
            and peer.state in (MemberState.READY, MemberState.ACTIVE)
        )

    def is_active(self, hotkey: Hotkey, stage_index: int) -> bool:
        """Whether that peer takes part in that stage's work."""
        peer = self.peers.get(hotkey)
        return peer is not None and peer.stage_index == stage_index and peer.state is MemberState.ACTIVE


def view_of(feed: Feed) -> View | None:
    """The view of whom the feed was made for; None when it is no member."""
    assignment = feed.assignment
    if assignment is None or assignment.state is MemberState.GONE:
        return None
    stages = {stage.stage_index: stage for stage in feed.stages}
    stage = stages.get(assignment.stage_index)
    if stage is None:
        return None

    def of_this_stage(record: Manifest | MergePlan | None) -> bool:
        return record is not None and record.stage_index == assignment.stage_index

    return View(
        stage_index=assignment.stage_index,
        state=assignment.state,
        stage=stage,
        stages=stages,
        peers={peer.hotkey: peer for peer in feed.peers},
        merge_plan=feed.merge_plan if of_this_stage(feed.merge_plan) else None,
        manifest=feed.manifest if of_this_stage(feed.manifest) else None,
    )
