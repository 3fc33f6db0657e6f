"""What the orchestrator must be told and has not acknowledged yet; and how long to wait after a failure. Pure.

Invariants: at most one attempt per notice is under way; pauses grow to a bound; a notice ends when it was accepted,
when it was refused, or when the outer step that it is about is over (an upload's, with the one after it).
"""

from dataclasses import dataclass

from orion.common.protocol.age import AGE_MAX
from orion.common.protocol.messages import (
    Applied,
    CheckpointUploaded,
    Reduced,
    Uploaded,
)
from orion.miner.effects import SendNotice
from orion.miner.events import Notice, SendOutcome
from orion.miner.moment import Emit

PAUSE_MIN_S = 0.25
PAUSE_MAX_S = 5.0


@dataclass(slots=True)
class Backoff:
    """A pause that doubles with each failure."""

    num_failures: int = 0
    until_s: float = 0.0

    def failed(self, now_s: float) -> None:
        """Starts the next pause."""
        self.until_s = now_s + min(PAUSE_MAX_S, PAUSE_MIN_S * 2.0 ** min(self.num_failures, 16))
        self.num_failures += 1

    def is_over(self, now_s: float) -> bool:
        """Whether another attempt may be made."""
        return now_s >= self.until_s


@dataclass(slots=True)
class _Waiting:
    notice: Notice
    backoff: Backoff
    is_sending: bool = False


def _name(notice: Notice) -> tuple[str, int, int]:
    """Two notices of one name say the same; the later one replaces the earlier."""
    return notice.kind, notice.outer_step, notice.partition_index if isinstance(notice, Reduced) else 0


class Notices:
    """Notices under way."""

    def __init__(self, emit: Emit) -> None:
        self._emit = emit
        self._waiting: dict[tuple[str, int, int], _Waiting] = {}

    def __len__(self) -> int:
        return len(self._waiting)

    def add(self, notice: Notice, now_s: float) -> None:
        """Sends a notice until it is acknowledged."""
        waiting = _Waiting(notice, Backoff(until_s=now_s))
        self._waiting[_name(notice)] = waiting
        self._send(waiting)

    def ended(self, notice: Notice, outcome: SendOutcome, now_s: float) -> None:
        """An attempt has ended."""
        waiting = self._waiting.get(_name(notice))
        if waiting is None or waiting.notice != notice:
            return
        waiting.is_sending = False
        if outcome in (SendOutcome.ACCEPTED, SendOutcome.REFUSED):
            del self._waiting[_name(notice)]
            return
        waiting.backoff.failed(now_s)

    def advance(self, outer_step: int, now_s: float) -> None:
        """Repeats what is due; gives up what is about an outer step that the stage, now in `outer_step`, has left."""
        for name, waiting in list(self._waiting.items()):
            if waiting.is_sending:
                continue
            if _is_over(waiting.notice, outer_step):
                del self._waiting[name]
            elif waiting.backoff.is_over(now_s):
                self._send(waiting)

    def wake_times_s(self) -> list[float]:
        """When the next attempts are due; times that have passed mean nothing."""
        return [item.backoff.until_s for item in self._waiting.values() if not item.is_sending]

    def _send(self, waiting: _Waiting) -> None:
        waiting.is_sending = True
        self._emit(SendNotice(waiting.notice))


def _is_over(notice: Notice, outer_step: int) -> bool:
    match notice:
        case Reduced() | Applied():
            return notice.outer_step < outer_step
        case Uploaded():
            return notice.outer_step + AGE_MAX < outer_step
        case CheckpointUploaded():
            # An anchor of this outer step is asked for until the next checkpoint is due.
            return notice.outer_step + 1 < outer_step
