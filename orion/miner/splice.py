"""What becomes of a microbatch that came from a miner which was lost: it waits for a replacement, and takes it.

Owns the rules for the stage after the lost miner; `repair` has those of the stage before it. Functions on `Held`, pure.

A microbatch is an orphan once the miner before the lost one says so, or once the feed shows the lost one gone. It goes
on meanwhile: only its gradient has nobody to go to. The replacement, which got the stage input from the same miner as
the lost one, offers its own output; nothing of that is read. It takes the lost one's place in the path, and the
gradient of what the lost one had sent goes to it. Invariant: only a path that differs in nothing but the lost miner is
taken.
"""

from orion.common.ids import Hotkey
from orion.common.protocol.messages import Transfer
from orion.miner.moment import Moment
from orion.miner.table import Held, Stand

ORPHAN_S = 10.0
"""How long an orphan waits for a replacement: it must be chosen, be sent the input, and run it forward."""


def is_held_from(item: Held, sender: Hotkey, lost: Hotkey | None) -> bool:
    """Whether an asker is told that the microbatch is here: the miner before, or the one before a lost one."""
    if item.cancelled is not None or item.stand is Stand.RECEIVING:
        return False
    if lost is None:
        return item.previous_hop == sender and item.stand is not Stand.RETURNED
    return item.path[-2:] == (sender, lost)


def orphan(item: Held, now_s: float) -> None:
    """The miner before is lost. Saying so again changes nothing."""
    if item.orphaned_s is None:
        item.orphaned_s = now_s


def can_wait(moment: Moment, item: Held) -> bool:
    """Whether there may be a replacement for the miner before: the one before that must be there to choose it. What the
    first stage has begun dies with it."""
    return len(item.path) >= 2 and moment.view is not None and moment.view.is_active(item.path[-2], len(item.path) - 2)


def is_forsaken(moment: Moment, item: Held) -> bool:
    """Whether no replacement has come in time, or none can come."""
    if item.orphaned_s is None:
        return False
    return moment.now_s >= item.orphaned_s + ORPHAN_S or not can_wait(moment, item)


def fits_orphan(item: Held, transfer: Transfer) -> bool:
    """Whether an offered activation comes from a replacement of the miner before."""
    return item.cancelled is None and item.stand is not Stand.RECEIVING and is_same_way(item, transfer)


def is_same_way(item: Held, transfer: Transfer) -> bool:
    """Whether an orphan and an offered activation differ in nothing but the miner before."""
    same_way = transfer.path[:-1] == item.path[:-1] and transfer.data_id == item.data_id
    return item.orphaned_s is not None and same_way


def adopt(item: Held, transfer: Transfer) -> None:
    """The sender of the transfer takes the place of the miner before."""
    assert fits_orphan(item, transfer), f"microbatch {item.microbatch_id} is no orphan of that path"
    item.path = transfer.path
    item.adopted_digest = transfer.digest
    item.orphaned_s = None
    if item.full_path:
        item.full_path = (*item.path, *item.full_path[len(item.path) :])
    if item.stand in (Stand.RETURNING, Stand.RETURNED):
        item.stand = Stand.RETURN_DUE
    item.num_returns, item.retry_s = 0, 0.0
