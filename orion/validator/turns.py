"""Whose turn it is to be verified, as one validator knows it. Pure.

Owns what is remembered from one draw to the next; who is drawn is decided in `sampling`. What the public ledger says of
all validators' replays is taken in before each draw, so that nobody is verified twice for want of talking. Invariant: a
check that was to verify a newcomer either did or counts as tried in vain, whoever's fault that was.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

from orion.common.ids import Hotkey


@dataclass(slots=True)
class Turns:
    """Of each miner, when it last had its turn, and what came of it."""

    last: dict[Hotkey, int] = field(default_factory=dict)
    """Newest outer step that verified it, or was to while it was there."""
    in_vain: dict[Hotkey, int] = field(default_factory=dict)
    """Of those that nobody has verified: checks here that were to. Whoever is missing had none, or was verified."""
    _verified: dict[Hotkey, int] = field(default_factory=dict)

    def verified(self, outer_steps: Mapping[Hotkey, int]) -> None:
        """Some validator has verified these miners on those outer steps; what was known before changes nothing."""
        for miner, outer_step in outer_steps.items():
            if outer_step > self._verified.get(miner, -1):
                self._verified[miner] = outer_step
                self.in_vain.pop(miner, None)
                self._had(miner, outer_step)

    def tried_in_vain(self, miner: Hotkey, outer_step: int, *, was_there: bool) -> None:
        """A check was to verify a miner and has not: it failed, nobody could make it, there was no pseudo-gradient to
        compare, or the miner went away."""
        if miner not in self._verified:
            self.in_vain[miner] = self.in_vain.get(miner, 0) + 1
        if was_there:
            self._had(miner, outer_step)

    def _had(self, miner: Hotkey, outer_step: int) -> None:
        self.last[miner] = max(outer_step, self.last.get(miner, -1))
