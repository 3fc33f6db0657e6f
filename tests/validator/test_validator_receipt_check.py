"""A log is held against the transfers that both ends reported."""

import pytest

from orion.common.ids import DataId, Digest, Direction, Hotkey, MicrobatchId, Operation
from orion.common.protocol.messages import Receipt
from orion.common.protocol.records import LogEntry
from orion.validator.log_check import Position
from orion.validator.receipt_check import receipt_fault

BEFORE, MINER, AFTER, OTHER = (Hotkey(f"5{letter * 47}") for letter in "ABCD")
MIDDLE, LAST = Position(1, 3), Position(2, 3)


def digest(letter: str) -> Digest:
    return Digest(letter * 64)


def entry(operation: Operation, came: str | None, went: str | None, microbatch_id: int = 7) -> LogEntry:
    return LogEntry(
        operation=operation,
        microbatch_id=MicrobatchId(microbatch_id),
        data_id=DataId(3),
        inner_step=0,
        input_digest=None if came is None else digest(came),
        output_digest=None if went is None else digest(went),
    )


def receipt(direction: Direction, sender: Hotkey, receiver: Hotkey, to_stage: int, letter: str) -> Receipt:
    return Receipt(
        direction=direction,
        microbatch_id=MicrobatchId(7),
        outer_step=2,
        sender=sender,
        receiver=receiver,
        to_stage=to_stage,
        digest=digest(letter),
        size_bytes=100,
    )


FORWARD, BACKWARD = entry(Operation.FORWARD, "1", "2"), entry(Operation.BACKWARD, "3", "4")
INNER_STEP = LogEntry(
    operation=Operation.INNER_STEP,
    microbatch_id=None,
    data_id=None,
    inner_step=0,
    input_digest=None,
    output_digest=None,
)
TRANSFERS = (
    receipt(Direction.ACTIVATION, BEFORE, MINER, 1, "1"),
    receipt(Direction.ACTIVATION, MINER, AFTER, 2, "2"),
    receipt(Direction.GRADIENT, AFTER, MINER, 1, "3"),
    receipt(Direction.GRADIENT, MINER, BEFORE, 0, "4"),
)


def test_a_log_that_tells_what_was_transferred_is_without_fault() -> None:
    assert receipt_fault((FORWARD, BACKWARD, INNER_STEP), TRANSFERS, MINER, MIDDLE) is None


@pytest.mark.parametrize(
    ("place", "what"),
    [(0, "input of forward 7"), (1, "output of forward 7"), (2, "input of backward 7"), (3, "output of backward 7")],
)
def test_every_transfer_is_held_against_its_own_entry(place: int, what: str) -> None:
    changed = list(TRANSFERS)
    changed[place] = changed[place].model_copy(update={"digest": digest("f")})
    fault = receipt_fault((FORWARD, BACKWARD), changed, MINER, MIDDLE)
    assert fault is not None
    assert fault.startswith(what)


def test_the_last_stage_sends_its_gradient_with_its_forward() -> None:
    forward = entry(Operation.FORWARD, "1", "4")
    sent = receipt(Direction.GRADIENT, MINER, BEFORE, 1, "4")
    assert receipt_fault((forward,), (sent,), MINER, LAST) is None
    other = sent.model_copy(update={"digest": digest("f")})
    assert receipt_fault((forward,), (other,), MINER, LAST) is not None


def test_what_was_transferred_and_not_computed_is_no_fault() -> None:
    # A microbatch may be cancelled between its arrival and its forward, or between its two passes.
    assert receipt_fault((), TRANSFERS, MINER, MIDDLE) is None
    assert receipt_fault((FORWARD,), TRANSFERS, MINER, MIDDLE) is None


def test_transfers_of_others_and_of_another_stage_say_nothing() -> None:
    others = (
        receipt(Direction.ACTIVATION, BEFORE, OTHER, 1, "f"),
        receipt(Direction.ACTIVATION, OTHER, MINER, 2, "f"),
        receipt(Direction.GRADIENT, OTHER, BEFORE, 0, "f"),
        receipt(Direction.GRADIENT, MINER, OTHER, 1, "f"),
    )
    assert receipt_fault((FORWARD, BACKWARD), others, MINER, MIDDLE) is None
