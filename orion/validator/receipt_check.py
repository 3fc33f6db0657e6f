"""Whether a miner's log tells of the same tensors as the transfers that it, and its neighbours, have reported. Pure.

A replay starts from the inputs that a miner hands over. A log in which one input stands for all is without fault and
replays to the last bit, and yet most of its microbatches were never computed. What gives it away is that both ends of
each transfer have signed which tensor was sent: what came in must be what was used, and what was computed must be what
went out. Only transfers on which both ends agree are held against a miner, so no neighbour can make its log look false.
"""

from collections.abc import Iterable, Sequence

from orion.common.ids import Digest, Direction, Hotkey, MicrobatchId, Operation
from orion.common.protocol.messages import Receipt
from orion.common.protocol.records import LogEntry
from orion.validator.log_check import Position, Side

_Place = tuple[MicrobatchId, Operation, Side]


def receipt_fault(
    entries: Sequence[LogEntry], agreed: Iterable[Receipt], miner: Hotkey, position: Position
) -> str | None:
    """The first entry that names another tensor than a transfer of its microbatch did; None when none does.

    `agreed` are transfers of the log's outer step on which both ends agree; those of others are passed over. Entries
    may be any part of the log.
    """
    transferred: dict[_Place, Digest] = {}
    for receipt in agreed:
        place = _place(receipt, miner, position)
        if place is not None:
            transferred[place] = receipt.digest
    for entry in entries:
        if entry.microbatch_id is None:
            continue
        sides: tuple[tuple[Side, Digest | None], ...] = (("input", entry.input_digest), ("output", entry.output_digest))
        for side, digest in sides:
            known = transferred.get((entry.microbatch_id, entry.operation, side))
            if known is not None and digest != known:
                return f"{side} of {entry.operation} {entry.microbatch_id} is not what its transfer carried"
    return None


def _place(receipt: Receipt, miner: Hotkey, position: Position) -> _Place | None:
    """Where in the miner's log a transferred tensor must show; None for a transfer of others or of another stage."""
    is_activation = receipt.direction is Direction.ACTIVATION
    if receipt.receiver == miner and receipt.to_stage == position.stage_index:
        return receipt.microbatch_id, Operation.FORWARD if is_activation else Operation.BACKWARD, "input"
    from_stage = receipt.to_stage + (-1 if is_activation else 1)
    if receipt.sender == miner and from_stage == position.stage_index:
        is_forward = is_activation or position.is_last  # the last stage's forward sends its gradient back at once
        return receipt.microbatch_id, Operation.FORWARD if is_forward else Operation.BACKWARD, "output"
    return None
