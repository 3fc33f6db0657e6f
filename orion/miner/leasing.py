"""When a first-stage miner asks for leases, and for how many.

Owns the one request that may be on its way, and when the next is due. Must not decide how many microbatches the
pipeline needs (`injection`) or what becomes of those that are leased (`flow`).
"""

from collections.abc import Sequence

from orion.common.ids import MicrobatchId
from orion.common.protocol.messages import LeasedMicrobatch, LeaseRequest
from orion.miner.effects import RequestLease
from orion.miner.events import LeaseGranted, LeaseRefused
from orion.miner.flow import Flow
from orion.miner.injection import Injection
from orion.miner.moment import Emit, Moment
from orion.miner.reports import Reports
from orion.miner.table import MicrobatchTable, Stand

LEASE_RETRY_S = 0.5
"""After a refusal without a hint."""
LEASE_RETRY_MAX_S = 2.0
"""Longest that a hint is followed: a cancelled trip's data may be leased again any time."""
LEASES_MAX = 256
"""In one request."""


class Leasing:
    """The leases of one miner."""

    def __init__(
        self, *, table: MicrobatchTable, injection: Injection, reports: Reports, flow: Flow, emit: Emit
    ) -> None:
        self._table = table
        self._injection = injection
        self._reports = reports
        self._flow = flow
        self._emit = emit
        self._is_asking = False
        self._asked_s = 0.0
        self._due_s = 0.0
        self._next_microbatch_id = MicrobatchId(0)
        """Lowest id that was not leased to us yet."""

    def begin(self, now_s: float) -> None:
        """Work for an outer step begins: a hint to wait was for the one before."""
        self._due_s = now_s

    def ended(self, moment: Moment, event: LeaseGranted | LeaseRefused) -> None:
        """The request was answered."""
        self._is_asking = False
        if isinstance(event, LeaseGranted):
            self._next_microbatch_id = max(self._next_microbatch_id, _after(event.lease.microbatches))
            self._injection.leased(moment.now_s - self._asked_s)
            self._flow.leased(moment, event.lease)
            return
        hint_s = LEASE_RETRY_S if event.retry_after_s is None else event.retry_after_s
        self._due_s = moment.now_s + min(hint_s, LEASE_RETRY_MAX_S)

    def advance(self, moment: Moment) -> None:
        """A first-stage miner has leases waiting before its device needs them, within its credits."""
        view = moment.view
        if view is None or moment.outer_step is None or view.stage_index != 0 or self._is_asking:
            return
        if moment.now_s < self._due_s or self._reports.has_backlog or not view.all_train(moment.outer_step):
            return
        num_waiting = len(self._table.standing(Stand.FORWARD_QUEUED))
        num_wanted = min(self._table.room, self._injection.wanted(self._table.num_started, num_waiting))
        if num_wanted < 1:
            return
        self._is_asking, self._asked_s = True, moment.now_s
        request = LeaseRequest(
            outer_step=moment.outer_step,
            next_microbatch_id=self._next_microbatch_id,
            num_microbatches=min(num_wanted, LEASES_MAX),
        )
        self._emit(RequestLease(request))

    def wake_times_s(self) -> list[float]:
        """When the next request may be due; times that have passed mean nothing."""
        return [self._due_s]


def _after(leased: Sequence[LeasedMicrobatch]) -> MicrobatchId:
    return MicrobatchId(max(granted.microbatch_id for granted in leased) + 1)
