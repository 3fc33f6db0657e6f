"""What is said about a tensor that goes to a neighbour, and the record that it got there. Pure functions."""

from orion.common.ids import Direction, Hotkey
from orion.common.protocol.messages import (
    Receipt,
    Transfer,
)
from orion.miner.table import Held


def activation_transfer(item: Held, hotkey: Hotkey) -> Transfer:
    """Describes the activation that `hotkey` sends to the next stage."""
    transfer = _transfer(item, Direction.ACTIVATION, len(item.path) + 1, (*item.path, hotkey), None)
    return transfer.model_copy(update={"continues_at": item.continues_at}) if item.continues_at else transfer


def gradient_transfer(item: Held) -> Transfer:
    """Describes the input gradient that goes back to the stage before."""
    transfer = _transfer(item, Direction.GRADIENT, len(item.path) - 1, item.full_path, item.loss)
    return transfer.model_copy(update={"waited_s": item.waited_s})


def receipt_of(transfer: Transfer, sender: Hotkey, receiver: Hotkey) -> Receipt:
    """The record of an accepted transfer; both ends make the same one."""
    return Receipt(
        direction=transfer.direction,
        microbatch_id=transfer.microbatch_id,
        outer_step=transfer.outer_step,
        sender=sender,
        receiver=receiver,
        to_stage=transfer.to_stage,
        digest=transfer.digest,
        size_bytes=transfer.size_bytes,
    )


def _transfer(
    item: Held, direction: Direction, to_stage: int, path: tuple[Hotkey, ...], loss: float | None
) -> Transfer:
    assert item.output is not None, f"microbatch {item.microbatch_id} has nothing to send"
    return Transfer(
        direction=direction,
        microbatch_id=item.microbatch_id,
        data_id=item.data_id,
        outer_step=item.outer_step,
        to_stage=to_stage,
        path=path,
        deadline_s=item.deadline_s,
        digest=item.output.digest,
        size_bytes=item.output.size_bytes,
        loss=loss,
    )
