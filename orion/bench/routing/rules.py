"""The routing rules that are compared, each as one sender's knowledge of the next stage.

`Rule` is what a sender asks and tells: the very methods of the production router, which is therefore a rule as it is.
A rule knows what its own miner could know: how its own attempts went, what answers said, when gradients came back; and,
if it listens to it, the status that miners send their neighbours. Pure: time and randomness come in.
"""

import heapq
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from random import Random
from typing import Protocol, runtime_checkable

from orion.common.ids import Hotkey
from orion.miner.router import Router

STATUS_PERIOD_S = 5.0
"""Between two broadcasts of a miner's status."""


class Rule(Protocol):
    """One sender's choice among the replicas of the next stage."""

    def keep_only(self, peers: Iterable[Hotkey]) -> None:
        """These are the members of the next stage now."""

    def choose(self, candidates: Sequence[Hotkey], now_s: float) -> Hotkey | None:
        """Whom to send to; None: to nobody now, see `next_usable_s`."""

    def next_usable_s(self, candidates: Sequence[Hotkey]) -> float | None:
        """When to ask again after None."""

    def sent(self, peer: Hotkey) -> None:
        """An activation goes there."""

    def accepted(self, peer: Hotkey, now_s: float, queued: int, credits: int) -> None:
        """The peer took it and told how many passes wait there and how many more it has room for."""

    def failed(self, peer: Hotkey, now_s: float) -> None:
        """The peer was not reached."""

    def completed(self, peer: Hotkey, sent_s: float, now_s: float) -> None:
        """The gradient of what was sent at `sent_s` has come back."""

    def lost(self, peer: Hotkey, sent_s: float, now_s: float) -> None:
        """What the peer accepted was given up: no gradient came in time."""

    def released(self, peer: Hotkey) -> None:
        """What was sent there is no longer in flight, however it ended."""


@dataclass(frozen=True, slots=True)
class Status:
    """What a miner tells its neighbours about itself."""

    free: int
    """Places left in its cache."""
    forward_queue: int


@runtime_checkable
class Listener(Protocol):
    """A rule that uses the status which miners broadcast to the stage before them."""

    def told(self, peer: Hotkey, status: Status) -> None:
        """A peer's broadcast has arrived."""


class _Deaf:
    """Ignores whatever a sender could learn."""

    def keep_only(self, peers: Iterable[Hotkey]) -> None: ...

    def next_usable_s(self, candidates: Sequence[Hotkey]) -> float | None:
        return None

    def sent(self, peer: Hotkey) -> None: ...

    def accepted(self, peer: Hotkey, now_s: float, queued: int, credits: int) -> None: ...

    def failed(self, peer: Hotkey, now_s: float) -> None: ...

    def completed(self, peer: Hotkey, sent_s: float, now_s: float) -> None: ...

    def lost(self, peer: Hotkey, sent_s: float, now_s: float) -> None: ...

    def released(self, peer: Hotkey) -> None: ...


class Uniform(_Deaf):
    """Any replica, evenly: the competition's baseline."""

    def __init__(self, rng: Random) -> None:
        self._rng = rng

    def choose(self, candidates: Sequence[Hotkey], now_s: float) -> Hotkey | None:
        """Any of them."""
        return self._rng.choice(candidates) if candidates else None


class LogCapacity(_Deaf):
    """IOTA's rule: at random with weight ln(free places) + 1 / (1 + forward queue), from the last broadcast; evenly
    when nobody has a weight."""

    def __init__(self, rng: Random) -> None:
        self._rng = rng
        self._statuses: dict[Hotkey, Status] = {}

    def told(self, peer: Hotkey, status: Status) -> None:
        """Keeps the newest."""
        self._statuses[peer] = status

    def choose(self, candidates: Sequence[Hotkey], now_s: float) -> Hotkey | None:
        """One of those with free places, if their status is known."""
        if not candidates:
            return None
        weights = [self._weight(peer) for peer in candidates]
        if sum(weights) <= 0.0:
            return self._rng.choice(candidates)
        return self._rng.choices(candidates, weights=weights)[0]

    def _weight(self, peer: Hotkey) -> float:
        status = self._statuses.get(peer)
        if status is None or status.free <= 0:
            return 0.0
        return math.log(status.free) + 1.0 / (1 + status.forward_queue)


REFRESH_S = 30.0
"""SWARM's balancers read the list of peers this often: a newcomer waits for it, and so does a peer that failed."""
PACE_SHARE = 0.1
"""Weight of a new measurement in SWARM's mean."""
PACE_PRIOR_S = 1.0
"""What SWARM expects of a peer that was never measured."""


@dataclass(slots=True)
class _Pace:
    """A bias-corrected moving mean of seconds for an activation."""

    sum_s: float = 0.0
    num_measured: int = 0
    updated_s: float = 0.0

    @property
    def seconds(self) -> float:
        """The mean; the prior before the first measurement."""
        if not self.num_measured:
            return PACE_PRIOR_S
        return self.sum_s / (1.0 - (1.0 - PACE_SHARE) ** self.num_measured)

    def measure(self, sent_s: float, now_s: float) -> None:
        """Calls that overlap count from the end of the last one."""
        seconds = now_s - max(sent_s, self.updated_s)
        self.sum_s += PACE_SHARE * (seconds - self.sum_s)
        self.num_measured += 1
        self.updated_s = now_s


@dataclass(slots=True)
class VirtualRuntime(_Deaf):
    """SWARM's rule: interleaved weighted round robin. The peer with the least virtual runtime is next, and what an
    activation takes there is added to it."""

    rng: Random
    _heap: list[tuple[float, float, Hotkey]] = field(default_factory=list)
    _paces: dict[Hotkey, _Pace] = field(default_factory=dict)
    _banned: set[Hotkey] = field(default_factory=set)
    _refreshed_s: float = -math.inf

    def next_usable_s(self, candidates: Sequence[Hotkey]) -> float | None:
        """After the next look at the list."""
        return self._refreshed_s + REFRESH_S

    def choose(self, candidates: Sequence[Hotkey], now_s: float) -> Hotkey | None:
        """The least virtual runtime among the candidates."""
        if now_s - self._refreshed_s >= REFRESH_S:
            self._refresh(candidates, now_s)
        allowed = set(candidates)
        passed_over = []
        chosen = None
        while self._heap:
            runtime_s, tie, peer = heapq.heappop(self._heap)
            if peer in self._banned:
                continue
            if peer in allowed:
                chosen = peer
                heapq.heappush(self._heap, (runtime_s + self._pace(peer).seconds, self.rng.random(), peer))
                break
            passed_over.append((runtime_s, tie, peer))
        for entry in passed_over:
            heapq.heappush(self._heap, entry)
        return chosen

    def failed(self, peer: Hotkey, now_s: float) -> None:
        """Not again before the list is read anew."""
        self._banned.add(peer)

    def completed(self, peer: Hotkey, sent_s: float, now_s: float) -> None:
        """One more measurement."""
        self._pace(peer).measure(sent_s, now_s)

    def _refresh(self, candidates: Sequence[Hotkey], now_s: float) -> None:
        self._refreshed_s = now_s
        self._banned.clear()
        self._heap = [entry for entry in self._heap if entry[2] in candidates]
        heapq.heapify(self._heap)
        known = {peer for _, _, peer in self._heap}
        least_s = self._heap[0][0] if self._heap else 0.0
        for peer in candidates:
            if peer not in known:
                heapq.heappush(self._heap, (least_s, self.rng.random(), peer))

    def _pace(self, peer: Hotkey) -> _Pace:
        return self._paces.setdefault(peer, _Pace())


RULES: dict[str, Callable[[Random], Rule]] = {
    "uniform": Uniform,
    "log_capacity": LogCapacity,
    "virtual_runtime": VirtualRuntime,
    "orion": Router,
}
"""By name; each makes the knowledge of one sender from its random numbers."""
