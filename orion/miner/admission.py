"""Whether an offered tensor is taken, decided before its body is read. Pure: looks, and changes nothing.

Owns the rules of who may send what to whom and when. Answers are a `Refusal`, a `Duplicate`, an `Adoption`, or None:
it may come in.
Invariant: an offer that is repeated, late or made up changes nothing and holds nothing.

Credits cannot make stages wait for each other in a circle, however few there are. A microbatch that holds a credit
waits for its device, or for a credit of the *next* stage, or for its gradient, which comes from the next stage and
needs no credit (nor does handing it back). On the last stage it waits for the device alone, so it ends there and its
credit is free again; and so, from the last stage to the first, is every other one. The device never waits for a credit:
it does backward before forward, and an output that nobody takes yet lies in the cache. Which sender gets a freed
credit is left to chance; one that never does is ended by its deadline.
"""

from dataclasses import dataclass

from orion.common.config import RunSpec
from orion.common.ids import Direction, Hotkey, Outcome
from orion.common.protocol.messages import (
    Refusal,
    RefusalCode,
    Transfer,
)
from orion.miner import splice
from orion.miner.moment import Moment
from orion.miner.table import GRADIENT_HELD, Held, MicrobatchTable, Stand

LAG_RETRY_S = 0.1
"""Hint to a sender whose feed is ahead of ours: feeds arrive within tens of milliseconds of each other."""
DUPLICATE_RETRY_S = 0.1
"""Hint to a sender whose first attempt is still being read."""


@dataclass(frozen=True, slots=True)
class Duplicate:
    """The tensor was accepted before; it is accepted again without effect."""


@dataclass(frozen=True, slots=True)
class Adoption:
    """The microbatch is held from a miner that was lost, and the sender takes its place; the body is not needed."""


@dataclass(frozen=True, slots=True)
class Situation:
    """What admission looks at."""

    spec: RunSpec
    hotkey: Hotkey
    moment: Moment
    busy_hint_s: float
    has_backlog: bool
    """Too many records wait to be reported: nothing new is begun before they are."""
    num_queued: int
    """Passes that the device has before it."""


def admit_forward(
    situation: Situation, table: MicrobatchTable, sender: Hotkey, transfer: Transfer
) -> Refusal | Duplicate | Adoption | None:
    """Answers the offer of an activation."""
    refusal = _out_of_place(situation, sender, transfer, Direction.ACTIVATION)
    if refusal is not None:
        return refusal
    held, ended = table.get(transfer.microbatch_id), table.ended(transfer.microbatch_id)
    if held is not None:
        return _held_already(held, sender, transfer)
    if ended is not None:
        is_same = ended.sender == sender and ended.input_digest == transfer.digest
        if is_same and ended.outcome is Outcome.APPLIED:
            return Duplicate()
        return _refusal(RefusalCode.CONFLICT, "the microbatch has ended here")
    if table.is_taken_over(transfer.microbatch_id, transfer.path):
        return _refusal(RefusalCode.CONFLICT, "the microbatch was taken from its sender")
    if table.room < 1 or situation.has_backlog:
        refusal = _busy("no credits", situation.busy_hint_s)
        return refusal.model_copy(update={"queued": situation.num_queued})
    return None


def _held_already(held: Held, sender: Hotkey, transfer: Transfer) -> Refusal | Duplicate | Adoption:
    """Answers the offer of an activation whose microbatch is here."""
    is_repeated = held.previous_hop == sender and held.adopted_digest == transfer.digest
    if is_repeated or splice.fits_orphan(held, transfer):
        return Adoption()
    if held.stand is Stand.RECEIVING and splice.is_same_way(held, transfer):
        return _busy("the lost one's body is being read", DUPLICATE_RETRY_S)
    if held.previous_hop != sender or held.input_digest != transfer.digest:
        return _refusal(RefusalCode.CONFLICT, "the microbatch is held as another sender or body")
    return _busy("its body is being read", DUPLICATE_RETRY_S) if held.stand is Stand.RECEIVING else Duplicate()


def admit_backward(
    situation: Situation, table: MicrobatchTable, sender: Hotkey, transfer: Transfer
) -> Refusal | Duplicate | None:
    """Answers the offer of a gradient. It needs no credit: its microbatch has one."""
    refusal = _out_of_place(situation, sender, transfer, Direction.GRADIENT)
    if refusal is not None:
        return refusal
    held = table.get(transfer.microbatch_id)
    if held is None:
        ended = table.ended(transfer.microbatch_id)
        if ended is not None and ended.outcome is Outcome.APPLIED and ended.gradient_digest == transfer.digest:
            return Duplicate()
        return _refusal(RefusalCode.NOT_FOUND, "the microbatch is not held here")
    # What it says of the hops before us may be older than what we know: one of them may have been replaced.
    if held.next_hop != sender or held.data_id != transfer.data_id:
        return _refusal(RefusalCode.CONFLICT, "the microbatch was not sent that way")
    if held.stand in GRADIENT_HELD:
        is_same = held.gradient is not None and held.gradient.digest == transfer.digest
        return Duplicate() if is_same else _refusal(RefusalCode.CONFLICT, "another gradient was accepted")
    if held.stand is Stand.GRADIENT_RECEIVING:
        return _busy("its body is being read", DUPLICATE_RETRY_S)
    # A gradient may overtake the answer to our own forward: being sent to its sender is as good as accepted by it.
    if held.stand not in (Stand.SENDING, Stand.AWAITING_GRADIENT):
        return _refusal(RefusalCode.CONFLICT, "no gradient is awaited")
    return None


def _out_of_place(situation: Situation, sender: Hotkey, transfer: Transfer, direction: Direction) -> Refusal | None:
    """What is wrong with the offer before it is asked which microbatch it is about."""
    moment = situation.moment
    view = moment.view
    if view is None:
        return _refusal(RefusalCode.NOT_MEMBER, "this miner is no member now", LAG_RETRY_S)
    if transfer.direction is not direction:
        return _refusal(RefusalCode.MALFORMED, f"the transfer is no {direction}")
    if transfer.to_stage != view.stage_index:
        return _refusal(RefusalCode.WRONG_STAGE, f"this miner runs stage {view.stage_index}")
    forward = direction is Direction.ACTIVATION
    if not view.is_active(sender, view.stage_index - 1 if forward else view.stage_index + 1):
        return _refusal(RefusalCode.FORBIDDEN, "the sender is no active member of the neighbouring stage", LAG_RETRY_S)
    if not _fits(situation, view.stage_index, sender, transfer):
        return _refusal(RefusalCode.MALFORMED, "the path does not fit its sender and receiver")
    return _out_of_time(moment, transfer)


def _out_of_time(moment: Moment, transfer: Transfer) -> Refusal | None:
    if moment.outer_step != transfer.outer_step:
        if moment.outer_step is None or transfer.outer_step > moment.outer_step:
            return _busy("not yet in that outer step", LAG_RETRY_S)
        return _refusal(RefusalCode.WRONG_PHASE, f"this miner is in outer step {moment.outer_step}")
    if transfer.deadline_s <= moment.now_s:
        return _refusal(RefusalCode.CONFLICT, "the microbatch's deadline has passed")
    return None


def _fits(situation: Situation, stage_index: int, sender: Hotkey, transfer: Transfer) -> bool:
    path = transfer.path
    if len(set(path)) != len(path):
        return False
    if transfer.direction is Direction.ACTIVATION:
        return len(path) == stage_index and path[-1] == sender
    return (
        len(path) == situation.spec.num_stages
        and path[stage_index] == situation.hotkey
        and path[stage_index + 1] == sender
    )


def _refusal(code: RefusalCode, message: str, retry_after_s: float | None = None) -> Refusal:
    return Refusal(code=code, message=message, retry_after_s=retry_after_s)


def _busy(message: str, retry_after_s: float) -> Refusal:
    return _refusal(RefusalCode.BUSY, message, retry_after_s)
