"""The ordered log of what the device did in each outer step, and the commitment over it. Pure.

Owns the logs of the last `OUTER_STEPS_KEPT` outer steps that were begun. An operation is logged when it has been done,
in the order of the device, whether or not its microbatch ends well: a validator must be able to repeat it all. A log
that was sealed never changes, and only sealed logs are handed out, so nobody can be shown a log before the commitment.
"""

from collections.abc import Sequence

from orion.common.ids import DataId, Digest, MicrobatchId, Operation
from orion.common.protocol.log import log_root
from orion.common.protocol.messages import Commitment
from orion.common.protocol.records import LogEntry

OUTER_STEPS_KEPT = 3
"""The one under way and the two before it: validators ask about what was just committed, while the next one begins."""


class OpLog:
    """A miner's logs: at most one open, the others sealed."""

    def __init__(self) -> None:
        self._logs: dict[int, list[LogEntry]] = {}
        self._commitments: dict[int, Commitment] = {}
        self._num_applied = 0
        self._open_step: int | None = None

    def begin(self, outer_step: int) -> None:
        """Opens an empty log and forgets what is too old; a log of the same outer step is replaced."""
        self._logs.pop(outer_step, None)
        self._commitments.pop(outer_step, None)
        self._logs[outer_step] = []
        self._open_step, self._num_applied = outer_step, 0
        for old in sorted(self._logs)[:-OUTER_STEPS_KEPT]:
            del self._logs[old]
            self._commitments.pop(old, None)

    def append(
        self,
        operation: Operation,
        *,
        inner_step: int,
        microbatch_id: MicrobatchId | None = None,
        data_id: DataId | None = None,
        input_digest: Digest | None = None,
        output_digest: Digest | None = None,
        num_microbatches: int = 0,
        applied: bool = False,
    ) -> None:
        """Adds an operation to the open log; `applied`: it accumulated a gradient."""
        assert self._open_step is not None, "no log is open"
        entry = LogEntry(
            operation=operation,
            microbatch_id=microbatch_id,
            data_id=data_id,
            inner_step=inner_step,
            input_digest=input_digest,
            output_digest=output_digest,
            num_microbatches=num_microbatches,
        )
        self._logs[self._open_step].append(entry)
        self._num_applied += applied

    def seal(self) -> Commitment:
        """Closes the open log and gives the commitment over it.

        One over an empty log counts too: it says that there is no pseudo-gradient to wait for.
        """
        assert self._open_step is not None, "no log is open"
        outer_step, self._open_step = self._open_step, None
        entries = self._logs[outer_step]
        commitment = Commitment(
            outer_step=outer_step,
            num_entries=len(entries),
            num_applied=self._num_applied,
            root=log_root(entries),
        )
        self._commitments[outer_step] = commitment
        return commitment

    @property
    def open_entries(self) -> Sequence[LogEntry]:
        """What was logged so far in the outer step under way."""
        return () if self._open_step is None else tuple(self._logs[self._open_step])

    def committed(self, outer_step: int) -> tuple[LogEntry, ...] | None:
        """The log behind a commitment; None when there is none or it was forgotten."""
        if outer_step not in self._commitments:
            return None
        return tuple(self._logs[outer_step])
