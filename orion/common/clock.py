"""The one place that reads the machine's clocks. Pure code takes `now_s` as an argument instead."""

import time
from typing import Protocol


class Clock(Protocol):
    """What a shell needs of time."""

    def now_s(self) -> float:
        """Seconds since the Unix epoch; compared between machines, so it must be near true time."""
        ...

    def monotonic_s(self) -> float:
        """Seconds that never run backwards; for durations on one machine."""
        ...


class SystemClock:
    """The machine's own clocks."""

    def now_s(self) -> float:
        return time.time()

    def monotonic_s(self) -> float:
        return time.monotonic()


def process_cpu_s() -> float:
    """Seconds of processor time that this process has used, all its threads together; for benchmarks."""
    return time.process_time()
