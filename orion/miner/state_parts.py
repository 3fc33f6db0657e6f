"""What this miner hands out of the anchor and momentum that it stands on: the outline, and single parts.

Owns which state may be read: the one that the engine stands on, and only for who names it by its digest. Nobody writes
into its tensors, so it is read beside the device. Synchronous; calls may come from several threads.
"""

from typing import Protocol

from orion.common.ids import Digest
from orion.common.protocol.messages import StateOutline, StateQuery
from orion.common.train.outer import OuterState, outline_digest, part_bytes, state_bounds, state_outline

PARTS_AT_ONCE = 4
"""Parts of 32 MiB at most that are read and sent at a time: newcomers wait for each other, training does not."""


class Standing(Protocol):
    """Where the engine stands (`DeviceWorker`)."""

    @property
    def outer_state(self) -> OuterState | None: ...


class StateParts:
    """The state of one miner as others may read it."""

    def __init__(self, standing: Standing) -> None:
        self._standing = standing
        self._outlined: tuple[OuterState, Digest, StateOutline] | None = None
        """The state that was asked for last, with its digest and outline: made once, not for every part."""

    def answer(self, query: StateQuery) -> bytes | None:
        """The outline as JSON or a part's bytes; None when the engine stands on another state, or there is no such
        part. The first call for a state reads all of it."""
        state = self._standing.outer_state
        if state is None or state.outer_step != query.outer_step:
            return None
        digest, outline = self._outline(state)
        if digest != query.state_digest:
            return None
        if query.part_index is None:
            return outline.model_dump_json().encode()
        bounds = state_bounds(state.anchor_N.numel())
        if query.part_index >= len(bounds):
            return None
        return part_bytes(state, *bounds[query.part_index])

    def _outline(self, state: OuterState) -> tuple[Digest, StateOutline]:
        known = self._outlined
        if known is None or known[0] is not state:
            parts = state_outline(state)
            digest = outline_digest(state.outer_step, state.anchor_N.numel(), parts)
            known = self._outlined = (state, digest, StateOutline(parts=parts))
        return known[1], known[2]
