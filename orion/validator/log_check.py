"""What a committed log says by itself, before anything is replayed. Pure.

A log must be the one that was committed to, be possible (no backward without its forward, nothing twice, inner steps
where the run's rules put them) and hold what the commitment claims. None of this costs a tensor.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from orion.common.config import RunSpec
from orion.common.ids import Digest, Direction, MicrobatchId, Operation
from orion.common.protocol.log import log_root
from orion.common.protocol.messages import Commitment
from orion.common.protocol.records import (
    CommittedLog,
    EvidenceRequest,
    LogEntry,
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


def log_fault(commitment: Commitment, log: CommittedLog, position: Position, spec: RunSpec) -> str | None:
    """What is wrong with a log, None when nothing is."""
    if log.outer_step != commitment.outer_step:
        return f"handed over the log of outer step {log.outer_step}"
    if len(log.entries) != commitment.num_entries or log_root(log.entries) != commitment.root:
        return "log does not match its commitment"
    reader = _Reader(position, spec)
    for index, entry in enumerate(log.entries):
        if fault := reader.read(entry, is_last_entry=index == len(log.entries) - 1):
            return f"log entry {index}: {fault}"
    if reader.num_applied != commitment.num_applied:
        return f"commitment claims {commitment.num_applied} microbatches, the log has {reader.num_applied}"
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
        self._num_since_step = 0
        self.num_applied = 0

    def read(self, entry: LogEntry, is_last_entry: bool) -> str | None:
        """What is wrong with the next entry."""
        if entry.inner_step != self._inner_step:
            return f"says {entry.inner_step} inner steps were done, there were {self._inner_step}"
        match entry.operation:
            case Operation.FORWARD:
                return self._digest_fault(entry) or self._forward(entry)
            case Operation.BACKWARD:
                return self._digest_fault(entry) or self._backward(entry)
            case Operation.INNER_STEP:
                return self._step(entry, is_last_entry)

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
        if self._position.is_last or forward is None or entry.microbatch_id in self._backwarded:
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
        self._num_since_step = 0
        self._inner_step += 1
        return None

    def _apply(self) -> None:
        self._num_since_step += 1
        self.num_applied += 1
