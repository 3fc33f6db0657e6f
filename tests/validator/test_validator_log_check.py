"""What is wrong with a log by itself."""

from collections.abc import Sequence

import pytest
from working_miner import WorkingMiner, answer_to, make_spec, trained

from orion.common.ids import Direction, Operation
from orion.common.protocol.log import BEGINNINGS_MAX, log_root
from orion.common.protocol.messages import Commitment
from orion.common.protocol.records import (
    LogEntry,
)
from orion.validator.log_check import Position, evidence_needs, log_fault, request_of

SPEC = make_spec(flow={"staleness_max": 1})


@pytest.fixture(scope="module")
def honest() -> list[WorkingMiner]:
    return trained(SPEC)


def commitment_to(entries: Sequence[LogEntry], num_applied: int, num_contributed: int = 0) -> Commitment:
    return Commitment(
        outer_step=0,
        num_entries=len(entries),
        num_applied=num_applied,
        num_contributed=num_contributed,
        num_kept=len(entries),
        root=log_root(entries),
        is_final=True,
    )


def fault_of(entries: list[LogEntry], stage_index: int, num_applied: int, num_contributed: int = 0) -> str | None:
    commitment = commitment_to(entries, num_applied, num_contributed)
    request = request_of([commitment], len(entries))
    return log_fault([commitment], request, answer_to(request, entries), Position(stage_index, 3), SPEC)


def test_honest_logs_have_no_fault(honest: list[WorkingMiner]) -> None:
    for miner in honest:
        assert fault_of(miner.entries, miner.stage_index, 7) is None


def test_claims_must_be_in_the_log(honest: list[WorkingMiner]) -> None:
    assert "claims 8" in str(fault_of(honest[1].entries, 1, 8))


def test_what_is_claimed_to_be_in_the_pseudo_gradient_was_averaged_since_the_last_beginning(
    honest: list[WorkingMiner],
) -> None:
    full = honest[1].entries
    assert fault_of(full, 1, 7, 7) is None
    place = next(index for index, entry in enumerate(full) if entry.operation is Operation.INNER_STEP)
    some = full[:place]
    num_waiting = sum(entry.operation is Operation.BACKWARD for entry in some)
    assert num_waiting > 0
    assert fault_of(some, 1, num_waiting, 0) is None
    assert "in inner steps, the log has 0" in str(fault_of(some, 1, num_waiting, num_waiting))
    anew = [*full[: place + 1], BEGIN_ANEW]
    assert fault_of(full[: place + 1], 1, num_waiting, num_waiting) is None
    assert "claims 1 in inner steps, the log has 0" in str(fault_of(anew, 1, num_waiting, 1))


def test_the_log_must_be_the_committed_one(honest: list[WorkingMiner]) -> None:
    entries = tuple(honest[1].entries)
    commitment = commitment_to(entries, 7)
    request = request_of([commitment], len(entries))
    log = answer_to(request, entries)
    shorter = commitment.model_copy(update={"root": log_root(entries[:-1])})
    assert "another root" in str(log_fault([shorter], request, log, Position(1, 3), SPEC))
    for change, fault in (
        ({"outer_step": 1}, "outer step 1"),
        ({"start": 1}, "another part"),
        ({"entries": entries[:-1]}, "another part"),
        ({"proof": (shorter.root,)}, "too long"),
    ):
        other = log.model_copy(update=change)
        assert fault in str(log_fault([commitment], request, other, Position(1, 3), SPEC))


BEGIN_ANEW = LogEntry(
    operation=Operation.BEGIN_ANEW,
    microbatch_id=None,
    data_id=None,
    inner_step=0,
    input_digest=None,
    output_digest=None,
)


def test_an_outer_step_may_be_begun_anew_with_nothing_in_hand(honest: list[WorkingMiner]) -> None:
    entries = honest[1].entries
    place = first(entries, Operation.BACKWARD)
    others = [
        entry if entry.microbatch_id is None else entry.model_copy(update={"microbatch_id": entry.microbatch_id + 100})
        for entry in entries
    ]
    assert fault_of([*entries[:place], BEGIN_ANEW, *others], 1, 7) is None
    full = entries[:-1]  # without the last, short inner step
    assert fault_of([*full, BEGIN_ANEW], 1, 7) is None
    assert "without being held" in str(fault_of([*entries[:place], BEGIN_ANEW, *entries[place:]], 1, 7))
    assert "forward twice" in str(fault_of([*full, BEGIN_ANEW, *entries], 1, 14))
    late = [entry.model_copy(update={"inner_step": 1}) for entry in others[:1]]
    assert "inner steps were done" in str(fault_of([*full, BEGIN_ANEW, *late], 1, 7))
    loaded = BEGIN_ANEW.model_copy(update={"num_microbatches": 1})
    assert "in hand" in str(fault_of([*full, loaded], 1, 7))
    assert "more than" in str(fault_of([*full, *[BEGIN_ANEW] * BEGINNINGS_MAX], 1, 7))


def first(entries: list[LogEntry], operation: Operation) -> int:
    return next(index for index, entry in enumerate(entries) if entry.operation is operation)


@pytest.mark.parametrize(
    ("operation", "change", "fault"),
    [
        (Operation.FORWARD, {"input_digest": None}, "digests"),
        (Operation.FORWARD, {"output_digest": None}, "digests"),
        (Operation.FORWARD, {"data_id": None}, "names no microbatch"),
        (Operation.FORWARD, {"microbatch_id": None}, "names no microbatch"),
        (Operation.FORWARD, {"inner_step": 1}, "inner steps were done"),
        (Operation.FORWARD, {"microbatch_id": 1}, "went forward twice"),
        (Operation.BACKWARD, {"microbatch_id": 99}, "without being held"),
        (Operation.BACKWARD, {"data_id": 99}, "changed its data"),
        (Operation.INNER_STEP, {"num_microbatches": 1}, "averages 1"),
        (Operation.INNER_STEP, {"num_microbatches": 3}, "averages 3"),
        (Operation.INNER_STEP, {"num_microbatches": 0}, "averages 0"),
    ],
)
def test_impossible_entries(
    honest: list[WorkingMiner], operation: Operation, change: dict[str, object], fault: str
) -> None:
    entries = list(honest[1].entries)
    index = first(entries, operation)
    entries[index] = entries[index].model_copy(update=change)
    assert fault in str(fault_of(entries, 1, 7))


def test_impossible_orders(honest: list[WorkingMiner]) -> None:
    entries = list(honest[1].entries)
    backward = entries[first(entries, Operation.BACKWARD)]
    assert "without being held" in str(fault_of([backward, *entries], 1, 8))
    step = first(entries, Operation.INNER_STEP)
    again = entries[step].model_copy(update={"inner_step": 1})
    assert "averages" in str(fault_of([*entries[: step + 1], again], 1, 2))
    assert "inner steps were done" in str(fault_of([*entries[:step], *entries[step + 1 :]], 1, 7))
    last = honest[2].entries
    assert "digests" in str(fault_of([last[0].model_copy(update={"output_digest": None})], 2, 1))
    assert "without being held" in str(
        fault_of([last[0], last[0].model_copy(update={"operation": Operation.BACKWARD})], 2, 1)
    )


def test_only_the_last_inner_step_may_be_short(honest: list[WorkingMiner]) -> None:
    entries = list(honest[2].entries)  # forward, forward, step, …
    short = entries[2].model_copy(update={"num_microbatches": 1})
    one_step_on = entries[1].model_copy(update={"inner_step": 1})
    assert fault_of([entries[0], short], 2, 1) is None
    assert "not the last" in str(fault_of([entries[0], short, one_step_on], 2, 2))


def test_stale_gradients_are_a_fault(honest: list[WorkingMiner]) -> None:
    forward = honest[1].entries[0]
    others = list(honest[1].entries[1:])
    backward = others.pop(first(others, Operation.BACKWARD))
    log: list[LogEntry] = [forward]
    for step in range(2):
        for number in (1, 2):
            fresh = {"microbatch_id": 10 * step + 10 + number, "inner_step": step}
            log += [forward.model_copy(update=fresh), backward.model_copy(update=fresh)]
        done = {"inner_step": step, "num_microbatches": 2}
        log.append(honest[1].entries[first(honest[1].entries, Operation.INNER_STEP)].model_copy(update=done))
    assert fault_of(log, 1, 4) is None
    log.append(backward.model_copy(update={"inner_step": 2}))
    assert "stale by 2" in str(fault_of(log, 1, 5))


def test_evidence_needs_name_every_body_and_its_layout(honest: list[WorkingMiner]) -> None:
    for miner in honest:
        needs = evidence_needs(miner.entries, 0, Position(miner.stage_index, 3))
        assert {(need.request.microbatch_id, need.request.operation, need.request.side) for need in needs} == set(
            miner.bodies
        )
        for need in needs:
            request = need.request
            body = miner.bodies[request.microbatch_id, request.operation, request.side]
            assert need.direction is (Direction.ACTIVATION if "z" in body else Direction.GRADIENT)
