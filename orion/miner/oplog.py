"""The ordered log of what the device did in each outer step, and what others are shown of it. Pure.

Owns the logs of the newest `OUTER_STEPS_KEPT` outer steps that were begun. An operation is logged when it was done, in
the order of the device, whether or not its microbatch ends well: a validator must be able to repeat it all.

A log only ever grows, also across processes: one that is begun again in the same outer step goes on with an entry that
says so, after what earlier processes have left. Only what is durable and committed to is handed out: nobody is shown
work before the commitment over it, and what is shown will still be there when it is asked for again.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from orion.common.ids import DataId, Digest, MicrobatchId, Operation
from orion.common.protocol.log import BEGINNINGS_MAX, entry_bytes
from orion.common.protocol.merkle import MerkleTree
from orion.common.protocol.messages import Commitment
from orion.common.protocol.records import CommittedLog, EvidenceRequest, LogEntry, LogRequest
from orion.miner.archive import KeptLog, outdated


def _beginning(operation: Operation) -> LogEntry:
    return LogEntry(
        operation=operation, microbatch_id=None, data_id=None, inner_step=0, input_digest=None, output_digest=None
    )


@dataclass(slots=True)
class _Log:
    """One outer step."""

    stage_index: int
    entries: list[LogEntry] = field(default_factory=list)
    tree: MerkleTree = field(default_factory=MerkleTree)
    places: dict[tuple[MicrobatchId, Operation], int] = field(default_factory=dict)
    """Where each operation on a microbatch stands."""
    num_applied: int = 0
    num_beginnings: int = 1
    num_handed_over: int = 0
    """Leading entries that were given away to be made durable."""
    num_durable: int = 0
    """Leading entries that are, with a commitment over them."""
    beginning: LogEntry | None = None
    """What goes before the next entry: that the log begins anew, or that it begins ahead of its anchor."""

    def add(self, entry: LogEntry) -> None:
        if entry.microbatch_id is not None:
            self.places[(entry.microbatch_id, entry.operation)] = len(self.entries)
        self.num_beginnings += entry.operation is Operation.BEGIN_ANEW
        self.entries.append(entry)
        self.tree.append(entry_bytes(entry))


class OpLog:
    """A miner's logs: at most one open."""

    def __init__(self, kept: Sequence[KeptLog] = ()) -> None:
        """`kept`: what earlier processes have left."""
        self._logs: dict[int, _Log] = {}
        self._open_step: int | None = None
        for found in kept:
            log = self._logs[found.commitment.outer_step] = _Log(found.stage_index)
            for entry in found.entries:
                log.add(entry)
            log.num_applied = found.commitment.num_applied
            log.num_handed_over = log.num_durable = len(log.entries)

    def can_begin(self, outer_step: int, stage_index: int) -> bool:
        """Whether work in that outer step can be logged: not in two stages, and not begun too often."""
        log = self._logs.get(outer_step)
        return log is None or (log.stage_index == stage_index and log.num_beginnings < BEGINNINGS_MAX)

    def begin(self, outer_step: int, stage_index: int, *, is_ahead: bool = False) -> None:
        """Opens the log of an outer step, to go on with it if there is one, and forgets what is too old.

        `is_ahead`: it begins on the anchor before, less what was uploaded; only a log that is not there yet can."""
        assert self.can_begin(outer_step, stage_index), f"outer step {outer_step} cannot be begun"
        log = self._logs.setdefault(outer_step, _Log(stage_index))
        assert not (is_ahead and log.entries), f"outer step {outer_step} was begun before"
        if log.entries:
            log.beginning = _beginning(Operation.BEGIN_ANEW)
        else:
            log.beginning = _beginning(Operation.BEGIN_AHEAD) if is_ahead else None
        self._open_step = outer_step
        for old in outdated(self._logs):
            del self._logs[old]

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
        log = self._open
        if log.beginning is not None:
            log.add(log.beginning)
            log.beginning = None
        log.add(
            LogEntry(
                operation=operation,
                microbatch_id=microbatch_id,
                data_id=data_id,
                inner_step=inner_step,
                input_digest=input_digest,
                output_digest=output_digest,
                num_microbatches=num_microbatches,
            )
        )
        log.num_applied += applied

    def commitment(self, *, num_contributed: int, is_final: bool) -> Commitment:
        """The commitment over the open log as it is now; what of it is kept is for the archive to say."""
        assert self._open_step is not None, "no log is open"
        log = self._open
        return Commitment(
            outer_step=self._open_step,
            num_entries=len(log.entries),
            num_applied=log.num_applied,
            num_contributed=num_contributed,
            num_kept=0,
            root=log.tree.root(),
            is_final=is_final,
        )

    def holds(self, outer_step: int) -> bool:
        """Whether there is a log of that outer step (still)."""
        return outer_step in self._logs

    def hand_over(self, commitment: Commitment) -> tuple[int, tuple[LogEntry, ...]]:
        """The stage, and the entries up to a commitment that were not handed over before, to be made durable."""
        log = self._logs[commitment.outer_step]
        entries = tuple(log.entries[log.num_handed_over : commitment.num_entries])
        log.num_handed_over = commitment.num_entries
        return log.stage_index, entries

    def made_durable(self, commitment: Commitment) -> None:
        """From now on the log may be shown up to this commitment."""
        log = self._logs.get(commitment.outer_step)
        if log is not None:
            log.num_durable = max(log.num_durable, commitment.num_entries)

    def close(self) -> None:
        """Nothing more comes into the open log, unless it is begun again."""
        self._open_step = None

    @property
    def num_open(self) -> int:
        """Entries of the open log."""
        return len(self._open.entries)

    @property
    def open_entries(self) -> Sequence[LogEntry]:
        """What was logged so far in the outer step under way, by this process and earlier ones."""
        return () if self._open_step is None else tuple(self._open.entries)

    def microbatches(self, outer_step: int) -> Iterable[MicrobatchId]:
        """Those that the log of an outer step names."""
        log = self._logs.get(outer_step)
        return () if log is None else {microbatch_id for microbatch_id, _ in log.places}

    def committed(self, outer_step: int) -> tuple[LogEntry, ...] | None:
        """The log as far as it is committed to; None when it is not, or was forgotten."""
        log = self._logs.get(outer_step)
        return None if log is None or not log.num_durable else tuple(log.entries[: log.num_durable])

    def answer(self, request: LogRequest) -> CommittedLog | None:
        """The range that is asked for, with proof; None when that is not committed to, or makes no sense."""
        log = self._logs.get(request.outer_step)
        if log is None or request.sizes[-1] > log.num_durable:
            return None
        try:
            proof = log.tree.proof(request.sizes, request.start, request.stop)
        except ValueError:
            return None
        entries = tuple(log.entries[request.start : request.stop])
        return CommittedLog(outer_step=request.outer_step, start=request.start, entries=entries, proof=proof)

    def may_show(self, request: EvidenceRequest) -> bool:
        """Whether the operation that a tensor belongs to is committed to. An error state is there only once it is."""
        if request.operation is Operation.ENCODE:
            return True
        log = self._logs.get(request.outer_step)
        place = None if log is None else log.places.get((request.microbatch_id, request.operation))
        return log is not None and place is not None and place < log.num_durable

    @property
    def _open(self) -> _Log:
        assert self._open_step is not None, "no log is open"
        return self._logs[self._open_step]
