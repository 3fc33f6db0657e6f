"""Between the device and an archive's writer: what was handed in and nobody has written yet.

Owns the accounts of what is kept of each outer step, and so the budget. Shared by the device's thread and the writer's;
neither waits for the other longer than a lock takes. What waits here is bounded by the budget too.
"""

import threading
from collections.abc import Mapping

from orion.common.ids import MicrobatchId, Operation
from orion.common.protocol.codec import Body
from orion.common.protocol.messages import Commitment
from orion.common.protocol.records import EvidenceRequest
from orion.miner.archive import OUTER_STEPS_KEPT, Account, evidence_request


class Intake:
    """What the device has handed in and nobody has written yet, and the accounts of all that is kept."""

    def __init__(self, bytes_max: int, accounts: Mapping[int, Account]) -> None:
        """`bytes_max` is shared evenly by the outer steps that are kept; `accounts` are those of earlier processes."""
        self._step_bytes_max = bytes_max // OUTER_STEPS_KEPT
        self._accounts = dict(accounts)
        self._waiting: dict[EvidenceRequest, Body] = {}
        self._lock = threading.Lock()

    def begin(self, outer_step: int) -> None:
        with self._lock:
            account = self._accounts.setdefault(outer_step, Account())
            if account.num_operations:
                account.take(0, self._step_bytes_max)  # the log says that it begins anew
            for old in sorted(self._accounts)[:-OUTER_STEPS_KEPT]:
                del self._accounts[old]
            self._waiting = {
                request: body for request, body in self._waiting.items() if request.outer_step in self._accounts
            }

    def add(
        self, outer_step: int, operation: Operation, microbatch_id: MicrobatchId | None, sides: Mapping[str, Body]
    ) -> None:
        """`sides`: the bodies by the side of `EvidenceRequest`."""
        with self._lock:
            size_bytes = sum(body.size_bytes for body in sides.values())
            is_kept = self._accounts[outer_step].take(size_bytes, self._step_bytes_max)
            if not is_kept or microbatch_id is None:
                return
            for side, body in sides.items():
                self._waiting[evidence_request(outer_step, microbatch_id, operation, side)] = body

    def take(self) -> dict[EvidenceRequest, Body]:
        """All that waits, in the order of the device; it waits no more."""
        with self._lock:
            taken, self._waiting = self._waiting, {}
            return taken

    def with_num_kept(self, commitment: Commitment) -> Commitment:
        """The commitment with the number of its entries whose tensors are kept."""
        with self._lock:
            account = self._accounts.get(commitment.outer_step, Account())
            return commitment.model_copy(update={"num_kept": min(account.num_kept, commitment.num_entries)})
