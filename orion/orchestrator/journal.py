"""The journal: every event in order, durable before anybody sees what it caused, and snapshots of what they led to.

Owns how events and snapshots are kept; knows nothing of what they mean. A restart takes the newest snapshot, replays
the events after it through the core and stands where the old one stood. Invariants: sequence numbers are consecutive
from 0; a batch is kept wholly or not at all; of events only those go that the last but one snapshot holds, so a damaged
snapshot costs time and nothing else; a journal belongs to one run, and to one process at a time.
"""

from collections.abc import Generator, Sequence
from dataclasses import dataclass
from typing import Protocol

from blake3 import blake3

from orion.common.errors import DataError
from orion.common.ids import Digest
from orion.orchestrator.events import Event, event_from_json, event_to_json

FORMAT_VERSION = 3
"""Raised when an event changes its meaning, so that old events are not replayed into another state."""
SECRET_BYTES = 32
SNAPSHOTS_KEPT = 2
"""The newest one, and the one to fall back on."""


@dataclass(frozen=True, slots=True)
class Header:
    """What a journal is about; written once."""

    run_digest: Digest
    secret: bytes
    """Known to this run's orchestrator only: seed of its draws, and key of its object URLs."""
    format_version: int = FORMAT_VERSION

    def derived(self, purpose: str) -> bytes:
        """32 secret bytes for one purpose."""
        return blake3(self.secret, derive_key_context=f"orion orchestrator {purpose}").digest()


@dataclass(frozen=True, slots=True)
class Record:
    """An event, its place, and the time at which it was taken."""

    sequence: int
    now_s: float
    event: Event


@dataclass(frozen=True, slots=True)
class Snapshot:
    """What all events before one have led to."""

    sequence: int
    """Of the first event that is not in it."""
    now_s: float
    """Of the last event that is in it."""
    num_entries: int
    """Of the public ledger that these events led to."""
    state: bytes
    digest: Digest
    """Of `state`, to notice that it was damaged."""

    @classmethod
    def of(cls, sequence: int, now_s: float, num_entries: int, state: bytes) -> "Snapshot":
        """One that is whole."""
        return cls(sequence, now_s, num_entries, state, content_digest(state))

    @property
    def is_whole(self) -> bool:
        """Whether its state is still the one that was kept."""
        return content_digest(self.state) == self.digest


class Journal(Protocol):
    """Where events and snapshots are kept. Calls block and come one at a time."""

    @property
    def header(self) -> Header: ...

    @property
    def next_sequence(self) -> int:
        """Of the next event; 0 in a new journal."""
        ...

    def append(self, records: Sequence[Record]) -> None:
        """Keeps a batch; durable on return. Its numbers follow those before without a gap."""
        ...

    def read(self, from_sequence: int = 0) -> Generator[Record, None, None]:
        """All records from one on, in order. Raises DataError when they have been dropped already."""
        ...

    def keep(self, snapshot: Snapshot) -> None:
        """Keeps a snapshot of all events so far, durable on return, and drops what is not needed any more: older
        snapshots than the last SNAPSHOTS_KEPT, and the events that the oldest of these holds."""
        ...

    def snapshots(self) -> Generator[Snapshot, None, None]:
        """Those that are kept, the newest first. One at a time, as they can be large."""
        ...

    def close(self) -> None:
        """Lets go of it; nothing may be called afterwards."""
        ...


class MemoryJournal:
    """A journal for tests and the simulator; a restart is another core that reads the same object."""

    def __init__(self, header: Header) -> None:
        self.header = header
        self._first_sequence = 0
        self._rows: list[tuple[float, bytes]] = []
        self._snapshots: list[Snapshot] = []

    @property
    def next_sequence(self) -> int:
        return self._first_sequence + len(self._rows)

    def append(self, records: Sequence[Record]) -> None:
        check_consecutive(records, self.next_sequence)
        self._rows.extend((record.now_s, event_to_json(record.event)) for record in records)

    def read(self, from_sequence: int = 0) -> Generator[Record, None, None]:
        check_kept(from_sequence, self._first_sequence)
        for sequence in range(from_sequence, self.next_sequence):
            now_s, event = self._rows[sequence - self._first_sequence]
            yield Record(sequence, now_s, event_from_json(event))

    def keep(self, snapshot: Snapshot) -> None:
        check_covers(snapshot, self.next_sequence)
        earlier = [each for each in self._snapshots if each.sequence < snapshot.sequence]
        self._snapshots = [*earlier, snapshot][-SNAPSHOTS_KEPT:]
        if len(self._snapshots) == SNAPSHOTS_KEPT:
            del self._rows[: self._snapshots[0].sequence - self._first_sequence]
            self._first_sequence = self._snapshots[0].sequence

    def snapshots(self) -> Generator[Snapshot, None, None]:
        yield from reversed(self._snapshots)

    def close(self) -> None:
        """Nothing to let go of."""


def content_digest(state: bytes) -> Digest:
    """What a snapshot is checked against."""
    return Digest(blake3(state).hexdigest())


def check_consecutive(records: Sequence[Record], next_sequence: int) -> None:
    """Raises ValueError unless the records follow what is there."""
    numbers = [record.sequence for record in records]
    if numbers != list(range(next_sequence, next_sequence + len(records))):
        raise ValueError(f"records {numbers} do not follow number {next_sequence - 1}")


def check_covers(snapshot: Snapshot, next_sequence: int) -> None:
    """Raises ValueError unless a snapshot holds all events that are there, and no others."""
    if snapshot.sequence != next_sequence:
        raise ValueError(f"a snapshot of {snapshot.sequence} events, of which {next_sequence} are there")


def check_kept(from_sequence: int, first_sequence: int) -> None:
    """Raises DataError when events were dropped that are asked for."""
    if from_sequence < first_sequence:
        raise DataError(f"event {from_sequence} is in snapshots only: the journal holds those from {first_sequence} on")
