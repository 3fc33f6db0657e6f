"""Who may start which microbatch, and how each trip ended.

Owns the counters of microbatch and data ids, the share of the outer step, and every trip of the outer steps that are
kept. Knows nothing of members or phases. Invariants: a microbatch id is given out once; a data id is on one live trip
at most, and on `DATA_TRIPS_MAX` in all; a trip ends once, applied or cancelled with a reason; started = applied +
cancelled + live.
"""

from collections import deque
from dataclasses import dataclass, field

from orion.common.ids import DataId, Hotkey, MicrobatchId, Outcome

DATA_TRIPS_MAX = 3
"""Trips of one data id before it is given up; tokens that fail three times are not worth holding a phase for."""

REPORT_SLACK_S = 5.0
"""How long after a lease's deadline its end may still be reported. Miners report in batches every second or so."""


@dataclass(slots=True)
class Trip:
    """One leased microbatch."""

    microbatch_id: MicrobatchId
    data_id: DataId
    outer_step: int
    lessee: Hotkey
    attempt: int
    """1 for the first trip of its data id."""
    deadline_s: float
    outcome: Outcome | None = None
    reason: str = ""


@dataclass(slots=True)
class LeaseBook:
    """All leases of the run."""

    outer_step: int = 0
    is_open: bool = False
    """Whether microbatches of `outer_step` may be leased."""
    num_fresh: int = 0
    """Microbatches of the share that were never leased."""
    retries: deque[tuple[DataId, int]] = field(default_factory=deque)
    """Data ids whose trip was cancelled, and how many trips they have had."""
    next_microbatch_id: int = 0
    next_data_id: int = 0
    first_data_ids: dict[int, DataId] = field(default_factory=dict)
    """By outer step: the lowest data id that had not been leased when it began."""
    live: dict[MicrobatchId, Trip] = field(default_factory=dict)
    num_live_of: dict[Hotkey, int] = field(default_factory=dict)
    newest_of: dict[Hotkey, MicrobatchId] = field(default_factory=dict)
    """The highest id that each has leased in this outer step."""
    trips: dict[int, dict[MicrobatchId, Trip]] = field(default_factory=dict)
    """By outer step, the ended ones too."""
    lessees: dict[int, dict[Hotkey, int]] = field(default_factory=dict)
    """By outer step: how many trips each has leased."""
    num_started: int = 0
    num_applied: int = 0
    num_cancelled: int = 0
    num_released: int = 0
    """Trips whose data id was on another one before, which was cancelled."""

    def open(self, outer_step: int, share: int) -> None:
        """Puts the share of an outer step up for lease."""
        self.outer_step, self.num_fresh, self.is_open = outer_step, share, True
        self.trips[outer_step] = {}
        self.lessees[outer_step] = {}
        self.newest_of = {}

    def close(self) -> None:
        """Nothing more is leased in this outer step; trips that are live may still end."""
        self.is_open, self.num_fresh = False, 0
        self.retries.clear()
        self.first_data_ids[self.outer_step + 1] = DataId(self.next_data_id)

    @property
    def has_work(self) -> bool:
        """Whether a lease could be given now."""
        return self.num_fresh > 0 or bool(self.retries)

    @property
    def all_ended(self) -> bool:
        """Whether every trip of the share has ended, and none is to come."""
        return not self.has_work and not self.live

    def lease(self, lessee: Hotkey, num_microbatches: int, deadline_s: float) -> list[Trip]:
        """Starts up to that many trips, cancelled data ids first."""
        leased: list[Trip] = []
        while len(leased) < num_microbatches and self.has_work:
            data_id, num_trips = self.retries.popleft() if self.retries else (self._fresh_data_id(), 0)
            microbatch_id = MicrobatchId(self.next_microbatch_id)
            self.next_microbatch_id += 1
            leased.append(Trip(microbatch_id, data_id, self.outer_step, lessee, num_trips + 1, deadline_s))
        for trip in leased:
            self.live[trip.microbatch_id] = trip
            self.trips[trip.outer_step][trip.microbatch_id] = trip
        if leased:
            self.num_live_of[lessee] = self.num_live_of.get(lessee, 0) + len(leased)
            lessees = self.lessees[self.outer_step]
            lessees[lessee] = lessees.get(lessee, 0) + len(leased)
            self.newest_of[lessee] = leased[-1].microbatch_id
        self.num_started += len(leased)
        self.num_released += sum(trip.attempt > 1 for trip in leased)
        return leased

    def leased_from(self, lessee: Hotkey, first: MicrobatchId) -> list[Trip]:
        """Live trips of this outer step that a miner has leased, from that id on, oldest first."""
        if self.newest_of.get(lessee, -1) < first:
            return []
        return [
            trip
            for trip in self.live.values()
            if trip.lessee == lessee and trip.outer_step == self.outer_step and trip.microbatch_id >= first
        ]

    def end(self, trip: Trip, outcome: Outcome, reason: str) -> None:
        """Ends a live trip. A cancelled one's data id is leased again while the share is open, unless it had enough."""
        del self.live[trip.microbatch_id]
        self.num_live_of[trip.lessee] -= 1
        if self.num_live_of[trip.lessee] == 0:
            del self.num_live_of[trip.lessee]
        trip.outcome, trip.reason = outcome, reason
        if outcome is Outcome.APPLIED:
            self.num_applied += 1
            return
        self.num_cancelled += 1
        if self.is_open and trip.outer_step == self.outer_step and trip.attempt < DATA_TRIPS_MAX:
            self.retries.append((trip.data_id, trip.attempt))

    def live_trips_of(self, lessee: Hotkey) -> list[Trip]:
        return [trip for trip in self.live.values() if trip.lessee == lessee]

    def live_trips_in(self, outer_step: int) -> list[Trip]:
        return [trip for trip in self.live.values() if trip.outer_step == outer_step]

    def has_leased(self, outer_step: int, lessee: Hotkey) -> bool:
        """Whether a miner took any lease in an outer step."""
        return lessee in self.lessees.get(outer_step, {})

    def overdue(self, now_s: float) -> list[Trip]:
        """Live trips whose end should have been reported."""
        return [trip for trip in self.live.values() if now_s >= trip.deadline_s + REPORT_SLACK_S]

    def forget_before(self, outer_step: int) -> None:
        """Drops the trips of older outer steps."""
        for old in [step for step in self.trips if step < outer_step]:
            del self.trips[old]
            del self.lessees[old]
        for old in [step for step in self.first_data_ids if step < outer_step]:
            del self.first_data_ids[old]

    def _fresh_data_id(self) -> DataId:
        data_id = DataId(self.next_data_id)
        self.next_data_id += 1
        self.num_fresh -= 1
        return data_id
