"""One check: a miner's outer step from the draw to the finding. Pure.

Owns the order of a check (commitment, log, draw of the prefix, evidence, replay), its deadlines and what its miner's
answers mean. Must not know who else is checked, whether the miner is still a member, or how verdicts travel.

A check ends once, and its ending says what it is worth: the miner's own bytes show that it passed or failed; or it did
not deliver, or has nothing to deliver, and the core decides what that means; or the validator could not do its part.
"""

import math
import random
from dataclasses import dataclass, field
from enum import StrEnum

from orion.common.config import RunSpec
from orion.common.ids import Hotkey
from orion.common.protocol.codec import activation_spec, body_size
from orion.common.protocol.messages import CheckpointRef, Commitment, CommittedLog, EvidenceRequest, LogEntry, Operation
from orion.validator.events import (
    Effect,
    EvidenceArrived,
    FetchCommitments,
    FetchEvidence,
    FetchLog,
    FetchProblem,
    Replay,
    ReplayOperation,
    ReplayResult,
    ReplayTask,
    TensorBody,
)
from orion.validator.log_check import EvidenceNeed, Position, Side, evidence_needs, log_fault
from orion.validator.sampling import draw_num_operations

FETCHES_MAX = 4
"""Evidence requests in flight at a time: enough to fill a link, few enough not to get in the way of training."""

RETRY_S = 1.0
"""Before a miner that was busy or out of reach is asked again."""

LOG_ENTRY_BYTES_MAX = 512
"""Generous bound on a log entry as JSON."""

LOG_ENTRIES_MAX = 1_000_000
"""Bound of CommittedLog."""

_MESSAGE_BYTES = 4096
"""Beside the entries of a log."""


class CheckPhase(StrEnum):
    """What a check waits for."""

    COMMITMENT = "commitment"
    """The miner was credited with work but has not committed to any; after a while that is looked up once more."""
    LOG = "log"
    EVIDENCE = "evidence"
    REPLAY = "replay"
    ENDED = "ended"


class EndingKind(StrEnum):
    """What came of a check."""

    PASSED = "passed"
    FAILED = "failed"
    """The miner's own bytes show it."""
    SILENT = "silent"
    """The miner did not hand over what it owes."""
    LOST = "lost"
    """The miner has no log of what it was credited for, as one has that was started anew in between."""
    UNDECIDED = "undecided"
    """The validator could not do its part."""


@dataclass(frozen=True, slots=True)
class Target:
    """Whom to check on which outer step."""

    miner: Hotkey
    stage_index: int
    outer_step: int
    commitment: Commitment | None
    num_credited: int
    """Microbatches that the ledger held for it when it was drawn."""


@dataclass(frozen=True, slots=True)
class Ending:
    """How a check ended."""

    kind: EndingKind
    detail: str = ""
    num_operations: int = 0
    """Replayed."""


@dataclass(slots=True)
class _Evidence:
    """The bodies of a prefix: still to fetch, asked for, there."""

    todo: list[EvidenceNeed]
    in_flight: dict[EvidenceRequest, EvidenceNeed] = field(default_factory=dict)
    bodies: dict[EvidenceRequest, TensorBody] = field(default_factory=dict)


class Check:
    """Feed it what arrives, then ask `pump` what to do next."""

    def __init__(self, spec: RunSpec, target: Target, checkpoint: CheckpointRef | None, rng: random.Random) -> None:
        """`checkpoint` is where a replay of the target's outer step starts from."""
        self.target = target
        self.phase = CheckPhase.COMMITMENT
        self.ending: Ending | None = None
        self.replay_result: ReplayResult | None = None
        self._spec = spec
        self._checkpoint = checkpoint
        self._rng = rng
        self._position = Position(target.stage_index, spec.num_stages)
        self._deadline_s = math.inf
        self._not_before_s = -math.inf
        self._has_asked_again = False
        self._log_in_flight = False
        self._commitment = target.commitment
        self._entries: tuple[LogEntry, ...] = ()
        self._evidence = _Evidence([])

    def start(self, now_s: float) -> None:
        """Begins with the log, or with waiting for the commitment."""
        if self._commitment is not None:
            self._begin_log(self._commitment, now_s)
        else:
            self._deadline_s = now_s + self._spec.time_limits.transfer_grace_s

    def pump(self, url: str, now_s: float) -> list[Effect]:
        """What is due now, for a miner that is reached at `url`; notices when a deadline has passed.

        Until the check ends it must be called after everything that arrives and about once a second.
        """
        if self.phase is CheckPhase.COMMITMENT and now_s >= self._deadline_s and not self._has_asked_again:
            self._has_asked_again = True
            return [FetchCommitments(self.target.outer_step)]
        if self.phase in (CheckPhase.LOG, CheckPhase.EVIDENCE) and now_s >= self._deadline_s:
            self._end(EndingKind.SILENT, f"{self.phase} not delivered in time")
        if self.phase is CheckPhase.EVIDENCE and not self._evidence.todo and not self._evidence.in_flight:
            self.phase = CheckPhase.REPLAY
            return [Replay(self._task())]
        if now_s < self._not_before_s:
            return []
        if self.phase is CheckPhase.LOG and not self._log_in_flight:
            assert self._commitment is not None
            self._log_in_flight = True
            size_bytes_max = _MESSAGE_BYTES + self._commitment.num_entries * LOG_ENTRY_BYTES_MAX
            return [FetchLog(self.target.miner, url, self.target.outer_step, size_bytes_max, self._left_s(now_s))]
        if self.phase is CheckPhase.EVIDENCE:
            return self._fetch_evidence(url, now_s)
        return []

    def on_commitment(self, commitment: Commitment | None, now_s: float) -> None:
        """The commitments were read again; `commitment` is the miner's."""
        if self.phase is not CheckPhase.COMMITMENT:
            return
        if commitment is not None:
            self._begin_log(commitment, now_s)
        elif self._has_asked_again:
            self._end(EndingKind.LOST, f"credited with {self.target.num_credited} microbatches without a commitment")

    def on_log(self, log: CommittedLog, now_s: float) -> None:
        """The log has come: checks it, then draws how much of it is replayed."""
        if self.phase is not CheckPhase.LOG:
            return
        assert self._commitment is not None
        fault = log_fault(self._commitment, log, self._position, self.target.num_credited, self._spec)
        if fault is not None:
            self._end(EndingKind.FAILED, fault)
            return
        num_operations = draw_num_operations(len(log.entries), self._spec.validation.replay_ops_max, self._rng)
        self._entries = log.entries[:num_operations]
        needs = evidence_needs(self._entries, self.target.outer_step, self._position)
        self._evidence = _Evidence(list(needs))
        self.phase = CheckPhase.EVIDENCE
        self._not_before_s = -math.inf
        body_bytes = body_size(activation_spec(self._spec, 1)) if needs else 0
        self._set_deadline(body_bytes * len(needs), now_s)

    def on_log_failed(self, problem: FetchProblem, detail: str, now_s: float) -> None:
        """The log has not come."""
        if self.phase is not CheckPhase.LOG:
            return
        self._log_in_flight = False
        if problem is FetchProblem.NOT_FOUND:
            self._end(EndingKind.LOST, f"log withheld: {detail}")
        else:
            self._fetch_failed("log", problem, detail, now_s)

    def on_evidence(self, event: EvidenceArrived) -> None:
        """A body has come; it must be the one that the log names."""
        need = self._evidence.in_flight.pop(event.request, None)
        if self.phase is not CheckPhase.EVIDENCE or need is None:
            return
        if event.digest != need.digest:
            self._end(EndingKind.FAILED, f"{_name(event.request)} does not match the committed log")
            return
        self._evidence.bodies[event.request] = event.body

    def on_evidence_failed(self, request: EvidenceRequest, problem: FetchProblem, detail: str, now_s: float) -> None:
        """A body has not come."""
        need = self._evidence.in_flight.pop(request, None)
        if self.phase is CheckPhase.EVIDENCE and need is not None:
            self._evidence.todo.insert(0, need)
            self._fetch_failed(_name(request), problem, detail, now_s)

    def on_replayed(self, result: ReplayResult) -> None:
        """The replay is through."""
        if self.phase is CheckPhase.REPLAY:
            self.replay_result = result
            kind = EndingKind.PASSED if result.failure is None else EndingKind.FAILED
            self._end(kind, result.failure or "", result.num_operations)

    def give_up(self, detail: str) -> None:
        """The validator cannot go on with this check, through no fault of the miner."""
        if self.phase is not CheckPhase.ENDED:
            self._end(EndingKind.UNDECIDED, detail)

    def check_invariants(self) -> None:
        """Raises AssertionError when the state is impossible."""
        assert (self.ending is not None) == (self.phase is CheckPhase.ENDED)
        evidence = self._evidence
        assert len(evidence.in_flight) <= FETCHES_MAX
        assert not evidence.in_flight.keys() & evidence.bodies.keys()
        assert len(self._entries) <= self._spec.validation.replay_ops_max
        assert self.phase is not CheckPhase.REPLAY or not (evidence.todo or evidence.in_flight)

    def _begin_log(self, commitment: Commitment, now_s: float) -> None:
        self._commitment = commitment
        self.phase = CheckPhase.LOG
        if not 0 < commitment.num_entries <= LOG_ENTRIES_MAX:
            self._end(EndingKind.FAILED, f"commitment to a log of {commitment.num_entries} entries")
            return
        self._set_deadline(commitment.num_entries * LOG_ENTRY_BYTES_MAX, now_s)

    def _fetch_failed(self, what: str, problem: FetchProblem, detail: str, now_s: float) -> None:
        match problem:
            case FetchProblem.UNREACHABLE | FetchProblem.BUSY:
                self._not_before_s = now_s + RETRY_S
            case FetchProblem.NOT_FOUND | FetchProblem.REFUSED:
                self._end(EndingKind.SILENT, f"{what} withheld: {detail}")
            case FetchProblem.BAD_BODY:
                self._end(EndingKind.FAILED, f"{what} is unusable: {detail}")

    def _fetch_evidence(self, url: str, now_s: float) -> list[Effect]:
        evidence = self._evidence
        effects: list[Effect] = []
        while evidence.todo and len(evidence.in_flight) < FETCHES_MAX:
            need = evidence.todo.pop(0)
            evidence.in_flight[need.request] = need
            timeout_s = self._left_s(now_s)
            effects.append(FetchEvidence(self.target.miner, url, need.request, need.direction, timeout_s))
        return effects

    def _task(self) -> ReplayTask:
        def body(entry: LogEntry, side: Side) -> TensorBody | None:
            if entry.microbatch_id is None or entry.operation is Operation.INNER_STEP:
                return None
            request = EvidenceRequest(
                outer_step=self.target.outer_step,
                microbatch_id=entry.microbatch_id,
                operation=entry.operation,
                side=side,
            )
            return self._evidence.bodies.get(request)

        operations = tuple(
            ReplayOperation(entry, body(entry, "input"), body(entry, "output")) for entry in self._entries
        )
        target = self.target
        return ReplayTask(target.miner, target.stage_index, target.outer_step, self._checkpoint, operations)

    def _left_s(self, now_s: float) -> float:
        return max(0.0, self._deadline_s - now_s)

    def _set_deadline(self, size_bytes: int, now_s: float) -> None:
        """By the rule of every phase: a grace and the time that the slowest link still waited for needs."""
        limits = self._spec.time_limits
        self._deadline_s = now_s + limits.transfer_grace_s + size_bytes / limits.bandwidth_floor_bytes_per_s

    def _end(self, kind: EndingKind, detail: str = "", num_operations: int = 0) -> None:
        self.phase = CheckPhase.ENDED
        self.ending = Ending(kind, detail, num_operations)
        self._evidence = _Evidence([])


def _name(request: EvidenceRequest) -> str:
    return f"{request.side} of {request.operation} {request.microbatch_id}"
