"""How fast this process' transfers with the store have been lately, in one direction. Pure: times are arguments.

What counts is the time in which anything was under way, however many transfers shared the link.
"""

import math

_SAMPLE_BYTES_MIN = 64 * 1024
"""Of less, the round trip and not the link would be measured."""
_SAMPLE_S_MIN = 0.02
_SAMPLE_S_MAX = 10.0
"""A busy time is sampled at least this often."""
_HALF_BYTES = 64e6
"""After so many bytes, what was before counts half."""


class BandwidthMeter:
    """An average over bytes, of bytes per second of busy time."""

    def __init__(self) -> None:
        self.bytes_per_s: float | None = None
        """None: not measured yet."""
        self._num_active = 0
        self._since_s = 0.0
        self._bytes = 0

    def began(self, now_s: float) -> None:
        """A transfer begins to move bytes."""
        if self._num_active == 0:
            self._since_s, self._bytes = now_s, 0
        self._num_active += 1

    def moved(self, size_bytes: int, now_s: float) -> None:
        """So many bytes have been moved since the last word; only while a transfer is under way."""
        self._bytes += size_bytes
        if now_s - self._since_s >= _SAMPLE_S_MAX:
            self._sample(now_s)

    def ended(self, now_s: float) -> None:
        """A transfer has ended, in whatever way."""
        assert self._num_active > 0, "a transfer ended that did not begin"
        self._num_active -= 1
        if self._num_active == 0:
            self._sample(now_s)

    def _sample(self, now_s: float) -> None:
        seconds, size_bytes = now_s - self._since_s, self._bytes
        self._since_s, self._bytes = now_s, 0
        if size_bytes < _SAMPLE_BYTES_MIN or seconds < _SAMPLE_S_MIN:
            return
        rate = size_bytes / seconds
        if self.bytes_per_s is None:
            self.bytes_per_s = rate
            return
        kept = math.exp2(-size_bytes / _HALF_BYTES)
        self.bytes_per_s = kept * self.bytes_per_s + (1.0 - kept) * rate
