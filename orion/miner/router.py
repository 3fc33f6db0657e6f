"""Which replica of the next stage gets a microbatch. Pure: time and randomness come in.

Owns what is known of each peer: how long trips through it took, what it answered last, what we have in flight there,
how often it failed, until when it is busy, and its circuit breaker. Must not know of microbatches or messages.

Expected completion = trip × (trip ÷ mean trip) × (1 + in flight + what waits there) + what failing costs × the odds
that it fails. A trip is the time from sending a microbatch to its gradient's return: the peer's own passes, its queue,
its link and all stages behind it, as they were for us. Most of that is the same whichever replica is taken, so a trip
that is a little longer means a peer that is much slower itself, or whose device works for others too: that is why trips
count more than in proportion. What we have in flight there counts most, because it is the one thing about the present
that a sender knows for sure: where microbatches stay away, be it for speed, load or death, they pile up, and no more
are sent. (The time between two gradients says less: with many senders before a peer it is our share of its work, not
its speed, and it is only measured where there is much to do.) The queue that a peer told us counts while it is fresh.

Two candidates are drawn with weight 1/expected² (perhaps twice the same) and the better one is taken: load spreads over
good peers instead of chasing the best, and whatever was slow is drawn again now and then, so that a change is noticed.
A small share of choices is drawn evenly. Asked last are peers that have just told us that they have no credits left,
and newcomers of whom enough is in flight until a first gradient has come back: they are tried soon, as the peers known
are on average, but not flooded.

Breaker: after `FAILURES_TO_OPEN` failures in a row a peer gets nothing for a pause that doubles with each failed
probe; then one probe at a time, and the first success closes it. A peer that was busy gets one attempt at a time too,
so that a full peer is not offered all that waits for it. A peer that has gone and comes back is a newcomer, but one
with its record of failures, and with its absence added to it.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from random import Random

from orion.common.ids import Hotkey

EWMA_SHARE = 0.2
"""Weight of a new measurement: the mean forgets half in three."""
EXPLORE_SHARE = 0.02
"""Share of choices that are drawn evenly."""
TRIP_PRIOR_S = 1.0
"""Taken for a peer when no peer was ever measured; only its relation to what failures cost matters then."""
TRIPS_KNOWN_MAX = 5
"""Trips after which a peer's mean stands for itself; before, the mean over all peers counts as one more trip."""
EXPECTED_MIN_S = 1e-4
"""Floor of an expectation, so that weights stay finite."""
SLOWNESS_MAX = 10.0
"""How many times the mean a peer's trip may count for beyond itself, so that nobody is written off by one slow trip."""
PASS_SHARE = 0.3
"""What each pass that waits there adds, in trips: a trip is at least a forward and a backward there and one pass more
behind it, so about a third."""
FRESH_SHARE = 0.5
"""For how many mean trips a peer's answer says something about its queue and credits: with several credits, one is free
again well before a trip is over."""
NEWCOMER_IN_FLIGHT = 2
"""What a peer is sent until its first gradient has come back: one to compute, one that waits."""
OUTCOME_MEMORY = 0.95
"""What an outcome still counts after the next one: a peer's record is its last twenty or so."""
OUTCOMES_PRIOR = 2.0
"""Outcomes that the share of failures of all peers together counts as in a peer's record: a peer of which nothing is
known is like the others, and one that was asked more often is not better for that."""
ALL_OUTCOME_MEMORY = 0.99
"""As `OUTCOME_MEMORY`, for all peers together."""
FAILURE_ODDS_MAX = 9.0
"""A peer that always fails is not expected to take for ever, so that it is tried again."""
FAILURE_COST_PRIOR_S = 5.0
"""What a failure costs before one was seen: about the time until a connection is given up."""
FAILURES_TO_OPEN = 2
PAUSE_MIN_S = 1.0
PAUSE_MAX_S = 15.0
"""About the time after which a silent member is gone anyway."""
ABSENT_MAX = 1024
"""Peers that are gone whose record is kept."""


@dataclass(slots=True)
class _Record:
    """How a peer's last microbatches ended; older ones fade."""

    num_outcomes: float = 0.0
    num_failures: float = 0.0

    def add(self, *, is_failure: bool, memory: float = OUTCOME_MEMORY) -> None:
        self.num_outcomes = memory * self.num_outcomes + 1.0
        self.num_failures = memory * self.num_failures + is_failure

    def share(self, expected: float) -> float:
        """Share of failures, where `expected` is what one would think before any outcome."""
        return (self.num_failures + OUTCOMES_PRIOR * expected) / (self.num_outcomes + OUTCOMES_PRIOR)


@dataclass(slots=True)
class _PeerState:
    record: _Record
    trip_s: float | None = None
    num_trips: int = 0
    """That are behind `trip_s`, `TRIPS_KNOWN_MAX` at most."""
    told_s: float | None = None
    """When it last answered to an offer."""
    queued: int = 0
    """Passes that waited there then."""
    credits: int | None = None
    """What it said it would still take, less what was sent since; None = it did not say."""
    in_flight: int = 0
    busy_until_s: float = 0.0
    num_failures: int = 0
    """In a row."""
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

    @property
    def is_tried_out(self) -> bool:
        """A newcomer that has enough to show what it is like."""
        return not self.num_trips and self.in_flight >= NEWCOMER_IN_FLIGHT

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
        self._absent: dict[Hotkey, _Record] = {}
        """Of peers that are gone, the latest last."""
        self._trip_s: float | None = None
        """Mean trip through any peer."""
        self._outcomes = _Record()
        """Of all peers."""
        self._failure_cost_s = FAILURE_COST_PRIOR_S

    def keep_only(self, peers: Iterable[Hotkey]) -> None:
        """Forgets peers that are not among these and have nothing in flight, but for their record."""
        wanted = set(peers)
        for peer, state in list(self._peers.items()):
            if peer not in wanted and not state.in_flight and not state.num_sending:
                self._ended(state, is_failure=True)
                self._absent[peer] = state.record
                del self._peers[peer]
        while len(self._absent) > ABSENT_MAX:
            del self._absent[next(iter(self._absent))]

    def choose(self, candidates: Sequence[Hotkey], now_s: float) -> Hotkey | None:
        """The candidate to send to now; None when none is usable (see `next_usable_s`)."""
        usable = [peer for peer in candidates if _is_past(self._state(peer).usable_s(), now_s)]
        ready = [peer for peer in usable if self._is_ready(self._state(peer), now_s)] or usable
        if len(ready) <= 1:
            return ready[0] if ready else None
        if self._rng.random() < EXPLORE_SHARE:
            return self._rng.choice(ready)
        expected = {peer: self.expected_s(peer, now_s) for peer in ready}
        drawn = self._rng.choices(ready, weights=[expected[peer] ** -2 for peer in ready], k=2)
        return min(drawn, key=expected.__getitem__)

    def next_usable_s(self, candidates: Sequence[Hotkey]) -> float | None:
        """When the first candidate becomes usable; None when that hangs on a probe's end."""
        times = [usable_s for peer in candidates if (usable_s := self._state(peer).usable_s()) is not None]
        return min(times, default=None)

    def expected_s(self, peer: Hotkey, now_s: float) -> float:
        """What a microbatch sent to the peer now would cost, in seconds; about those until it comes back."""
        state = self._state(peer)
        mean_s = TRIP_PRIOR_S if self._trip_s is None else self._trip_s
        trip_s = mean_s
        if state.trip_s is not None and state.num_trips < TRIPS_KNOWN_MAX:
            trip_s = (state.num_trips * state.trip_s + mean_s) / (state.num_trips + 1)
        elif state.trip_s is not None:
            trip_s = state.trip_s
        trip_s *= min(SLOWNESS_MAX, trip_s / max(mean_s, EXPECTED_MIN_S))
        waiting = PASS_SHARE * state.queued if self._is_fresh(state, now_s) else 0.0
        share = state.record.share(self._outcomes.share(0.0))
        failing_s = min(FAILURE_ODDS_MAX, share / max(1.0 - share, 1.0 / FAILURE_ODDS_MAX)) * self._failure_cost_s
        return max(EXPECTED_MIN_S, trip_s * (1.0 + state.in_flight + waiting) + failing_s)

    def in_flight(self, peer: Hotkey) -> int:
        """Microbatches sent there whose end is not known."""
        return self._state(peer).in_flight

    def sent(self, peer: Hotkey) -> None:
        """A microbatch goes to the peer. It stays in flight until `released`; the attempt ends as `accepted`, `busy`,
        `refused`, `failed` or `unheard`."""
        state = self._state(peer)
        state.in_flight += 1
        state.num_sending += 1
        if state.credits:
            state.credits -= 1

    def released(self, peer: Hotkey) -> None:
        """A microbatch that was sent there is no longer in flight, however it ended."""
        state = self._state(peer)
        assert state.in_flight > 0, f"nothing is in flight to {peer}"
        state.in_flight -= 1

    def accepted(self, peer: Hotkey, now_s: float, queued: int, credits: int | None = None) -> None:
        """The peer took a tensor and told the length of its queue and, perhaps, how many more it would take."""
        state = self._answered(peer, was_busy=False)
        state.told_s, state.queued, state.credits = now_s, queued, credits

    def completed(self, peer: Hotkey, sent_s: float, now_s: float) -> None:
        """The gradient of a microbatch that was sent at `sent_s` has come back."""
        state = self._state(peer)
        state.trip_s = _ewma(state.trip_s, now_s - sent_s)
        state.num_trips = min(state.num_trips + 1, TRIPS_KNOWN_MAX)
        self._trip_s = _ewma(self._trip_s, now_s - sent_s)
        self._ended(state, is_failure=False)

    def lost(self, peer: Hotkey, sent_s: float, now_s: float) -> None:
        """What the peer accepted has been given up, because it or what it sent came to nothing."""
        self._ended(self._state(peer), is_failure=True)
        self._failure_cost_s = _ewma(self._failure_cost_s, now_s - sent_s)

    def busy(self, peer: Hotkey, until_s: float) -> None:
        """The peer is full until about then."""
        self._answered(peer, was_busy=True).busy_until_s = until_s

    def refused(self, peer: Hotkey) -> None:
        """The peer answered, but does not want this tensor."""
        self._answered(peer, was_busy=False)

    def failed(self, peer: Hotkey, now_s: float) -> None:
        """The peer was not reached."""
        state = self._state(peer)
        self._ended(state, is_failure=True)
        state.num_failures += 1
        state.num_sending = max(0, state.num_sending - 1)
        if state.is_open:
            num_doublings = min(state.num_failures - FAILURES_TO_OPEN, 16)
            state.closed_until_s = now_s + min(PAUSE_MAX_S, PAUSE_MIN_S * 2.0**num_doublings)

    def unheard(self, peer: Hotkey) -> None:
        """An attempt has ended of which nothing is known."""
        state = self._state(peer)
        state.num_sending = max(0, state.num_sending - 1)

    def _ended(self, state: _PeerState, *, is_failure: bool) -> None:
        state.record.add(is_failure=is_failure)
        self._outcomes.add(is_failure=is_failure, memory=ALL_OUTCOME_MEMORY)

    def _is_ready(self, state: _PeerState, now_s: float) -> bool:
        """Whether anything speaks against sending there, other than that it may take longer."""
        is_full = state.credits == 0 and self._is_fresh(state, now_s)
        return not is_full and not state.is_tried_out

    def _is_fresh(self, state: _PeerState, now_s: float) -> bool:
        if state.told_s is None:
            return False
        return now_s - state.told_s <= FRESH_SHARE * (TRIP_PRIOR_S if self._trip_s is None else self._trip_s)

    def _answered(self, peer: Hotkey, *, was_busy: bool) -> _PeerState:
        state = self._state(peer)
        state.num_failures = 0
        state.num_sending = max(0, state.num_sending - 1)
        state.was_busy = was_busy
        return state

    def _state(self, peer: Hotkey) -> _PeerState:
        state = self._peers.get(peer)
        if state is None:
            record = self._absent.pop(peer, None)
            state = self._peers[peer] = _PeerState(_Record() if record is None else record)
        return state


def _ewma(mean: float | None, value: float) -> float:
    return value if mean is None else mean + EWMA_SHARE * (value - mean)


def _is_past(time_s: float | None, now_s: float) -> bool:
    return time_s is not None and time_s <= now_s
