"""Whom a round should look at first: keeps the signs of the newest outer steps and turns them into suspicions. Pure.

Owns which signs are asked for and how long they are kept. A round that gets none draws as if nobody were suspicious.
"""

from collections.abc import Mapping

from orion.common.ids import Hotkey
from orion.common.protocol.records import BoundaryRecord, Pathways
from orion.validator.clasp import MemberEffect, member_effects, pathway_table
from orion.validator.events import FetchSigns, SignsArrived
from orion.validator.suspicion import suspicions

OUTER_STEPS_KEPT = 8
"""Outer steps whose pathways are looked at together: harm that began longer ago shows in them all the same."""


class Lookout:
    """The signs that one validator has seen."""

    def __init__(self) -> None:
        self._pathways: dict[int, tuple[Pathways, ...]] = {}
        self._boundaries: tuple[BoundaryRecord, ...] = ()
        self._asked: FetchSigns | None = None
        self.effects: tuple[MemberEffect, ...] = ()
        """Of the newest round with signs."""

    def ask(self, outer_step: int) -> FetchSigns:
        """What to fetch for a round: whatever of its window is not known yet. Older signs are forgotten."""
        window = range(max(0, outer_step - OUTER_STEPS_KEPT + 1), outer_step + 1)
        self._pathways = {step: pages for step, pages in self._pathways.items() if step in window}
        self._asked = FetchSigns(tuple(step for step in window if step not in self._pathways))
        return self._asked

    @property
    def is_waiting(self) -> bool:
        """Whether the round's signs have neither come nor failed to."""
        return self._asked is not None

    def on_signs(self, event: SignsArrived) -> None:
        """The signs are there; any that were not asked for now change nothing."""
        if event.asked != self._asked:
            return
        self._asked = None
        for outer_step in event.asked.outer_steps:
            self._pathways[outer_step] = tuple(page for page in event.pathways if page.outer_step == outer_step)
        self._boundaries = event.boundaries
        self.effects = member_effects(pathway_table([page for pages in self._pathways.values() for page in pages]))

    def on_failed(self, effect: FetchSigns) -> None:
        """They will not come for this round; what was known before is too old to go by."""
        if effect == self._asked:
            self._asked = None
            self._boundaries, self.effects = (), ()

    def suspicions(self, stages: Mapping[Hotkey, int]) -> dict[Hotkey, float]:
        """Who should be looked at soon, and how much (`suspicion.suspicions`)."""
        return suspicions(self.effects, self._boundaries, stages)
