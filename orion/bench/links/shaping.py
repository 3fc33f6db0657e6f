"""`Shaper`: when a frame that a peer has sent arrives, or that it never does. Pure: time and randomness come in.

Owns the frames under way; upload limits are the kernel's and no part of it. Invariants: frames between two peers keep
their order; what is held is bounded (`HELD_BYTES_MAX` for each sender, beyond which it is to be read no more); a frame
that is delivered was never cut.
"""

import heapq
from collections.abc import Sequence
from random import Random

from orion.bench.links.profile import LinkProfile, Way

HELD_BYTES_MAX = 64 * 1024 * 1024
"""Under way from one sender: a second of half a gigabit."""
DOWNLOAD_QUEUE_S_MAX = 0.5
"""What may wait for a peer's download before frames are dropped, as a router does."""


class Shaper:
    """Links of `len(profiles)` peers, known by their index."""

    def __init__(self, profiles: Sequence[LinkProfile], rng: Random) -> None:
        self._profiles = tuple(profiles)
        self._rng = rng
        self._heap: list[tuple[float, int, int, int, bytes]] = []
        """Arrival, number, receiver, sender, frame."""
        self._number = 0
        self._held_bytes = [0] * len(profiles)
        self._last_arrival_s: dict[tuple[int, int], float] = {}
        self._download_free_s = [0.0] * len(profiles)
        self._stall_s: list[tuple[float, float] | None] = [None] * len(profiles)
        """Begin and end of each sender's next or present stall; None before its first frame."""
        self._cut_out: set[int] = set()
        self._cut_in: set[int] = set()
        self.num_delivered = 0
        self.num_dropped = 0

    def is_open(self, sender: int) -> bool:
        """Whether more may be read from it now."""
        return self._held_bytes[sender] < HELD_BYTES_MAX

    def cut(self, peer: int, way: Way) -> None:
        """From now on nothing passes that way, what is under way included."""
        if way in (Way.OUT, Way.BOTH):
            self._cut_out.add(peer)
        if way in (Way.IN, Way.BOTH):
            self._cut_in.add(peer)

    def heal(self, peer: int) -> None:
        """The peer's link works again, both ways."""
        self._cut_out.discard(peer)
        self._cut_in.discard(peer)

    def offer(self, now_s: float, sender: int, receiver: int, frame: bytes) -> None:
        """A peer has sent a frame."""
        if self._is_cut(sender, receiver):
            self.num_dropped += 1
            return
        arrival_s = self._arrival_s(now_s, sender, receiver, len(frame))
        if arrival_s is None:
            self.num_dropped += 1
            return
        self._last_arrival_s[sender, receiver] = arrival_s
        self._held_bytes[sender] += len(frame)
        self._number += 1
        heapq.heappush(self._heap, (arrival_s, self._number, receiver, sender, frame))

    def due(self, now_s: float) -> list[tuple[int, bytes]]:
        """Receiver and frame of all that has arrived by now, in order."""
        arrived = []
        while self._heap and self._heap[0][0] <= now_s:
            _, _, receiver, sender, frame = heapq.heappop(self._heap)
            self._held_bytes[sender] -= len(frame)
            if self._is_cut(sender, receiver):
                self.num_dropped += 1
                continue
            self.num_delivered += 1
            arrived.append((receiver, frame))
        return arrived

    def next_s(self) -> float | None:
        """When the next frame arrives; None while nothing is under way."""
        return self._heap[0][0] if self._heap else None

    def check_invariants(self) -> None:
        """Raises AssertionError when anything is as it must never be."""
        held_bytes = [0] * len(self._profiles)
        for _, _, _, sender, frame in self._heap:
            held_bytes[sender] += len(frame)
        assert held_bytes == self._held_bytes, f"{self._held_bytes} bytes are counted, {held_bytes} are there"

    def _is_cut(self, sender: int, receiver: int) -> bool:
        return sender in self._cut_out or receiver in self._cut_in

    def _arrival_s(self, now_s: float, sender: int, receiver: int, size_bytes: int) -> float | None:
        """None: the frame is lost in a full queue."""
        profile = self._profiles[sender]
        arrival_s = self._after_stall_s(now_s, sender) + profile.delay_ms / 1e3
        if profile.jitter_ms:
            arrival_s += self._rng.uniform(0.0, profile.jitter_ms / 1e3)
        download_mbit = self._profiles[receiver].download_mbit
        if download_mbit is not None:
            begin_s = max(arrival_s, self._download_free_s[receiver])
            if begin_s - arrival_s > DOWNLOAD_QUEUE_S_MAX:
                return None
            arrival_s = self._download_free_s[receiver] = begin_s + size_bytes * 8 / (download_mbit * 1e6)
        return max(arrival_s, self._last_arrival_s.get((sender, receiver), 0.0))

    def _after_stall_s(self, now_s: float, sender: int) -> float:
        profile = self._profiles[sender]
        if profile.stall_every_s is None:
            return now_s
        stall = self._stall_s[sender]
        while stall is None or stall[1] <= now_s:
            begin_s = (now_s if stall is None else stall[1]) + self._rng.expovariate(1.0 / profile.stall_every_s)
            stall = self._stall_s[sender] = (begin_s, begin_s + profile.stall_ms / 1e3)
        return stall[1] if stall[0] <= now_s else now_s
