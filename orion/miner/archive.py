"""What a miner must still have when it is asked about its commitments: logs, and the tensors that they name.

Owns the seam between the miner and where that lies, and the rule of the budget. Two implementations pass one contract:
`memory_archive.MemoryArchive` for the simulator and
tests, and `disk_archive.DiskArchive`.

The device hands in tensors (`begin`, `add`), which costs it a lock and nothing else. `persist` writes them behind it,
together with the log's new entries and the commitment over them: after it they outlive the process. So what an archive
holds of a log always ends with a commitment; whatever was done later is lost with the process, and was not claimed.

Invariants: nothing is handed out that no commitment covers; of each log the tensors of a prefix are kept, because one
with a hole proves nothing; bytes are bounded by the budget, outer steps by `OUTER_STEPS_KEPT`.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from orion.common.ids import MicrobatchId, Operation
from orion.common.protocol.codec import Body
from orion.common.protocol.messages import Commitment
from orion.common.protocol.records import EvidenceRequest, LogEntry

OUTER_STEPS_KEPT = 4
"""The one under way and the three before it. Validators ask about what was committed last, while the next one runs."""


@dataclass(frozen=True, slots=True)
class KeptLog:
    """What an archive holds of one outer step."""

    stage_index: int
    entries: tuple[LogEntry, ...]
    commitment: Commitment
    """Over all of them; the newest."""


class Evidence(Protocol):
    """Where the device puts the tensors of its operations."""

    def begin(self, outer_step: int) -> None:
        """The next operation is the first on an anchor of that outer step."""
        ...

    def add(
        self,
        outer_step: int,
        operation: Operation,
        microbatch_id: MicrobatchId | None = None,
        *,
        came_in: Body | None = None,
        went_out: Body | None = None,
    ) -> None:
        """The next operation of the log, with its bodies as far as it has any."""
        ...

    def keep_error(self, outer_step: int, body: Body) -> None:
        """Makes the error state after the upload of an outer step durable. Raises DataError when it cannot be."""
        ...

    def error(self, outer_step: int) -> bytes | None:
        """That error state; None when it is not kept (any more). It is handed out by `error_request` too."""
        ...


class Archive(Evidence, Protocol):
    """Logs and tensors of the newest outer steps. Called from several threads."""

    def persist(self, stage_index: int, entries: Sequence[LogEntry], commitment: Commitment) -> Commitment:
        """Makes durable the new `entries` of the log that `commitment` is over, and all tensors handed in so far.

        Gives the commitment with the number of entries whose tensors are kept. One call at a time. Raises DataError
        when it cannot be written.
        """
        ...

    def get(self, request: EvidenceRequest) -> bytes | None:
        """A durable body; None when it is not kept (any more)."""
        ...

    def kept(self) -> tuple[KeptLog, ...]:
        """The logs that were there when the archive was opened, in order of outer steps."""
        ...


@dataclass(slots=True)
class Account:
    """What is kept of one outer step."""

    num_operations: int = 0
    """Handed in, kept or not."""
    num_kept: int = 0
    """Leading operations all of whose tensors are kept."""
    size_bytes: int = 0

    def take(self, size_bytes: int, bytes_max: int) -> bool:
        """Counts the next operation; whether its tensors are kept. After the first that is not none is."""
        is_kept = self.num_kept == self.num_operations and self.size_bytes + size_bytes <= bytes_max
        self.num_operations += 1
        if is_kept:
            self.num_kept += 1
            self.size_bytes += size_bytes
        return is_kept


def evidence_request(outer_step: int, microbatch_id: MicrobatchId, operation: Operation, side: str) -> EvidenceRequest:
    """The name of a body; `side` is "input" or "output"."""
    return EvidenceRequest.model_validate(
        {"outer_step": outer_step, "microbatch_id": microbatch_id, "operation": operation, "side": side}
    )


def error_request(outer_step: int) -> EvidenceRequest:
    """The name of the error state after the upload of an outer step."""
    return EvidenceRequest(
        outer_step=outer_step, microbatch_id=MicrobatchId(0), operation=Operation.ENCODE, side="output"
    )


def sides_of(came_in: Body | None, went_out: Body | None) -> dict[str, Body]:
    """The bodies that an operation has, by side."""
    return {side: body for side, body in (("input", came_in), ("output", went_out)) if body is not None}


def requests_of(outer_step: int, entry: LogEntry) -> tuple[EvidenceRequest, ...]:
    """The bodies that an entry of a log names."""
    if entry.microbatch_id is None:
        return ()
    sides = (("input", entry.input_digest), ("output", entry.output_digest))
    return tuple(
        evidence_request(outer_step, entry.microbatch_id, entry.operation, side)
        for side, digest in sides
        if digest is not None
    )


def account_of(log: KeptLog, sizes_bytes: Mapping[EvidenceRequest, int]) -> Account:
    """The account of a log that was found again, with the bodies that were found with it."""
    account = Account(num_operations=len(log.entries))
    for entry in log.entries:
        requests = requests_of(log.commitment.outer_step, entry)
        if not all(request in sizes_bytes for request in requests):
            break
        account.num_kept += 1
        account.size_bytes += sum(sizes_bytes[request] for request in requests)
    return account


def outdated(outer_steps: Iterable[int]) -> list[int]:
    """Those of some outer steps that are too old to be kept."""
    return sorted(set(outer_steps))[:-OUTER_STEPS_KEPT]
