"""What a committed log says by itself, before anything is replayed. Pure.

A log must be the one that was committed to, every time that it was; be possible (no backward without its forward,
nothing twice, inner steps where the run's rules put them); and hold what its commitments claim. None of this costs a
tensor. A log is looked at from its beginning, as far as it was asked for.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from orion.common.config import RunSpec
from orion.common.ids import Digest, Direction, MicrobatchId, Operation
from orion.common.protocol.log import BEGINNINGS_MAX, entry_bytes
from orion.common.protocol.merkle import Mark, proof_fault
from orion.common.protocol.messages import Commitment
from orion.common.protocol.records import (
    CommittedLog,
    EvidenceRequest,
    LogEntry,
    LogRequest,
)

Side = Literal["input", "output"]


@dataclass(frozen=True, slots=True)
class Position:
    """Where in the pipeline a log was written."""

    stage_index: int
    num_stages: int

    @property
    def is_first(self) -> bool:
        return self.stage_index == 0

    @property
    def is_last(self) -> bool:
        return self.stage_index == self.num_stages - 1


@dataclass(frozen=True, slots=True)
class EvidenceNeed:
    """A tensor body that one operation of a log left behind."""

    request: EvidenceRequest
    direction: Direction
    """Layout of the body."""
    digest: Digest


def commitments_fault(commitments: Sequence[Commitment], spec: RunSpec) -> str | None:
    """What is wrong with a miner's commitments, in the order in which they were made, before the log is seen."""
    newest = commitments[-1]
    roots: dict[int, Digest] = {}
    for commitment in commitments:
        if roots.setdefault(commitment.num_entries, commitment.root) != commitment.root:
            return f"two commitments to logs of {commitment.num_entries} entries have different roots"
    num_needed = min(newest.num_entries, spec.evidence_operations_min)
    if newest.num_kept < num_needed:
        return f"keeps the tensors of {newest.num_kept} operations, {num_needed} must be"
    return None


def request_of(commitments: Sequence[Commitment], stop: int) -> LogRequest:
    """Asks for the log's first `stop` entries, with proof under every one of the commitments."""
    sizes = tuple(sorted({commitment.num_entries for commitment in commitments}))
    return LogRequest(outer_step=commitments[-1].outer_step, sizes=sizes, start=0, stop=stop)


def log_fault(
    commitments: Sequence[Commitment], request: LogRequest, log: CommittedLog, position: Position, spec: RunSpec
) -> str | None:
    """What is wrong with the answer to `request_of` commitments that are without fault, None when nothing is."""
    if log.outer_step != request.outer_step:
        return f"handed over the log of outer step {log.outer_step}"
    if (log.start, len(log.entries)) != (request.start, request.stop - request.start):
        return "handed over another part of the log than was asked for"
    roots = {commitment.num_entries: commitment.root for commitment in commitments}
    marks = [Mark(size, roots[size]) for size in request.sizes]
    if fault := proof_fault(marks, log.start, [entry_bytes(entry) for entry in log.entries], log.proof):
        return f"log does not match its commitments: {fault}"
    reader = _Reader(position, spec)
    claims = {commitment.num_entries: commitment for commitment in commitments}
    for index, entry in enumerate(log.entries):
        if fault := reader.read(entry, is_last_entry=index == request.sizes[-1] - 1):
            return f"log entry {index}: {fault}"
        if claim := claims.get(index + 1):
            if claim.num_applied != reader.num_applied:
                return f"commitment claims {claim.num_applied} microbatches, the log has {reader.num_applied}"
            if claim.num_contributed > reader.num_averaged:
                return f"commitment claims {claim.num_contributed} in inner steps, the log has {reader.num_averaged}"
    return None


def evidence_needs(entries: Sequence[LogEntry], outer_step: int, position: Position) -> tuple[EvidenceNeed, ...]:
    """All tensor bodies that a replay of these entries, which must be without fault, needs; in log order."""
    needs = []
    for entry in entries:
        sides: tuple[tuple[Side, Digest | None], ...] = (
            ("input", entry.input_digest),
            ("output", entry.output_digest),
        )
        for side, digest in sides:
            if entry.microbatch_id is None or digest is None:
                continue
            request = EvidenceRequest(
                outer_step=outer_step, microbatch_id=entry.microbatch_id, operation=entry.operation, side=side
            )
            needs.append(EvidenceNeed(request, direction_of(entry.operation, side, position), digest))
    return tuple(needs)


def direction_of(operation: Operation, side: Side, position: Position) -> Direction:
    """Whether an operation's input or output is an activation or a gradient."""
    if operation is Operation.FORWARD and not (side == "output" and position.is_last):
        return Direction.ACTIVATION
    return Direction.GRADIENT


class _Reader:
    """Reads a log in order and follows what its miner must have held."""

    def __init__(self, position: Position, spec: RunSpec) -> None:
        self._position = position
        self._spec = spec
        self._inner_step = 0
        self._forwarded: dict[MicrobatchId, LogEntry] = {}
        self._backwarded: set[MicrobatchId] = set()
        self._lost: set[MicrobatchId] = set()
        """Forwarded before the miner began anew, and no longer held."""
        self._num_since_step = 0
        self._num_beginnings = 1
        self._num_read = 0
        self._is_ahead = False
        """The outer step was begun before its anchor was there, which has not come yet."""
        self.num_applied = 0
        self.num_averaged = 0
        """By the inner steps since the outer step was last begun."""

    def read(self, entry: LogEntry, is_last_entry: bool) -> str | None:
        """What is wrong with the next entry."""
        self._num_read += 1
        if entry.operation is Operation.BEGIN_ANEW:
            self._inner_step = 0
        if entry.inner_step != self._inner_step:
            return f"says {entry.inner_step} inner steps were done, there were {self._inner_step}"
        match entry.operation:
            case Operation.FORWARD:
                return self._digest_fault(entry) or self._forward(entry)
            case Operation.BACKWARD:
                return self._digest_fault(entry) or self._backward(entry)
            case Operation.INNER_STEP:
                return self._step(entry, is_last_entry)
            case Operation.BEGIN_ANEW:
                return self._begin_anew(entry)
            case Operation.BEGIN_AHEAD:
                return self._begin_ahead(entry)
            case Operation.TAKE_MERGED:
                return self._take_merged(entry)
            case Operation.ENCODE:
                return "is no operation of a log"

    def _digest_fault(self, entry: LogEntry) -> str | None:
        is_forward = entry.operation is Operation.FORWARD
        has_input = not (is_forward and self._position.is_first)
        # The last stage's forward sends a gradient back, unless there is nobody before it.
        has_output = not self._position.is_first or (is_forward and not self._position.is_last)
        if (entry.input_digest is not None) != has_input or (entry.output_digest is not None) != has_output:
            return "has not the digests that its stage's operations have"
        if entry.microbatch_id is None or entry.data_id is None:
            return "names no microbatch"
        return None

    def _forward(self, entry: LogEntry) -> str | None:
        assert entry.microbatch_id is not None
        if entry.microbatch_id in self._forwarded:
            return f"microbatch {entry.microbatch_id} went forward twice"
        self._forwarded[entry.microbatch_id] = entry
        if self._position.is_last:
            self._apply()
        return None

    def _backward(self, entry: LogEntry) -> str | None:
        assert entry.microbatch_id is not None
        forward = self._forwarded.get(entry.microbatch_id)
        if self._position.is_last or forward is None:
            return f"microbatch {entry.microbatch_id} went backward without being held"
        if entry.microbatch_id in self._backwarded or entry.microbatch_id in self._lost:
            return f"microbatch {entry.microbatch_id} went backward without being held"
        if forward.data_id != entry.data_id:
            return f"microbatch {entry.microbatch_id} changed its data"
        staleness = entry.inner_step - forward.inner_step
        if staleness > self._spec.flow.staleness_max:
            return f"microbatch {entry.microbatch_id} is stale by {staleness} inner steps"
        self._backwarded.add(entry.microbatch_id)
        self._apply()
        return None

    def _step(self, entry: LogEntry, is_last_entry: bool) -> str | None:
        full = self._spec.microbatches_per_step
        if entry.num_microbatches != self._num_since_step or not 0 < entry.num_microbatches <= full:
            return f"averages {entry.num_microbatches} microbatches, {self._num_since_step} of at most {full} waited"
        if entry.num_microbatches < full and not is_last_entry:
            return f"averages {entry.num_microbatches} microbatches, and is not the last"
        self.num_averaged += self._num_since_step
        self._num_since_step = 0
        self._inner_step += 1
        return None

    def _begin_anew(self, entry: LogEntry) -> str | None:
        """Nothing is held any more; what is done from here on is done on the anchor again."""
        if _names_something(entry):
            return "begins anew with something in hand"
        self._num_beginnings += 1
        if self._num_beginnings > BEGINNINGS_MAX:
            return f"begins the outer step more than {BEGINNINGS_MAX} times"
        self._num_since_step = self.num_averaged = 0
        self._is_ahead = False
        self._lost |= self._forwarded.keys() - self._backwarded
        return None

    def _begin_ahead(self, entry: LogEntry) -> str | None:
        """The outer step is begun before its anchor is there."""
        if self._spec.sync != "overlapped" or self._num_read > 1 or _names_something(entry):
            return "begins ahead of its anchor where it cannot"
        self._is_ahead = True
        return None

    def _take_merged(self, entry: LogEntry) -> str | None:
        """The anchor has come. What is held and accumulated stays."""
        if not self._is_ahead or _names_something(entry):
            return "takes in a merge that it was not ahead of"
        self._is_ahead = False
        return None

    def _apply(self) -> None:
        self._num_since_step += 1
        self.num_applied += 1


def _names_something(entry: LogEntry) -> bool:
    named = (entry.microbatch_id, entry.data_id, entry.input_digest, entry.output_digest)
    return bool(entry.num_microbatches) or any(each is not None for each in named)
