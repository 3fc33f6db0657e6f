"""Which parts of a transfer are sent when, again, or twice at a time. Pure: times are arguments, effects are returned.

The same for uploads and downloads. Invariants: a part that is there is never sent again; of each part at most two
attempts are under way, and of all parts at most `in_flight_max`, second tries apart, of which there is one at a time;
after `ATTEMPTS_MAX` failures of one part the plan has failed.

Events: `started` and then `moved`, `failed` for each attempt; `looked` when `next_look_s` has come.
"""

from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field
from statistics import median

ATTEMPTS_MAX = 5
"""Failures of one part until the transfer has failed; whoever asked for it may begin again, where it stands."""
HEDGE_FACTOR = 3.0
"""A part that takes so many times the median is tried a second time beside the first."""
HEDGE_MIN_S = 1.0
"""No second try before: what is that quick needs none."""
HEDGE_UNKNOWN_S = 20.0
"""Where no part has been moved yet to compare with."""
_BACKOFF_S = 0.25
_BACKOFF_MAX_S = 5.0
_REMEMBERED = 64
_MEDIAN_OF_MIN = 3
_SAME_SIZE = 0.5
"""Parts from half to twice the size are compared: what a small one takes is mostly a round trip."""


@dataclass(frozen=True, slots=True)
class SendPart:
    """Begin an attempt at a part, after a delay."""

    index: int
    attempt: int
    delay_s: float = 0.0
    is_hedge: bool = False


@dataclass(frozen=True, slots=True)
class StopPart:
    """Give an attempt up; no event comes of it any more."""

    index: int
    attempt: int


Effect = SendPart | StopPart


class Pace:
    """What parts have taken lately, over all transfers in one direction."""

    def __init__(self) -> None:
        self._taken: deque[tuple[int, float]] = deque(maxlen=_REMEMBERED)

    def add(self, size_bytes: int, seconds: float) -> None:
        self._taken.append((size_bytes, seconds))

    def slow_after_s(self, size_bytes: int) -> float:
        """How long a part of this size may take before it is slow."""
        alike = [
            seconds
            for size, seconds in self._taken
            if size * _SAME_SIZE <= size_bytes and size_bytes * _SAME_SIZE <= size
        ]
        if len(alike) < _MEDIAN_OF_MIN:
            return HEDGE_UNKNOWN_S
        return max(HEDGE_MIN_S, HEDGE_FACTOR * median(alike))


@dataclass(slots=True)
class _Part:
    size_bytes: int
    attempts: dict[int, float | None] = field(default_factory=dict)
    """When each attempt under way began; None: it waits to."""
    num_begun: int = 0
    num_failed: int = 0
    hedge: int | None = None
    """Number of the second try, once there was one: a part has no third."""


class PartPlan:
    """One transfer of parts, by index."""

    def __init__(self, sizes: Mapping[int, int], pace: Pace, in_flight_max: int) -> None:
        """`sizes` in bytes, of the parts that are not there yet."""
        self._parts = {index: _Part(size) for index, size in sizes.items()}
        self._waiting = deque(sizes)
        self._pace = pace
        self._in_flight_max = in_flight_max
        self.num_hedged = 0
        """Second tries that were begun."""
        self.has_failed = False

    @property
    def is_done(self) -> bool:
        """Every part is there."""
        return not self._parts

    def begin(self) -> list[Effect]:
        """The first parts."""
        return self._fill()

    def started(self, index: int, attempt: int, now_s: float) -> None:
        """An attempt has begun to move bytes; until then its time does not run."""
        part = self._parts.get(index)
        if part is not None and attempt in part.attempts:
            part.attempts[attempt] = now_s

    def moved(self, index: int, attempt: int, now_s: float) -> list[Effect]:
        """A part is there. Anything but an attempt under way changes nothing."""
        part = self._parts.get(index)
        if part is None or attempt not in part.attempts:
            return []
        began_s = part.attempts.pop(attempt)
        if began_s is not None:
            self._pace.add(part.size_bytes, now_s - began_s)
        del self._parts[index]
        stopped: list[Effect] = [StopPart(index, other) for other in part.attempts]
        return stopped + self._fill()

    def failed(self, index: int, attempt: int) -> list[Effect]:
        """An attempt came to nothing."""
        part = self._parts.get(index)
        if part is None or attempt not in part.attempts:
            return []
        del part.attempts[attempt]
        part.num_failed += 1
        if part.num_failed >= ATTEMPTS_MAX:
            self.has_failed = True
            return []
        if part.attempts:
            return []  # the other try goes on
        return [self._send(index, part, min(_BACKOFF_S * 2 ** (part.num_failed - 1), _BACKOFF_MAX_S))]

    def next_look_s(self) -> float | None:
        """When `looked` is due next; None: not before another event."""
        if self._is_hedging():
            return None
        due = [self._slow_at_s(part) for part in self._parts.values()]
        return min((at_s for at_s in due if at_s is not None), default=None)

    def looked(self, now_s: float) -> list[Effect]:
        """Has the slowest part tried a second time, if one is slow."""
        if self._is_hedging():
            return []
        slow = [
            (at_s, index)
            for index, part in self._parts.items()
            if (at_s := self._slow_at_s(part)) is not None and at_s <= now_s
        ]
        if not slow:
            return []
        _, index = min(slow)
        part = self._parts[index]
        effect = self._send(index, part, is_hedge=True)
        part.hedge = effect.attempt
        self.num_hedged += 1
        return [effect]

    def check_invariants(self) -> None:
        """Raises AssertionError when anything is as it must never be."""
        counts = [len(part.attempts) for part in self._parts.values()]
        assert all(count <= 2 for count in counts), "a part is tried three times at once"
        assert sum(count == 2 for count in counts) <= 1, "two parts are tried twice at once"
        assert sum(count > 0 for count in counts) <= self._in_flight_max, "too many parts are under way"
        assert all(not self._parts[index].attempts for index in self._waiting), "a part waits and is under way"
        under_way = [index for index, part in self._parts.items() if part.attempts]
        assert self.has_failed or sorted([*under_way, *self._waiting]) == sorted(self._parts), "a part is forgotten"

    def _fill(self) -> list[Effect]:
        effects: list[Effect] = []
        num_under_way = sum(bool(part.attempts) for part in self._parts.values())
        while self._waiting and num_under_way < self._in_flight_max:
            index = self._waiting.popleft()
            effects.append(self._send(index, self._parts[index]))
            num_under_way += 1
        return effects

    def _send(self, index: int, part: _Part, delay_s: float = 0.0, is_hedge: bool = False) -> SendPart:
        attempt = part.num_begun
        part.num_begun += 1
        part.attempts[attempt] = None
        return SendPart(index, attempt, delay_s, is_hedge)

    def _is_hedging(self) -> bool:
        return any(len(part.attempts) > 1 for part in self._parts.values())

    def _slow_at_s(self, part: _Part) -> float | None:
        """When a part is slow that may be tried a second time."""
        if part.hedge is not None or len(part.attempts) != 1:
            return None
        (began_s,) = part.attempts.values()
        return None if began_s is None else began_s + self._pace.slow_after_s(part.size_bytes)
