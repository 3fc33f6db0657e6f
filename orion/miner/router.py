"""Which replica of the next stage gets a microbatch. Pure: time and randomness come in.

Owns what is known of each peer: measured round trip and service time, its queue as it told us last, what we have in
flight there, until when it is busy, and its circuit breaker. Must not know of microbatches or messages.

Expected completion = round trip + (queue + in flight + 1) × service time. Two candidates are drawn with weight
1/expected (perhaps twice the same) and the better one is taken: load spreads over good peers instead of chasing the
best. A small share of choices is drawn evenly, so that a peer that was slow once is measured again.

Service time is the time between two gradients that come back from a peer while a third microbatch is there. The time
that one microbatch takes there and back would not do: most of it is the way through the later stages, and counting it
per microbatch in flight would make a peer look the faster the more it is given.

Breaker: after `FAILURES_TO_OPEN` failures in a row a peer gets nothing for a pause that doubles with each failed
probe; then one probe at a time, and the first success closes it. A peer that was busy gets one attempt at a time too,
so that a full peer is not offered all that waits for it.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from random import Random

from orion.common.ids import Hotkey

EWMA_SHARE = 0.2
"""Weight of a new measurement: the mean forgets half in three."""
EXPLORE_SHARE = 0.05
"""Share of choices that are drawn evenly."""
ROUND_TRIP_PRIOR_S = 0.05
SERVICE_PRIOR_S = 0.1
"""Taken for a peer that was never measured when no other was either; small, so that newcomers are tried soon."""
EXPECTED_MIN_S = 1e-4
"""Floor of an expectation, so that weights stay finite."""
FAILURES_TO_OPEN = 2
PAUSE_MIN_S = 1.0
PAUSE_MAX_S = 15.0
"""About the time after which a silent member is gone anyway."""


@dataclass(slots=True)
class _PeerState:
    round_trip_s: float | None = None
    service_s: float | None = None
    queued: int = 0
    in_flight: int = 0
    busy_until_s: float = 0.0
    num_failures: int = 0
    """In a row."""
    completed_s: float = 0.0
    """When a gradient last came back."""
    closed_until_s: float = 0.0
    """End of the breaker's pause."""
    was_busy: bool = False
    """Its last answer was BUSY."""
    num_sending: int = 0
    """Attempts that have not ended."""

    @property
    def is_open(self) -> bool:
        return self.num_failures >= FAILURES_TO_OPEN

    @property
    def is_doubtful(self) -> bool:
        return self.is_open or self.was_busy

    def usable_s(self) -> float | None:
        """From when on the peer may be chosen; None while a probe's end has to be awaited."""
        if self.is_doubtful and self.num_sending:
            return None
        return max(self.busy_until_s, self.closed_until_s if self.is_open else 0.0)


class Router:
    """Chooses among peers by what was measured of them."""

    def __init__(self, rng: Random) -> None:
        self._rng = rng
        self._peers: dict[Hotkey, _PeerState] = {}

    def keep_only(self, peers: Iterable[Hotkey]) -> None:
        """Forgets peers that are not among these and have nothing in flight."""
        wanted = set(peers)
        for peer, state in list(self._peers.items()):
            if peer not in wanted and not state.in_flight and not state.num_sending:
                del self._peers[peer]

    def choose(self, candidates: Sequence[Hotkey], now_s: float) -> Hotkey | None:
        """The candidate to send to now; None when none is usable (see `next_usable_s`)."""
        usable = [peer for peer in candidates if _is_past(self._state(peer).usable_s(), now_s)]
        if not usable:
            return None
        if len(usable) == 1:
            return usable[0]
        if self._rng.random() < EXPLORE_SHARE:
            return self._rng.choice(usable)
        expected = {peer: self.expected_s(peer) for peer in usable}
        drawn = self._rng.choices(usable, weights=[1.0 / expected[peer] for peer in usable], k=2)
        return min(drawn, key=expected.__getitem__)

    def next_usable_s(self, candidates: Sequence[Hotkey]) -> float | None:
        """When the first candidate becomes usable; None when that hangs on a probe's end."""
        times = [usable_s for peer in candidates if (usable_s := self._state(peer).usable_s()) is not None]
        return min(times, default=None)

    def expected_s(self, peer: Hotkey) -> float:
        """Seconds until a microbatch sent to the peer now would come back."""
        state = self._state(peer)
        round_trip_s = state.round_trip_s
        if round_trip_s is None:
            round_trip_s = self._mean([other.round_trip_s for other in self._peers.values()], ROUND_TRIP_PRIOR_S)
        service_s = state.service_s
        if service_s is None:
            service_s = self._mean([other.service_s for other in self._peers.values()], SERVICE_PRIOR_S)
        return max(EXPECTED_MIN_S, round_trip_s + (state.queued + state.in_flight + 1) * service_s)

    def in_flight(self, peer: Hotkey) -> int:
        """Microbatches sent there whose end is not known."""
        return self._state(peer).in_flight

    def sent(self, peer: Hotkey) -> None:
        """A microbatch goes to the peer. It stays in flight until `released`; the attempt ends as `accepted`, `busy`,
        `refused` or `failed`."""
        state = self._state(peer)
        state.in_flight += 1
        state.num_sending += 1

    def released(self, peer: Hotkey) -> None:
        """A microbatch that was sent there is no longer in flight, however it ended."""
        state = self._state(peer)
        assert state.in_flight > 0, f"nothing is in flight to {peer}"
        state.in_flight -= 1

    def accepted(self, peer: Hotkey, seconds: float, queued: int) -> None:
        """The peer took a tensor after `seconds` and told the length of its queue."""
        state = self._answered(peer, was_busy=False)
        state.round_trip_s = _ewma(state.round_trip_s, seconds)
        state.queued = queued

    def completed(self, peer: Hotkey, sent_s: float, now_s: float) -> None:
        """The gradient of a microbatch that was sent at `sent_s` has come back."""
        state = self._state(peer)
        if state.completed_s >= sent_s:
            state.service_s = _ewma(state.service_s, now_s - state.completed_s)
        state.completed_s = now_s

    def busy(self, peer: Hotkey, until_s: float) -> None:
        """The peer is full until about then."""
        self._answered(peer, was_busy=True).busy_until_s = until_s

    def refused(self, peer: Hotkey) -> None:
        """The peer answered, but does not want this tensor."""
        self._answered(peer, was_busy=False)

    def failed(self, peer: Hotkey, now_s: float) -> None:
        """The peer was not reached."""
        state = self._state(peer)
        state.num_failures += 1
        state.num_sending = max(0, state.num_sending - 1)
        if state.is_open:
            num_doublings = min(state.num_failures - FAILURES_TO_OPEN, 16)
            state.closed_until_s = now_s + min(PAUSE_MAX_S, PAUSE_MIN_S * 2.0**num_doublings)

    def _answered(self, peer: Hotkey, *, was_busy: bool) -> _PeerState:
        state = self._state(peer)
        state.num_failures = 0
        state.num_sending = max(0, state.num_sending - 1)
        state.was_busy = was_busy
        return state

    def _state(self, peer: Hotkey) -> _PeerState:
        return self._peers.setdefault(peer, _PeerState())

    @staticmethod
    def _mean(values: Iterable[float | None], prior: float) -> float:
        known = [value for value in values if value is not None]
        return sum(known) / len(known) if known else prior


def _ewma(mean: float | None, value: float) -> float:
    return value if mean is None else mean + EWMA_SHARE * (value - mean)


def _is_past(time_s: float | None, now_s: float) -> bool:
    return time_s is not None and time_s <= now_s
