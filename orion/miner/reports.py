"""What a miner has to report, in numbered batches. Pure.

Owns the records between the event they come from and their acknowledgement. A batch is fixed when it gets its number
and is sent, unchanged, until it is acknowledged; only then comes the next one. So numbers have no gaps and a repeated
batch changes nothing. Nothing is dropped: while more than `BACKLOG_MAX` records wait, the miner begins nothing new.
"""

from orion.common.protocol.fields import BATCH_MAX
from orion.common.protocol.messages import (
    Commitment,
    MicrobatchEnd,
    Receipt,
    Report,
)

INTERVAL_S = 1.0
"""Between two reports while work goes on. Each costs its sender, the orchestrator and its journal some milliseconds, at
small models as much as all transfers together; who holds no microbatch any more reports at once, so the end of a train
phase doesn't wait for it."""
RETRY_S = 0.5
BACKLOG_MAX = 4 * BATCH_MAX


class Reports:
    """Records that wait, and the batch under way."""

    def __init__(self) -> None:
        self._ends: list[MicrobatchEnd] = []
        self._receipts: list[Receipt] = []
        self._commitments: list[Commitment] = []
        self._batch: Report | None = None
        self._is_sending = False
        self._next_sequence = 0
        self._due_s = 0.0
        self._committed_step = -1

    @property
    def num_waiting(self) -> int:
        """Records without acknowledgement, those of the batch under way not counted."""
        return len(self._ends) + len(self._receipts) + len(self._commitments)

    @property
    def is_empty(self) -> bool:
        """Whether everything was acknowledged."""
        return not self.num_waiting and self._batch is None

    @property
    def has_backlog(self) -> bool:
        return self.num_waiting > BACKLOG_MAX

    def add_end(self, end: MicrobatchEnd) -> None:
        self._ends.append(end)

    def add_receipt(self, receipt: Receipt) -> None:
        self._receipts.append(receipt)

    def add_commitment(self, commitment: Commitment) -> None:
        """One that waits for an earlier one of its outer step takes its place: it says all that the other did."""
        self._commitments = [item for item in self._commitments if item.outer_step != commitment.outer_step]
        self._commitments.append(commitment)

    def is_committed(self, outer_step: int) -> bool:
        """Whether the final commitment of that outer step (or a later one) was acknowledged."""
        return self._committed_step >= outer_step

    def due_s(self) -> float | None:
        """When the next report is to be sent; None when there is nothing to send or one is on its way."""
        return None if self._is_sending or self.is_empty else self._due_s

    def next_report(self, now_s: float, is_urgent: bool) -> Report | None:
        """The report to send now, None when none is due. `is_urgent`: do not wait to fill a batch."""
        if self._is_sending or self.is_empty:
            return None
        if self._due_s > now_s and not (is_urgent and self._batch is None):
            return None
        if self._batch is None:
            self._batch = self._take()
        self._is_sending = True
        return self._batch

    def ended(self, sequence: int, acknowledged: bool, now_s: float) -> None:
        """The attempt to send that report has ended."""
        if self._batch is None or self._batch.sequence != sequence:
            return
        self._is_sending = False
        self._due_s = now_s + (INTERVAL_S if acknowledged else RETRY_S)
        if not acknowledged:
            return
        if self._batch.commitment is not None and self._batch.commitment.is_final:
            self._committed_step = max(self._committed_step, self._batch.commitment.outer_step)
        self._batch = None

    def check_invariants(self) -> None:
        assert self._batch is not None or not self._is_sending, "a report is on its way that does not exist"
        assert self._batch is None or self._batch.sequence == self._next_sequence - 1, "a report's number has a gap"

    def _take(self) -> Report:
        ends, self._ends = self._ends[:BATCH_MAX], self._ends[BATCH_MAX:]
        receipts, self._receipts = self._receipts[:BATCH_MAX], self._receipts[BATCH_MAX:]
        # A commitment goes with or after the records of its outer step.
        commitment = None
        if self._commitments and not self._ends and not self._receipts:
            commitment = self._commitments.pop(0)
        report = Report(sequence=self._next_sequence, ends=tuple(ends), receipts=tuple(receipts), commitment=commitment)
        self._next_sequence += 1
        return report
