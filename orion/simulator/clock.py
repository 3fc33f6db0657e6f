"""Virtual time: a clock that only moves when the next event is due, and the heap of what is still to happen.

It owns the order of events and nothing else; it knows no hosts, messages or cores. Invariants: time never runs
backwards; of two events at the same time the one scheduled first happens first, so a run is a pure function of its
seed.
"""

import heapq
from collections.abc import Callable

EPOCH_S = 1_000_000.0
"""Virtual time at which every simulation starts, in seconds; small, so that floats keep nanoseconds."""


class Timer:
    """Something that is due; whoever scheduled it may call it off."""

    __slots__ = ("action", "at_s")

    def __init__(self, at_s: float, action: Callable[[], None]) -> None:
        self.at_s = at_s
        self.action: Callable[[], None] | None = action

    def cancel(self) -> None:
        """It will not happen. Calling it off again, or after it happened, changes nothing."""
        self.action = None


class VirtualClock:
    """A `Clock` that jumps from event to event, and the heap of these events."""

    def __init__(self, start_s: float = EPOCH_S) -> None:
        self._start_s = start_s
        self._now_s = start_s
        self._heap: list[tuple[float, int, Timer]] = []
        # Tuples, because they are compared without running any of our own code; no two have the same number.
        self._num_scheduled = 0

    def now_s(self) -> float:
        """Virtual seconds since the Unix epoch."""
        return self._now_s

    def monotonic_s(self) -> float:
        """Virtual seconds since the simulation began."""
        return self._now_s - self._start_s

    def schedule(self, delay_s: float, action: Callable[[], None]) -> Timer:
        """`action` happens `delay_s` ≥ 0 seconds from now."""
        assert delay_s >= 0.0, f"an event {delay_s} s ago"
        return self.schedule_at(self._now_s + delay_s, action)

    def schedule_at(self, at_s: float, action: Callable[[], None]) -> Timer:
        """`action` happens at that virtual time, or at once if it has passed."""
        timer = Timer(max(at_s, self._now_s), action)
        heapq.heappush(self._heap, (timer.at_s, self._num_scheduled, timer))
        self._num_scheduled += 1
        return timer

    def step(self) -> bool:
        """Moves to the next event and lets it happen; False when nothing is left."""
        while self._heap:
            _, _, timer = heapq.heappop(self._heap)
            action = timer.action
            if action is None:
                continue
            self._now_s = timer.at_s
            timer.action = None
            action()
            return True
        return False
