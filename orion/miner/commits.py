"""When a miner commits to its log, and in which order. Pure.

Owns the way of a commitment: made over the log as it is, made durable (`PersistLog`), then reported. One is on that way
at a time, so that each continues the one before. Invariants: nothing is reported that is not durable; the final one of
an outer step is the last; while one is on its way no other is made but the final one.
"""

from collections import deque

from orion.common.protocol.messages import Commitment
from orion.miner.effects import PersistLog
from orion.miner.moment import Emit
from orion.miner.oplog import OpLog
from orion.miner.reports import Reports


class Commits:
    """Commitments on their way from the log to the orchestrator."""

    def __init__(self, interval_s: float, oplog: OpLog, reports: Reports, emit: Emit) -> None:
        self._interval_s = interval_s
        self._oplog = oplog
        self._reports = reports
        self._emit = emit
        self._waiting: deque[Commitment] = deque()
        """Made, and not yet on their way."""
        self._under_way: Commitment | None = None
        self._next_s = 0.0
        self._num_entries = 0
        """Of the open log when it was committed to last."""

    @property
    def is_idle(self) -> bool:
        """Whether everything that was made has been given to the reports."""
        return self._under_way is None and not self._waiting

    def begin(self, now_s: float) -> None:
        """A log was opened."""
        self._num_entries = self._oplog.num_open
        self._next_s = now_s + self._interval_s

    def advance(self, num_contributed: int, now_s: float) -> None:
        """Commits to the open log if it is time."""
        if now_s < self._next_s or not self.is_idle:
            return
        self._next_s = now_s + self._interval_s
        if self._oplog.num_open > self._num_entries:
            self._make(num_contributed, is_final=False)

    def seal(self, num_contributed: int) -> None:
        """Commits to the open log for the last time. One that is empty counts too: there is nothing to wait for."""
        self._make(num_contributed, is_final=True)

    def persisted(self, commitment: Commitment) -> None:
        """A commitment is durable: it may be reported."""
        self._under_way = None
        self._oplog.made_durable(commitment)
        self._reports.add_commitment(commitment)
        self._start()

    def wake_s(self) -> float:
        """When the next commitment is due, if anything is done until then; times that have passed mean nothing."""
        return self._next_s

    def _make(self, num_contributed: int, *, is_final: bool) -> None:
        commitment = self._oplog.commitment(num_contributed=num_contributed, is_final=is_final)
        self._num_entries = commitment.num_entries
        self._waiting.append(commitment)
        self._start()

    def _start(self) -> None:
        while self._under_way is None and self._waiting:
            commitment = self._waiting.popleft()
            if self._oplog.holds(commitment.outer_step):  # else it waited so long that its log is forgotten
                self._under_way = commitment
                self._emit(PersistLog(*self._oplog.hand_over(commitment), commitment))
