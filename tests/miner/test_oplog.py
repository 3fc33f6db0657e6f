"""The log and its commitments: what grows, what is shown, and what goes on in another process."""

from typing import Any

import pytest
from miner_kit import digest_of

from orion.common.ids import DataId, MicrobatchId, Operation
from orion.common.protocol.log import BEGINNINGS_MAX, entry_bytes, log_root
from orion.common.protocol.merkle import Mark, proof_fault
from orion.common.protocol.messages import Commitment, Report
from orion.common.protocol.records import EvidenceRequest, LogRequest
from orion.miner.archive import OUTER_STEPS_KEPT, KeptLog
from orion.miner.commits import Commits
from orion.miner.effects import Effect, PersistLog
from orion.miner.oplog import OpLog
from orion.miner.reports import Reports


def work(log: OpLog, *numbers: int) -> None:
    for number in numbers:
        log.append(
            Operation.FORWARD,
            inner_step=0,
            microbatch_id=MicrobatchId(number),
            data_id=DataId(number),
            output_digest=digest_of(number),
            applied=True,
        )


def make_durable(log: OpLog, **fields: Any) -> tuple[Commitment, KeptLog]:
    """Commits to all there is; what a disk then holds."""
    commitment = log.commitment(num_contributed=0, is_final=False, **fields)
    stage_index, _ = log.hand_over(commitment)
    log.made_durable(commitment)
    return commitment, KeptLog(stage_index, log.committed(commitment.outer_step) or (), commitment)


def request(*sizes: int, start: int = 0, stop: int | None = None, outer_step: int = 0) -> LogRequest:
    return LogRequest(outer_step=outer_step, sizes=sizes, start=start, stop=sizes[-1] if stop is None else stop)


def test_only_what_is_durable_is_shown_and_with_proof() -> None:
    log = OpLog()
    log.begin(0, 1)
    work(log, 1, 2, 3)
    first = log.commitment(num_contributed=0, is_final=False)
    assert log.answer(request(3)) is None
    assert log.committed(0) is None
    wanted = EvidenceRequest(outer_step=0, microbatch_id=MicrobatchId(3), operation=Operation.FORWARD, side="output")
    assert not log.may_show(wanted)
    assert [entry.microbatch_id for entry in log.hand_over(first)[1]] == [1, 2, 3]
    log.made_durable(first)
    work(log, 4, 5)
    second = log.commitment(num_contributed=0, is_final=True)
    assert [entry.microbatch_id for entry in log.hand_over(second)[1]] == [4, 5]
    assert log.may_show(wanted)
    assert not log.may_show(wanted.model_copy(update={"microbatch_id": 4}))
    assert log.answer(request(3, 5)) is None, "only the first three are durable"
    log.made_durable(second)
    answer = log.answer(request(3, 5, start=1, stop=4))
    assert answer is not None
    marks = [Mark(3, first.root), Mark(5, second.root)]
    assert proof_fault(marks, 1, [entry_bytes(entry) for entry in answer.entries], answer.proof) is None
    for nonsense in (request(6), request(5, start=4, stop=2), request(5, 5), request(5, outer_step=1)):
        assert log.answer(nonsense) is None


def test_a_log_that_is_begun_anew_goes_on_and_says_so() -> None:
    log = OpLog()
    log.begin(0, 1)
    work(log, 1)
    log.close()
    log.begin(0, 1)
    assert log.num_open == 1, "it says so with the first operation"
    work(log, 2)
    assert [entry.operation for entry in log.open_entries] == [
        Operation.FORWARD,
        Operation.BEGIN_ANEW,
        Operation.FORWARD,
    ]
    commitment, kept = make_durable(log)
    assert (commitment.num_applied, commitment.num_entries) == (2, 3)

    another = OpLog([kept])
    assert another.committed(0) == kept.entries
    assert set(another.microbatches(0)) == {1, 2}
    assert another.answer(request(3)) is not None
    another.begin(0, 1)
    work(another, 3)
    later, _ = make_durable(another)
    assert (later.num_applied, later.num_entries) == (3, 5)
    entries = another.committed(0) or ()
    assert entries[:3] == kept.entries
    assert later.root == log_root(entries)


def test_what_cannot_be_logged_is_not_begun() -> None:
    log = OpLog()
    log.begin(0, 1)
    work(log, 0)
    assert not log.can_begin(0, 2), "a log is of one stage"
    assert log.can_begin(1, 2)
    for number in range(1, BEGINNINGS_MAX):
        assert log.can_begin(0, 1)
        log.begin(0, 1)
        work(log, number)
    assert not log.can_begin(0, 1)


def test_old_logs_are_forgotten() -> None:
    log = OpLog()
    for outer_step in range(OUTER_STEPS_KEPT + 1):
        log.begin(outer_step, 0)
        work(log, 1)
        make_durable(log)
    assert [log.committed(outer_step) is None for outer_step in range(3)] == [True, False, False]


# --- when it is committed to ------------------------------------------------------------------------------------------


class Committing:
    """Commitments every 3 s, and a disk that ends its writes when it is told."""

    def __init__(self) -> None:
        self.log, self.reports = OpLog(), Reports()
        self.effects: list[Effect] = []
        self.commits = Commits(3.0, self.log, self.reports, self.effects.append)
        self.log.begin(0, 0)
        self.commits.begin(100.0)

    def written(self) -> PersistLog:
        (effect,) = self.effects
        assert isinstance(effect, PersistLog)
        self.effects.clear()
        self.commits.persisted(effect.commitment)
        return effect

    def reported(self) -> Report | None:
        report = self.reports.next_report(1e9, True)
        if report is not None:
            self.reports.ended(report.sequence, True, 0.0)
        return report


def test_commitments_come_at_intervals_and_only_when_there_is_news() -> None:
    it = Committing()
    work(it.log, 1)
    it.commits.advance(0, 102.9)
    assert it.effects == []
    it.commits.advance(0, 103.0)
    assert it.reported() is None, "first it must be durable"
    assert len(it.written().entries) == 1
    report = it.reported()
    assert report is not None and report.commitment is not None
    assert not it.reports.is_committed(0), "only the final one counts as that"
    it.commits.advance(0, 106.0)
    assert it.effects == [], "nothing was done since"
    work(it.log, 2)
    it.commits.advance(0, 107.0)
    assert it.effects == [], "three seconds after the last look"
    it.commits.advance(0, 109.0)
    assert [entry.microbatch_id for entry in it.written().entries] == [2]


def test_the_final_one_waits_for_the_one_under_way_and_is_the_last() -> None:
    it = Committing()
    work(it.log, 1)
    it.commits.advance(0, 103.0)
    work(it.log, 2)
    it.commits.advance(0, 110.0)
    it.commits.seal(2)
    it.log.close()
    assert len(it.effects) == 1, "one at a time"
    it.written()
    final = it.written()
    assert final.commitment.is_final and final.commitment.num_contributed == 2
    assert [entry.microbatch_id for entry in final.entries] == [2]
    report = it.reported()
    assert report is not None and report.commitment == final.commitment, "it says all that the other did"
    assert it.reported() is None
    assert it.reports.is_committed(0)
    assert it.commits.is_idle


@pytest.mark.parametrize("num_entries", [0, 2])
def test_an_outer_step_ends_with_a_final_commitment_whatever_was_done(num_entries: int) -> None:
    it = Committing()
    work(it.log, *range(num_entries))
    it.commits.seal(0)
    assert it.written().commitment.num_entries == num_entries
