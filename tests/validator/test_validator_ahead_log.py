"""What a log may say of an outer step that was begun ahead of its anchor."""

import pytest
from working_miner import WorkingMiner, answer_to, make_spec, trained

from orion.common.config import RunSpec
from orion.common.ids import Operation
from orion.common.protocol.log import log_root
from orion.common.protocol.messages import Commitment
from orion.common.protocol.records import LogEntry
from orion.validator.log_check import Position, log_fault, request_of

SPEC = make_spec(sync="overlapped")
NUM_APPLIED = 7


@pytest.fixture(scope="module")
def honest() -> list[LogEntry]:
    miners: list[WorkingMiner] = trained(SPEC)
    return miners[1].entries


def beginning(operation: Operation, inner_step: int = 0) -> LogEntry:
    return LogEntry(
        operation=operation,
        microbatch_id=None,
        data_id=None,
        inner_step=inner_step,
        input_digest=None,
        output_digest=None,
    )


AHEAD = beginning(Operation.BEGIN_AHEAD)


def fault_of(entries: list[LogEntry], spec: RunSpec = SPEC, num_applied: int = NUM_APPLIED) -> str | None:
    commitment = Commitment(
        outer_step=1,
        num_entries=len(entries),
        num_applied=num_applied,
        num_contributed=0,
        num_kept=len(entries),
        root=log_root(entries),
        is_final=True,
    )
    request = request_of([commitment], len(entries))
    return log_fault([commitment], request, answer_to(request, entries), Position(1, 3), spec)


def test_a_merge_may_come_anywhere_once(honest: list[LogEntry]) -> None:
    assert fault_of([AHEAD, *honest]) is None, "it may not have come yet"
    for place in range(len(honest) + 1):
        inner_step = sum(entry.operation is Operation.INNER_STEP for entry in honest[:place])
        taken = beginning(Operation.TAKE_MERGED, inner_step)
        rest = [taken, *honest[place:]]
        if place == len(honest):
            # Only the last entry may average less than a full batch.
            assert "is not the last" in str(fault_of([AHEAD, *honest, taken]))
            continue
        assert fault_of([AHEAD, *honest[:place], *rest]) is None
        again = fault_of([AHEAD, *honest[:place], taken, *rest])
        assert "not ahead of" in str(again)


def test_nobody_is_ahead_without_having_begun_so(honest: list[LogEntry]) -> None:
    assert "not ahead of" in str(fault_of([beginning(Operation.TAKE_MERGED), *honest]))
    assert "where it cannot" in str(fault_of([AHEAD, AHEAD, *honest]))
    assert "where it cannot" in str(fault_of([AHEAD, *honest], make_spec()))
    anew = beginning(Operation.BEGIN_ANEW)
    assert fault_of([AHEAD, anew, *honest]) is None
    assert "not ahead of" in str(fault_of([AHEAD, anew, beginning(Operation.TAKE_MERGED), *honest]))
    named = AHEAD.model_copy(update={"data_id": 3})
    assert "where it cannot" in str(fault_of([named, *honest]))
