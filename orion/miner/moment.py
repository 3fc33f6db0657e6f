"""How things stand when an event is handled; what the parts of the core share. Frozen, no behaviour."""

from collections.abc import Callable
from dataclasses import dataclass

from orion.miner.effects import Effect
from orion.miner.view import View

Emit = Callable[[Effect], None]
"""Where a part of the core puts what it decides."""


@dataclass(frozen=True, slots=True)
class Moment:
    """Time and place of one event."""

    view: View | None
    """None while this miner is no member."""
    outer_step: int | None
    """The outer step that this miner computes for now; None while it computes for none."""
    inner_steps: int
    """Inner steps done in it."""
    now_s: float
