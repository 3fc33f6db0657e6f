"""A pipeline as queues alone: devices, latencies and paths, in virtual time, to try `Injection` on thousands of trips.

Every stage has replicas with one device each; a device does backward before forward, oldest first. A trip takes the
less loaded of two replicas drawn for each next stage. Replicas change their speed, come and go as told.
"""

import heapq
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from random import Random

from orion.miner.injection import Injection, TripTimes

FORWARD_S, BACKWARD_S = 0.1, 0.2


@dataclass(eq=False)
class Trip:
    number: int
    path: list["Device"] = field(default_factory=list)
    begun_s: float = 0.0
    begun_in_flight: int = 0
    waited_s: float = 0.0


@dataclass(eq=False)
class Device:
    stage_index: int
    slowness: float = 1.0
    is_present: bool = True
    busy_s: float = 0.0
    is_busy: bool = False
    backwards: list[tuple[float, Trip]] = field(default_factory=list)
    forwards: list[tuple[float, Trip]] = field(default_factory=list)

    @property
    def load(self) -> float:
        return (len(self.backwards) + len(self.forwards) + self.is_busy + 1) * self.slowness


@dataclass(frozen=True)
class Ended:
    """One trip that came back."""

    time_s: float
    seconds: float
    source: int
    target: int


class Pipeline:
    """First-stage miners, each with its own injection, and the stages after them."""

    def __init__(
        self,
        num_stages: int,
        replicas: int,
        latency_s: float,
        make_injection: Callable[[int], Injection],
        *,
        spread: float = 0.2,
        seed: int = 1,
    ) -> None:
        self.rng = Random(seed)
        self.latency_s, self.spread = latency_s, spread
        self.stages = [[Device(stage) for _ in range(replicas)] for stage in range(num_stages)]
        self.injections = [make_injection(num_stages) for _ in range(replicas)]
        self.in_flight = [0] * replicas
        self.ended: list[Ended] = []
        self.now_s = 0.0
        self._heap: list[tuple[float, int, Callable[[], None]]] = []
        self._num = 0

    def at(self, time_s: float, action: Callable[[], None]) -> None:
        self._num += 1
        heapq.heappush(self._heap, (time_s, self._num, action))

    def run(self, until_s: float) -> Sequence[Ended]:
        for device in self.stages[0]:
            self._next(device)
        while self._heap and self._heap[0][0] <= until_s:
            self.now_s, _, action = heapq.heappop(self._heap)
            action()
        return self.ended

    def _next(self, device: Device) -> None:
        if device.is_busy:
            return
        is_backward = bool(device.backwards)
        if is_backward:
            queued_s, trip = device.backwards.pop(0)
            trip.waited_s += self.now_s - queued_s
            usual_s = BACKWARD_S
        elif device.stage_index == 0:
            source = self.stages[0].index(device)
            if not device.is_present or self.in_flight[source] >= self.injections[source].target:
                return
            self.in_flight[source] += 1
            self.injections[source].started(self.now_s)
            trip = Trip(self._num, [device], self.now_s, self.in_flight[source])
            usual_s = FORWARD_S
        elif device.forwards:
            queued_s, trip = device.forwards.pop(0)
            trip.waited_s += self.now_s - queued_s
            usual_s = FORWARD_S
        else:
            return
        if device.stage_index == len(self.stages) - 1:
            usual_s += BACKWARD_S
        device.is_busy = True
        seconds = usual_s * device.slowness * (1 + self.spread * self.rng.uniform(-1, 1))
        device.busy_s += seconds
        self.at(self.now_s + seconds, lambda: self._done(device, trip, is_backward))

    def _done(self, device: Device, trip: Trip, is_backward: bool) -> None:
        device.is_busy = False
        stage_index = device.stage_index
        if not is_backward and stage_index < len(self.stages) - 1:
            present = [peer for peer in self.stages[stage_index + 1] if peer.is_present]
            peer = min(self.rng.choices(present, k=2), key=lambda each: each.load)
            trip.path.append(peer)
            self.at(self.now_s + self.latency_s, lambda: self._arrive(peer.forwards, peer, trip))
        elif stage_index > 0:
            before = trip.path[stage_index - 1]
            self.at(self.now_s + self.latency_s, lambda: self._arrive(before.backwards, before, trip))
        else:
            self._end(device, trip)
        self._next(device)

    def _arrive(self, queue: list[tuple[float, Trip]], device: Device, trip: Trip) -> None:
        queue.append((self.now_s, trip))
        self._next(device)

    def _end(self, device: Device, trip: Trip) -> None:
        source = self.stages[0].index(device)
        injection = self.injections[source]
        num_in_flight = (trip.begun_in_flight + self.in_flight[source]) / 2
        self.in_flight[source] -= 1
        seconds = self.now_s - trip.begun_s
        injection.ended(TripTimes(num_in_flight, seconds, trip.waited_s))
        self.ended.append(Ended(self.now_s, seconds, source, injection.target))


class Constant(Injection):
    """The same number in flight, whatever happens."""

    def __init__(self, num: int, num_stages: int, credits: int = 1024) -> None:
        super().__init__(num_stages, credits)
        self._num = num

    @property
    def target(self) -> int:
        return self._num


def rate(ended: Sequence[Ended], begin_s: float, end_s: float) -> float:
    """Trips a second."""
    return sum(begin_s <= trip.time_s < end_s for trip in ended) / (end_s - begin_s)


def mean_seconds(ended: Sequence[Ended], begin_s: float, end_s: float) -> float:
    """Of a trip."""
    seconds = [trip.seconds for trip in ended if begin_s <= trip.time_s < end_s]
    return sum(seconds) / len(seconds)
