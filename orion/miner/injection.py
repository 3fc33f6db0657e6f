"""How many microbatches a first-stage miner has in flight, and how many leases it keeps ahead. Pure; time comes in.

Owns the target and what it is computed from; must not know of messages or peers. Little's law: a pipeline that ends X
trips a second of which each takes T seconds has X × T in flight. Of T, every miner on the path tells how long the
microbatch only waited (for a device or for credits). What is left, T − W, is what the trip would take in an empty
pipeline, and X × (T − W) in flight would be enough to keep it busy if all times were the same. They are not, so the
target is `HEADROOM` times that: trips then wait about (HEADROOM − 1) × (T − W). More would only wait longer: no faster,
staler, and more to lose with a miner.

The estimate needs no probing and no memory of better days: a trip that began when n were in flight and took T says
X = n ÷ T itself. So the target follows at once when devices slow down (T − W grows as T does), when miners come (W
falls, so the target grows) or go (W grows, so it falls), and trips through replicas of unlike speed average out.

A peer that lies about how long it kept a trip waiting can move the target only within [one a stage, the credits], and
each miner bounds what it passes on by the time that it saw go by.
"""

import math
from dataclasses import dataclass

HEADROOM = 3.0
"""Target ÷ what an even pipeline would need. With paths drawn at random among replicas, 2 costs up to a tenth of the
throughput and 3 about a twentieth; `tests/miner/test_injection.py` tries it on pipelines of many shapes."""
GROWTH_MAX = 2.0
"""Of what was in flight, within one trip's time."""
LIMITED_SHARE = 0.75
"""Of the target that must have been in flight, or a trip says nothing about a pipeline at the target."""
LEASE_SHARE = 0.2
"""Weight of a new lease's time, and of a new interval between two starts."""
LEASE_MARGIN = 2.0
"""Times the measured wait for a lease that waiting leases must last."""


@dataclass(frozen=True, slots=True)
class TripTimes:
    """One trip that ended well, as the first stage saw it."""

    num_in_flight: float
    """Trips in flight while it was, itself included."""
    seconds: float
    """From the start of its forward to the end of its backward."""
    waited_s: float
    """Of these, in which nothing happened to it on any stage."""


class Injection:
    """The target of one first-stage miner."""

    def __init__(self, num_stages: int, credits: int) -> None:
        """Starts with one trip a stage, what a pipeline without latency would need."""
        self._credits = credits
        self._floor = float(min(num_stages, credits))
        self._target = self._floor
        self._lease_s = 0.0
        self._interval_s: float | None = None
        self._started_s: float | None = None

    @property
    def target(self) -> int:
        """Trips to have in flight: at least one, at most the credits."""
        return max(1, min(self._credits, math.ceil(self._target - 1e-9)))

    @property
    def num_ahead(self) -> int:
        """Leases to have waiting, so that the device never waits for one."""
        if self._interval_s is None:
            return 1
        return 1 + min(self._credits, math.ceil(LEASE_MARGIN * self._lease_s / max(self._interval_s, 1e-6)))

    def wanted(self, num_started: int, num_waiting: int) -> int:
        """How many microbatches to lease now; 0 while enough wait."""
        if num_waiting >= self.num_ahead and num_started + num_waiting >= self.target:
            return 0
        wanted = max(self.target - num_started, 0) + self.num_ahead
        return max(0, min(self._credits - num_started, wanted) - num_waiting)

    def started(self, now_s: float) -> None:
        """A trip's forward begins."""
        if self._started_s is not None:
            self._interval_s = _mean(self._interval_s, now_s - self._started_s)
        self._started_s = now_s

    def leased(self, seconds: float) -> None:
        """A lease came after that long."""
        self._lease_s = _mean(self._lease_s, seconds)

    def paused(self) -> None:
        """Nothing is started for a while (another phase): the next interval says nothing."""
        self._started_s = None

    def ended(self, trip: TripTimes) -> None:
        """Learns from a trip that ended well."""
        if trip.seconds <= 0.0:
            return
        busy_share = 1.0 - min(1.0, max(0.0, trip.waited_s / trip.seconds))
        wanted = min(HEADROOM * busy_share, GROWTH_MAX) * trip.num_in_flight
        if trip.num_in_flight < LIMITED_SHARE * self._target:
            # There was too little to do, as at the end of an outer step: this shows no need for less.
            return
        # As many trips as are in flight end in a trip's time.
        self._target += (wanted - self._target) / max(2.0, trip.num_in_flight)
        self._target = min(float(self._credits), max(self._floor, self._target))


def _mean(mean: float | None, value: float) -> float:
    return value if not mean else mean + LEASE_SHARE * (value - mean)
