"""How a new core comes to stand where a journal ends: from its newest usable snapshot and the events after it."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import structlog

from orion.common.errors import DataError
from orion.orchestrator.core import OrchestratorCore
from orion.orchestrator.events import Effect, Event, Recorded
from orion.orchestrator.journal import Journal, Snapshot
from orion.orchestrator.ledger_store import LedgerStore

_ENTRIES_AT_ONCE = 512

_log = structlog.get_logger(__name__)


class Watcher(Protocol):
    """Hears of every event after the core has handled it, those that a restart replays first. Must cost next to nothing
    and change nothing."""

    def handled(self, event: Event, effects: Sequence[Effect]) -> None: ...


@dataclass(frozen=True, slots=True)
class Replayed:
    """Where a journal ends."""

    next_sequence: int
    now_s: float
    """Of the newest event; 0 without any."""
    num_events: int
    """Replayed because no snapshot that could be used holds them."""


def replay(core: OrchestratorCore, journal: Journal, ledger: LedgerStore, watcher: Watcher | None = None) -> Replayed:
    """Brings a new core to where the journal ends.

    What the events caused then is not done again; what of it was lost becomes due with the `Resumed` that follows.
    Only the ledger gets the entries that it lacks. Raises DataError when it holds others, when it lacks more than the
    journal can tell, and when events were dropped and no snapshot can be used.
    """
    first_sequence, now_s = _restore(core, journal, ledger)
    next_sequence = first_sequence
    recorded: list[Recorded] = []
    for record in journal.read(first_sequence):
        effects = core.handle(record.event, record.now_s)
        if watcher is not None:
            watcher.handled(record.event, effects)
        recorded.extend(effect for effect in effects if isinstance(effect, Recorded))
        if len(recorded) >= _ENTRIES_AT_ONCE:
            ledger.append(recorded)
            recorded.clear()
        next_sequence, now_s = record.sequence + 1, record.now_s
    ledger.append(recorded)
    return Replayed(next_sequence, now_s, next_sequence - first_sequence)


def _restore(core: OrchestratorCore, journal: Journal, ledger: LedgerStore) -> tuple[int, float]:
    """Takes the newest snapshot that can be used: the event after it, and its time; 0 and 0.0 when there is none."""
    reasons: list[str] = []
    for snapshot in journal.snapshots():
        reason = _try(core, snapshot, ledger)
        if not reason:
            _check_same(core, ledger)
            return snapshot.sequence, snapshot.now_s
        reasons.append(f"the snapshot of event {snapshot.sequence} {reason}")
        _log.warning("snapshot_not_used", sequence=snapshot.sequence, reason=reason)
    if reasons:
        try:
            next(journal.read(), None)
        except DataError as error:
            raise DataError(f"the journal cannot be used: {'; '.join(reasons)}; and {error}") from None
    return 0, 0.0


def _try(core: OrchestratorCore, snapshot: Snapshot, ledger: LedgerStore) -> str:
    """Restores the core from a snapshot, or tells why it cannot."""
    if not snapshot.is_whole:
        return "is damaged"
    if snapshot.num_entries > ledger.num_entries:
        return f"comes after {snapshot.num_entries} ledger entries, of which {ledger.num_entries} are there"
    try:
        core.restore(snapshot.state)
    except DataError as error:
        return f"cannot be read: {error}"
    return ""


def _check_same(core: OrchestratorCore, ledger: LedgerStore) -> None:
    if ledger.digest_before(core.num_entries) != core.ledger_digest:
        raise DataError(f"the ledger's first {core.num_entries} entries are not those that follow from the journal")
