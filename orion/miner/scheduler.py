"""What the device does next. Pure.

Owns the order of work: an inner step as soon as a batch is full, so that every step has the same number of
microbatches; then backward, because it frees what is held here and lets the stages before go on; then forward. The
oldest first in both. While gradients on their way would fill the batch, nothing is decided: they may still be refused.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from orion.common.ids import MicrobatchId


@dataclass(frozen=True, slots=True)
class Readiness:
    """What could be done now; both queues oldest first."""

    backward: Sequence[MicrobatchId]
    forward: Sequence[MicrobatchId]
    num_accumulated: int
    """Gradients that wait for the next inner step."""
    num_accumulating: int
    """Those that will be among them soon, unless they are refused."""
    microbatches_per_step: int


@dataclass(frozen=True, slots=True)
class DoInnerStep:
    pass


@dataclass(frozen=True, slots=True)
class DoBackward:
    microbatch_id: MicrobatchId


@dataclass(frozen=True, slots=True)
class DoForward:
    microbatch_id: MicrobatchId


Choice = DoInnerStep | DoBackward | DoForward


def next_work(ready: Readiness) -> Choice | None:
    """The next thing to compute while training; None when there is nothing."""
    if ready.num_accumulated + ready.num_accumulating >= ready.microbatches_per_step:
        return None if ready.num_accumulating else DoInnerStep()
    if ready.backward:
        return DoBackward(ready.backward[0])
    if ready.forward:
        return DoForward(ready.forward[0])
    return None
