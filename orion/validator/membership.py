"""What the feed says about who is there, how far the outer steps are, and where anchors start. Pure."""

from orion.common.config import RunSpec
from orion.common.ids import Hotkey, MemberState, Phase
from orion.common.protocol.messages import (
    CheckpointRef,
    Feed,
    Peer,
)


class Membership:
    """The newest feed, and what must be remembered of the ones before it."""

    def __init__(self, spec: RunSpec) -> None:
        self._spec = spec
        self._version = -1
        self._peers: dict[Hotkey, Peer] = {}
        self._outer_steps: dict[int, int] = {}
        self._active_since: dict[Hotkey, int] = {}
        self._checkpoints: dict[int, list[CheckpointRef]] = {}
        self.finished = False
        self.validators: frozenset[Hotkey] = frozenset()
        """Whom miners show their logs."""
        self.checkable_outer_step: int | None = None
        """Newest outer step of which every stage has all commitments it will get; None before the first."""

    def update(self, feed: Feed) -> None:
        """Takes in a feed; an older one changes nothing."""
        if feed.version < self._version:
            return
        self._version = feed.version
        self.finished = feed.finished
        self.validators = frozenset(feed.validators)
        self._peers = {peer.hotkey: peer for peer in feed.peers if peer.state is not MemberState.GONE}
        outer_steps = self._outer_steps = {stage.stage_index: stage.outer_step for stage in feed.stages}
        self._active_since = {
            peer.hotkey: self._active_since.get(peer.hotkey, outer_steps.get(peer.stage_index, 0))
            for peer in self._peers.values()
            if peer.state is MemberState.ACTIVE
        }
        for stage in feed.stages:
            if stage.checkpoint is not None:
                self._remember(stage.checkpoint)
        # Miners commit before they upload, so once a stage merges its commitments are in. After the last outer step a
        # stage counts one more, in which nobody trains.
        committed = [stage.outer_step if stage.phase is Phase.MERGE else stage.outer_step - 1 for stage in feed.stages]
        newest = min(min(committed, default=-1), self._spec.outer_steps - 1)
        self.checkable_outer_step = newest if newest >= self._spec.first_outer_step else None

    def has_merged(self, stage_index: int, outer_step: int) -> bool:
        """Whether a stage has left an outer step behind, as far as was seen: how it was merged is public then."""
        return self._outer_steps.get(stage_index, 0) > outer_step

    def url(self, hotkey: Hotkey) -> str | None:
        """Where a member's peer server listens; None for who is no member."""
        peer = self._peers.get(hotkey)
        return None if peer is None else peer.url

    @property
    def stages(self) -> dict[Hotkey, int]:
        """The stage of every member."""
        return {hotkey: peer.stage_index for hotkey, peer in self._peers.items()}

    def outer_step(self, stage_index: int) -> int:
        """The outer step that a stage is in."""
        return self._outer_steps.get(stage_index, 0)

    def was_there(self, hotkey: Hotkey, outer_step: int) -> bool:
        """Whether a miner has been active without a break, as far as was seen, since that outer step.

        One that was away in between may have been unable to answer, and has lost pay by it.
        """
        since = self._active_since.get(hotkey)
        return since is not None and since <= outer_step

    def checkpoint(self, stage_index: int, outer_step: int) -> CheckpointRef | None:
        """The newest known checkpoint of a stage at or before an outer step."""
        refs = [ref for ref in self._checkpoints.get(stage_index, []) if ref.outer_step <= outer_step]
        return max(refs, key=lambda ref: ref.outer_step, default=None)

    def _remember(self, ref: CheckpointRef) -> None:
        refs = [known for known in self._checkpoints.get(ref.stage_index, []) if known.outer_step != ref.outer_step]
        refs.append(ref)
        refs.sort(key=lambda known: known.outer_step)
        self._checkpoints[ref.stage_index] = refs[-self._spec.keep_outer_steps :]
