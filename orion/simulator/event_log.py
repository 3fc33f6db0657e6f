"""What happened in a simulated run, in order: a digest over all of it and the newest lines.

It owns the record; it decides nothing. The digest holds times, hosts and kinds, and no tensor's digest: it must be the
same on any machine for the same seed, while the last bits of tensors are not.
"""

from collections import Counter, deque
from collections.abc import Sequence

from blake3 import blake3

from orion.common.ids import Digest
from orion.simulator.network import Address

TAIL_LINES = 400
"""Newest lines that are kept to be read after a failure."""


class EventLog:
    """The record of one run."""

    def __init__(self) -> None:
        self._hasher = blake3()
        self.tail: deque[str] = deque(maxlen=TAIL_LINES)
        self.num_events = 0
        self.counts: Counter[str] = Counter()
        """Events of each kind, over all hosts of a role."""

    def record(self, now_s: float, address: Address, event: object, effects: Sequence[object]) -> None:
        """A core has handled an event and wants these effects."""
        self.num_events += 1
        kind, name = _kind_and_name(event)
        self.counts[kind] += 1
        self.write(f"{now_s:.6f} {address} {name} -> {' '.join(type(effect).__name__ for effect in effects)}")

    def write(self, line: str) -> None:
        """Adds a line of another kind: a fault, a process that starts."""
        self._hasher.update(line.encode() + b"\n")
        self.tail.append(line)

    def digest(self) -> Digest:
        """Over all lines so far."""
        return Digest(self._hasher.hexdigest())


def _kind_and_name(event: object) -> tuple[str, str]:
    """The event's kind, with that of the message, job result or transfer that it carries; and which microbatch's."""
    for part in ("message", "result", "transfer"):
        carried = getattr(event, part, None)
        if carried is not None:
            kind = f"{type(event).__name__} {type(carried).__name__}"
            return kind, f"{kind} {getattr(carried, 'microbatch_id', '')}".rstrip()
    kind = type(event).__name__
    return kind, kind
