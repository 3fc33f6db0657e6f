"""An archive without a disk, for the simulator and tests. Owns nothing but what it was given to keep."""

from collections.abc import Sequence
from dataclasses import dataclass, field

from orion.common.ids import MicrobatchId, Operation
from orion.common.protocol.codec import Body
from orion.common.protocol.messages import Commitment
from orion.common.protocol.records import EvidenceRequest, LogEntry
from orion.miner.archive import KeptLog, account_of, outdated, sides_of
from orion.miner.intake import Intake


@dataclass(slots=True)
class _Durable:
    stage_index: int
    entries: list[LogEntry] = field(default_factory=list)
    commitment: Commitment | None = None
    bodies: dict[EvidenceRequest, bytes] = field(default_factory=dict)


@dataclass(slots=True)
class MemoryDisk:
    """What outlives a simulated process."""

    steps: dict[int, _Durable] = field(default_factory=dict)
    errors: dict[int, bytes] = field(default_factory=dict)
    """Error states by outer step."""


class MemoryArchive:
    """An archive that writes to a `MemoryDisk`. A new one over the same disk is what a new process finds."""

    def __init__(self, disk: MemoryDisk, bytes_max: int) -> None:
        self._disk = disk
        self._kept = tuple(
            KeptLog(step.stage_index, tuple(step.entries), step.commitment)
            for _, step in sorted(disk.steps.items())
            if step.commitment is not None
        )
        accounts = {}
        for log in self._kept:
            bodies = disk.steps[log.commitment.outer_step].bodies
            sizes_bytes = {request: len(body) for request, body in bodies.items()}
            accounts[log.commitment.outer_step] = account_of(log, sizes_bytes)
        self._intake = Intake(bytes_max, accounts)

    def begin(self, outer_step: int) -> None:
        self._intake.begin(outer_step)

    def add(
        self,
        outer_step: int,
        operation: Operation,
        microbatch_id: MicrobatchId | None = None,
        *,
        came_in: Body | None = None,
        went_out: Body | None = None,
    ) -> None:
        self._intake.add(outer_step, operation, microbatch_id, sides_of(came_in, went_out))

    def persist(self, stage_index: int, entries: Sequence[LogEntry], commitment: Commitment) -> Commitment:
        commitment = self._intake.with_num_kept(commitment)
        steps = self._disk.steps
        for request, body in self._intake.take().items():
            steps.setdefault(request.outer_step, _Durable(stage_index)).bodies[request] = body.tobytes()
        step = steps.setdefault(commitment.outer_step, _Durable(stage_index))
        step.stage_index = stage_index
        step.entries.extend(entries)
        step.commitment = commitment
        for old in outdated(steps):
            del steps[old]
        return commitment

    def keep_error(self, outer_step: int, body: Body) -> None:
        self._disk.errors[outer_step] = body.tobytes()
        for old in outdated(self._disk.errors):
            del self._disk.errors[old]

    def error(self, outer_step: int) -> bytes | None:
        return self._disk.errors.get(outer_step)

    def get(self, request: EvidenceRequest) -> bytes | None:
        if request.operation is Operation.ENCODE:
            return self.error(request.outer_step)
        step = self._disk.steps.get(request.outer_step)
        return None if step is None else step.bodies.get(request)

    def kept(self) -> tuple[KeptLog, ...]:
        return self._kept
