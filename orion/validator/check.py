"""One check: a miner's outer step from the draw to the finding. Pure.

Owns the order of a check (draw of the prefix, log, evidence, replay), its deadlines and what its miner's answers mean.
Must not know who else is checked, what the miner's membership is, or how verdicts travel.

A check ends once, and its ending says what it is worth: the miner's own bytes show that it passed or failed; or it did
not deliver, or has nothing to deliver, and the core decides what that means; or the validator could not do its part.
"""

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import StrEnum

from orion.common.config import RunSpec
from orion.common.ids import Hotkey, Operation, Subject
from orion.common.protocol.codec import activation_spec, body_size
from orion.common.protocol.fields import LOG_ENTRIES_MAX
from orion.common.protocol.messages import (
    CheckpointRef,
    Commitment,
    Contribution,
    Receipt,
)
from orion.common.protocol.records import (
    CommittedLog,
    EvidenceRequest,
    LogEntry,
    LogRequest,
)
from orion.validator.events import (
    Effect,
    EvidenceArrived,
    FetchEvidence,
    FetchLog,
    FetchProblem,
    LogProof,
    Replay,
    ReplayOperation,
    ReplayResult,
    ReplayTask,
    TensorBody,
)
from orion.validator.log_check import (
    EvidenceNeed,
    Position,
    Side,
    commitments_fault,
    evidence_needs,
    log_fault,
    request_of,
)
from orion.validator.receipt_check import receipt_fault
from orion.validator.sampling import draw_extent

TRIES = 3
"""Requests that fit into a miner's time when each is lost on the way; replays when the anchor cannot be had."""

FETCHES_MAX = 4
"""Evidence requests in flight at a time: enough to fill a link, few enough not to get in the way of training."""

RETRY_S = 1.0
"""Before a miner that was busy or out of reach is asked again."""

REPLAY_RETRY_S = 5.0
"""Before an anchor that could not be had is built again."""

LOG_ENTRY_BYTES_MAX = 512
"""Generous bound on a log entry as JSON."""

LOG_ENTRIES_WHOLE = 4096
"""A log up to this long is always fetched whole, a few hundred kilobytes: then all that it claims is counted again,
whatever is replayed. Of a longer one only what is replayed is fetched, with proof."""

PROOF_NODE_BYTES = 70
"""A hash of a proof as JSON."""

PROOF_NODES_PER_SIZE = 64
"""Bound on the hashes between two sizes of a log of a million entries: twice its height, and some."""

_MESSAGE_BYTES = 4096
"""Beside entries and proof of a log."""


class CheckPhase(StrEnum):
    """What a check waits for."""

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
    WITHHELD = "withheld"
    """The miner answers that it does not have what it committed to."""
    UNDECIDED = "undecided"
    """The validator could not do its part."""


@dataclass(frozen=True, slots=True)
class Target:
    """Whom to check on which outer step."""

    miner: Hotkey
    stage_index: int
    outer_step: int
    commitments: tuple[Commitment, ...]
    """All that it made, in order; the last one is the one that counts."""
    verifies: bool
    """Whether the check is to verify its work, by a replay of the whole outer step where the run has such."""

    @property
    def newest(self) -> Commitment:
        return self.commitments[-1]


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

    def __init__(
        self,
        spec: RunSpec,
        target: Target,
        checkpoint: CheckpointRef | None,
        rng: random.Random,
        operations_max: int = LOG_ENTRIES_MAX,
    ) -> None:
        """`checkpoint` is where a replay of the target's outer step starts from; `operations_max` is what the validator
        can afford."""
        self.target = target
        self.phase = CheckPhase.LOG
        self.ending: Ending | None = None
        self.replay_result: ReplayResult | None = None
        self._spec = spec
        self._checkpoint = checkpoint
        self._operations_max = operations_max
        self._rng = rng
        self._position = Position(target.stage_index, spec.num_stages)
        self._body_bytes = body_size(activation_spec(spec, 1)) if spec.num_stages > 1 else 0
        self._deadline_s = math.inf
        self._not_before_s = -math.inf
        self._log_in_flight = False
        self._replay_in_flight = False
        self._num_replays = 0
        self._num_operations = 0
        """To replay; drawn."""
        self._request: LogRequest | None = None
        self._entries: tuple[LogEntry, ...] = ()
        self._log: CommittedLog | None = None
        self._is_whole = False
        self._knows_contribution = False
        self._contribution: Contribution | None = None
        self._evidence = _Evidence([])

    @property
    def needs_contribution(self) -> bool:
        """Whether the pseudo-gradient is to be compared, and it is not known yet what the miner uploaded. Also where
        the log begins ahead of its anchor: what it begins from may be late until its outer step is merged."""
        is_ahead = bool(self._entries) and self._entries[0].operation is Operation.BEGIN_AHEAD
        return (self._is_whole or is_ahead) and not self._knows_contribution and self.phase is not CheckPhase.ENDED

    @property
    def subject(self) -> Subject:
        """What the check looks at, as far as is known."""
        return Subject.WHOLE if self._is_whole and self._contribution is not None else Subject.LOG

    def on_contribution(self, contribution: Contribution | None) -> None:
        """What the miner uploaded; None: nothing that entered the merge, or nobody knows."""
        if not self._knows_contribution:
            self._knows_contribution, self._contribution = True, contribution

    def start(self, now_s: float) -> None:
        """Draws how much of the log is replayed, and begins with asking for that. The log must not be empty."""
        newest = self.target.newest
        fault = commitments_fault(self.target.commitments, self._spec)
        if fault is not None:
            self._end(EndingKind.FAILED, fault)
            return
        extent = draw_extent(
            newest, self._spec.validation, self._operations_max, self._rng, verifies=self.target.verifies
        )
        self._num_operations, self._is_whole = extent.num_operations, extent.is_whole
        is_short = newest.num_entries <= LOG_ENTRIES_WHOLE
        self._request = request_of(self.target.commitments, newest.num_entries if is_short else self._num_operations)
        self._set_deadline(_log_bytes(self._request), now_s)

    def pump(self, url: str | None, now_s: float) -> list[Effect]:
        """What is due now; notices when a deadline has passed, or that the miner is gone.

        `url` is where the miner is reached, None when it is no member any more. Until the check ends this must be
        called after everything that arrives and about once a second.
        """
        if self.phase is CheckPhase.EVIDENCE and not self._evidence.todo and not self._evidence.in_flight:
            self.phase = CheckPhase.REPLAY
        match self.phase:
            case CheckPhase.REPLAY:
                return self._begin_replay(url, now_s)
            case CheckPhase.LOG | CheckPhase.EVIDENCE if url is None:
                self.on_gone("no longer a member")
            case CheckPhase.LOG | CheckPhase.EVIDENCE if now_s >= self._deadline_s:
                self._end(EndingKind.SILENT, f"{self.phase} not delivered in time")
            case CheckPhase.LOG | CheckPhase.EVIDENCE if now_s >= self._not_before_s:
                assert url is not None
                return self._fetch_log(url, now_s) if self.phase is CheckPhase.LOG else self._fetch_evidence(url, now_s)
        return []

    def on_log(self, log: CommittedLog, agreed: Sequence[Receipt], now_s: float) -> None:
        """The log has come: checks it, and holds it against the transfers on which both ends agree; then asks for the
        tensors of what is replayed."""
        if self.phase is not CheckPhase.LOG:
            return
        assert self._request is not None
        fault = log_fault(self.target.commitments, self._request, log, self._position, self._spec)
        if fault is None:
            fault = receipt_fault(log.entries, agreed, self.target.miner, self._position)
        if fault is not None:
            self._end(EndingKind.FAILED, fault)
            return
        self._log = log
        self._entries = log.entries[: self._num_operations]
        needs = evidence_needs(self._entries, self.target.outer_step, self._position)
        self._evidence = _Evidence(list(needs))
        self.phase = CheckPhase.EVIDENCE
        self._not_before_s = -math.inf
        self._set_deadline(self._body_bytes * len(needs), now_s)

    def on_log_failed(self, problem: FetchProblem, detail: str, now_s: float) -> None:
        """The log has not come."""
        if self.phase is not CheckPhase.LOG:
            return
        self._log_in_flight = False
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

    def on_gone(self, detail: str) -> None:
        """The miner is not there any more, or need not have the log any more; what it has handed over is still
        replayed."""
        if self.phase in (CheckPhase.LOG, CheckPhase.EVIDENCE):
            self._end(EndingKind.UNDECIDED, detail)

    def on_replayed(self, result: ReplayResult) -> None:
        """The replay is through."""
        if self.phase is CheckPhase.REPLAY:
            self.replay_result = result
            if result.failure is not None:
                self._end(EndingKind.FAILED, result.failure, result.num_operations)
            else:
                lacks_upload = self._is_whole and self._contribution is None
                detail = "nothing of it entered the merge, so no pseudo-gradient was compared" if lacks_upload else ""
                self._end(EndingKind.PASSED, detail, result.num_operations)

    def on_replay_unavailable(self, detail: str, retry: bool, now_s: float) -> None:
        """The validator could not replay, through no fault of the miner."""
        if self.phase is not CheckPhase.REPLAY:
            return
        self._replay_in_flight = False
        self._not_before_s = now_s + REPLAY_RETRY_S
        if not retry or self._num_replays >= TRIES:
            self._end(EndingKind.UNDECIDED, detail)

    def check_invariants(self) -> None:
        """Raises AssertionError when the state is impossible."""
        assert (self.ending is not None) == (self.phase is CheckPhase.ENDED)
        evidence = self._evidence
        assert len(evidence.in_flight) <= FETCHES_MAX
        assert not evidence.in_flight.keys() & evidence.bodies.keys()
        assert self._is_whole or len(self._entries) <= self._spec.validation.replay_ops_max
        assert len(self._entries) <= self._operations_max
        assert self.phase is not CheckPhase.REPLAY or not (evidence.todo or evidence.in_flight)

    def _fetch_log(self, url: str, now_s: float) -> list[Effect]:
        if self._log_in_flight:
            return []
        assert self._request is not None
        self._log_in_flight = True
        size_bytes_max = _log_bytes(self._request)
        timeout_s = self._attempt_s(size_bytes_max, now_s)
        return [FetchLog(self.target.miner, url, self._request, size_bytes_max, timeout_s)]

    def _begin_replay(self, url: str | None, now_s: float) -> list[Effect]:
        if self._replay_in_flight or self.needs_contribution or now_s < self._not_before_s:
            return []
        self._replay_in_flight = True
        self._num_replays += 1
        return [Replay(self._task(url))]

    def _fetch_failed(self, what: str, problem: FetchProblem, detail: str, now_s: float) -> None:
        match problem:
            case FetchProblem.UNREACHABLE | FetchProblem.BUSY:
                self._not_before_s = now_s + RETRY_S
            case FetchProblem.NOT_FOUND:
                self._end(EndingKind.WITHHELD, f"{what} withheld: {detail}")
            case FetchProblem.REFUSED:
                self._end(EndingKind.SILENT, f"{what} withheld: {detail}")
            case FetchProblem.BAD_BODY:
                self._end(EndingKind.FAILED, f"{what} is unusable: {detail}")

    def _fetch_evidence(self, url: str, now_s: float) -> list[Effect]:
        evidence = self._evidence
        effects: list[Effect] = []
        while evidence.todo and len(evidence.in_flight) < FETCHES_MAX:
            need = evidence.todo.pop(0)
            evidence.in_flight[need.request] = need
            # The others in flight share the link.
            timeout_s = self._attempt_s(FETCHES_MAX * self._body_bytes, now_s)
            effects.append(FetchEvidence(self.target.miner, url, need.request, need.direction, timeout_s))
        return effects

    def _task(self, url: str | None) -> ReplayTask:
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
        contribution = self._contribution if self._is_whole else None
        assert self._request is not None and self._log is not None
        return ReplayTask(
            target.miner,
            target.stage_index,
            target.outer_step,
            self._checkpoint,
            operations,
            LogProof(target.commitments, self._request, self._log),
            contribution,
            url,
        )

    def _set_deadline(self, size_bytes: int, now_s: float) -> None:
        """Time to transfer by the rule of every phase, and on top of it the time after which a miner that nobody can
        reach any more is taken for gone: who is cut off from everybody must not look as if it withheld something."""
        limits = self._spec.time_limits
        self._deadline_s = now_s + limits.member_s + limits.transfer_grace_s + self._transfer_s(size_bytes)

    def _attempt_s(self, size_bytes: int, now_s: float) -> float:
        """How long one request may take, so that a lost one can be repeated before the deadline."""
        limits = self._spec.time_limits
        attempt_s = (limits.member_s + limits.transfer_grace_s) / TRIES + self._transfer_s(size_bytes)
        return min(attempt_s, max(0.0, self._deadline_s - now_s))

    def _transfer_s(self, size_bytes: int) -> float:
        return size_bytes / self._spec.time_limits.bandwidth_floor_bytes_per_s

    def _end(self, kind: EndingKind, detail: str = "", num_operations: int = 0) -> None:
        self.phase = CheckPhase.ENDED
        self.ending = Ending(kind, detail, num_operations)
        self._evidence = _Evidence([])


def _log_bytes(request: LogRequest) -> int:
    """Generous bound on the answer as JSON."""
    num_nodes = PROOF_NODES_PER_SIZE * (len(request.sizes) + 1)
    entries_bytes = (request.stop - request.start) * LOG_ENTRY_BYTES_MAX
    return _MESSAGE_BYTES + entries_bytes + num_nodes * PROOF_NODE_BYTES


def _name(request: EvidenceRequest) -> str:
    return f"{request.side} of {request.operation} {request.microbatch_id}"
