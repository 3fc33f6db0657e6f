"""Reading a ledger that one does not trust: chained, verified, folded. Pure.

What a reader accepts is what it can check itself: that the entries are consecutive and chained from the run's digest,
and that every statement was signed by whom it names, for this run's orchestrator, to the right route. Whether the
orchestrator left something out or lied about time, no reader can see.
"""

from collections.abc import Sequence
from urllib.parse import parse_qsl, urlsplit

from orion.common.config import RunSpec
from orion.common.errors import DataError
from orion.common.ids import PROTOCOL_VERSION, Hotkey
from orion.common.ledger.book import LedgerBook
from orion.common.ledger.evidence import Taken
from orion.common.ledger.work import microbatch_flops
from orion.common.protocol import routes
from orion.common.protocol.entries import LedgerEntry, Said, chained, entry_to_json, first_digest
from orion.common.protocol.messages import Reduced, Report, Uploaded
from orion.common.protocol.records import Ledger, ScoreSheet, Verdict
from orion.common.protocol.signing import is_proven

_ROUTES = {
    Report: routes.REPORT,
    Uploaded: routes.UPLOADED,
    Reduced: routes.REDUCED,
    Verdict: routes.VERDICT,
    ScoreSheet: routes.SCORES,
}


class LedgerReading:
    """A book that is filled from entries in order."""

    def __init__(self, spec: RunSpec) -> None:
        self.spec = spec
        self.book = LedgerBook(spec.num_stages, spec.first_outer_step, is_overlapped=spec.sync == "overlapped")
        self.num_entries = 0
        self.digest = first_digest(spec.digest)
        self._flops = microbatch_flops(spec)

    def take(self, entry: LedgerEntry) -> Taken:
        """Folds the next entry, whose proof has been looked at. Raises DataError when it is not the next one, or when
        nothing follows from it: no true ledger holds such an entry."""
        if entry.sequence != self.num_entries:
            raise DataError(f"entry {self.num_entries} of the ledger is missing; number {entry.sequence} comes instead")
        taken = self.book.take(entry.sequence, entry.fact)
        if not taken.changed:
            raise DataError(f"entry {entry.sequence}: nothing follows from it, so that it does not belong there")
        self.digest = chained(self.digest, entry_to_json(entry))
        self.num_entries += 1
        return taken

    def summary(self, from_outer_step: int = 0) -> Ledger:
        """What follows from all entries so far."""
        return self.book.summary(from_outer_step, self.num_entries, self.digest, self._flops)


def unproven(entries: Sequence[LedgerEntry], spec: RunSpec, orchestrator: Hotkey) -> list[str]:
    """What is wrong with the proofs of these entries, a line each; empty when every word is its speaker's own."""
    found = []
    for entry in entries:
        if isinstance(entry.fact, Said) and (mistake := _mistake(entry.fact, spec, orchestrator)):
            found.append(f"entry {entry.sequence}: {mistake}")
    return found


def _mistake(said: Said, spec: RunSpec, orchestrator: Hotkey) -> str:
    what = f"a {said.message.kind} of {said.hotkey}"
    if said.proof is None:
        return f"{what} comes without a proof"
    target = urlsplit(said.proof.target)
    query = dict(parse_qsl(target.query))
    expected = (_ROUTES[type(said.message)], str(PROTOCOL_VERSION), spec.digest)
    if (target.path, query.get("protocol"), query.get("run")) != expected:
        return f"{what} was sent to {target.path}, or to another run or protocol"
    if not is_proven(said.proof, said.hotkey, orchestrator, said.message):
        return f"{what} was not signed by it"
    return ""
