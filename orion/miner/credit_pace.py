"""When a sender that is turned away for want of a credit should come again. Pure; time comes in.

Owns the measured time between two credits that become free, and until when the next ones are as good as promised: each
sender that is turned away meanwhile is told to come one such time after the one before it, so that they neither all
come at once nor before there is anything to get. A promise binds nobody; whoever comes to a free credit gets it.
"""

HINT_MIN_S, HINT_MAX_S = 0.02, 1.0
"""Bounds of the hint: a round trip, and what one forgives a slow device."""
PACE_SHARE = 0.2
"""Weight of a new interval in the mean time between two credits."""


class CreditPace:
    """The pace of one miner's credits."""

    def __init__(self) -> None:
        self._interval_s = HINT_MIN_S
        self._freed_s: float | None = None
        self._promised_s = 0.0
        """When the last credit that somebody was told of should be free."""

    def freed(self, now_s: float) -> None:
        """A credit has become free."""
        if self._freed_s is not None:
            self._interval_s += PACE_SHARE * (now_s - self._freed_s - self._interval_s)
        self._freed_s = now_s

    def paused(self) -> None:
        """Nothing is done for a while: the next interval says nothing, and promises are void."""
        self._freed_s, self._promised_s = None, 0.0

    def hint_s(self, now_s: float) -> float:
        """Seconds until the next credit that nobody was told of should be free."""
        last_s = now_s if self._freed_s is None else self._freed_s
        free_s = max(last_s, self._promised_s) + self._interval_s
        return min(HINT_MAX_S, max(HINT_MIN_S, free_s - now_s))

    def turned_away(self, now_s: float) -> None:
        """A sender was told the hint."""
        self._promised_s = now_s + self.hint_s(now_s)
