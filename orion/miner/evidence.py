"""Bodies that validators may ask for: what went into and came out of the first operations of each outer step.

A validator replays a prefix of the log of at most `validation.replay_ops_max` operations, so nothing beyond that needs
keeping. Bounded in outer steps, operations and bytes; when the bytes do not suffice, the newest operation is not kept,
because a prefix with a hole proves nothing. Shared by the event loop's thread and the device's.
"""

import threading
from dataclasses import dataclass, field

from orion.common.ids import MicrobatchId, Operation
from orion.common.protocol.codec import Body
from orion.common.protocol.records import EvidenceRequest
from orion.miner.oplog import OUTER_STEPS_KEPT


@dataclass(slots=True)
class _Step:
    num_operations: int = 0
    """Logged so far, kept or not."""
    size_bytes: int = 0
    is_full: bool = False
    bodies: dict[EvidenceRequest, Body] = field(default_factory=dict)


class EvidenceStore:
    """The evidence of the outer step under way and the ones before it."""

    def __init__(self, operations_max: int, bytes_max: int) -> None:
        """`bytes_max` is shared evenly by the outer steps that are kept."""
        self._operations_max = operations_max
        self._step_bytes_max = bytes_max // OUTER_STEPS_KEPT
        self._steps: dict[int, _Step] = {}
        self._lock = threading.Lock()

    def begin(self, outer_step: int) -> None:
        """Starts anew for an outer step and forgets what is too old."""
        with self._lock:
            self._steps[outer_step] = _Step()
            for old in sorted(self._steps)[:-OUTER_STEPS_KEPT]:
                del self._steps[old]

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
        with self._lock:
            step = self._steps[outer_step]
            step.num_operations += 1
            size_bytes = sum(body.size_bytes for body in (came_in, went_out) if body is not None)
            step.is_full = step.is_full or step.size_bytes + size_bytes > self._step_bytes_max
            if microbatch_id is None or step.is_full or step.num_operations > self._operations_max:
                return
            step.size_bytes += size_bytes
            if came_in is not None:
                request = EvidenceRequest(
                    outer_step=outer_step, microbatch_id=microbatch_id, operation=operation, side="input"
                )
                step.bodies[request] = came_in
            if went_out is not None:
                request = EvidenceRequest(
                    outer_step=outer_step, microbatch_id=microbatch_id, operation=operation, side="output"
                )
                step.bodies[request] = went_out

    def get(self, request: EvidenceRequest) -> Body | None:
        """The body, None when it was not kept."""
        with self._lock:
            step = self._steps.get(request.outer_step)
            return None if step is None else step.bodies.get(request)
