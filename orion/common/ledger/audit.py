"""The audit of a whole ledger: every signature, the chain, every credit, every score and weight again. Pure.

Each difference is a line that names what differs; an empty list means that everything follows. Whatever makes the rest
of the ledger meaningless (an entry that cannot be read or cannot come there) ends the audit with its line.
"""

from collections.abc import Sequence

from pydantic import BaseModel, ConfigDict, ValidationError

from orion.common.config import RunSpec
from orion.common.errors import DataError
from orion.common.ids import Digest, Hotkey
from orion.common.ledger.reading import LedgerReading, unproven
from orion.common.ledger.scoring import window_start
from orion.common.ledger.sheet import differences, weights_of
from orion.common.protocol.entries import Said, entry_from_json, entry_to_json
from orion.common.protocol.records import Ledger, ScoreSheet

_SHEET_MARK = b'"kind":"score_sheet"'
DIFFERENCES_MAX = 1_000
"""Named one by one."""


class AuditReport(BaseModel):
    """What an audit found."""

    model_config = ConfigDict(frozen=True)

    run_id: str
    num_entries: int
    digest: Digest
    """Of the ledger as read."""
    num_statements: int
    """Signatures verified."""
    num_credited: int
    """Backward passes credited in the outer steps that are kept."""
    num_contradictions: int
    num_sheets: int
    """Score sheets computed again."""
    scores: dict[Hotkey, float]
    """Of each validator's newest sheet, or, without one, none."""
    weights: dict[Hotkey, dict[int, float]]
    """By validator: the chain weights of its newest sheet, uid to share."""
    differences: list[str]


class Auditor:
    """Reads one ledger; ask for the report in the end."""

    def __init__(self, spec: RunSpec, orchestrator: Hotkey) -> None:
        self._spec = spec
        self._orchestrator = orchestrator
        self._differences: list[str] = []
        self._num_statements = 0
        self._num_sheets = 0
        self._summaries: dict[int, Ledger] = {}
        self.reading = LedgerReading(spec)

    def read(self, entries: Sequence[bytes], claimed_digest: Digest | None) -> None:
        """Goes through all entries; `claimed_digest` is what the ledger's keeper says that they add up to."""
        positions = self._positions_of_sheets(entries)
        for number, data in enumerate(entries):
            if number in positions:
                self._summaries[number] = self._summary()
            if not self._take(number, data):
                return
        if len(entries) in positions:
            self._summaries[len(entries)] = self._summary()
        if claimed_digest is not None and claimed_digest != self.reading.digest:
            self.add(f"the ledger's digest is {self.reading.digest}, it is said to be {claimed_digest}")

    def add(self, difference: str) -> None:
        """Notes a difference."""
        if len(self._differences) < DIFFERENCES_MAX:
            self._differences.append(difference)

    def report(self) -> AuditReport:
        book, newest = self.reading.book, self.newest_sheets()
        return AuditReport(
            run_id=self._spec.run_id,
            num_entries=self.reading.num_entries,
            digest=self.reading.digest,
            num_statements=self._num_statements,
            num_credited=sum(sum(step.num_credited.values()) for step in book.steps.values()),
            num_contradictions=sum(len(step.contradictions.found) for step in book.steps.values()),
            num_sheets=self._num_sheets,
            scores={share.hotkey: share.score for sheet in newest.values() for share in sheet.shares},
            weights={validator: weights_of(sheet) for validator, sheet in newest.items()},
            differences=list(self._differences),
        )

    def newest_sheets(self) -> dict[Hotkey, ScoreSheet]:
        """By validator."""
        return {validator: sheet for validator, (_, sheet) in sorted(self.reading.book.sheets.items())}

    def _summary(self) -> Ledger:
        return self.reading.summary(window_start(self.reading.book.outer_step, self._spec))

    @staticmethod
    def _positions_of_sheets(entries: Sequence[bytes]) -> set[int]:
        """The places at which validators read the ledger."""
        positions = set()
        for data in entries:
            if _SHEET_MARK in data:
                try:
                    fact = entry_from_json(data).fact
                except ValidationError:
                    continue  # named when its turn comes
                if isinstance(fact, Said) and isinstance(fact.message, ScoreSheet):
                    positions.add(fact.message.num_entries)
        return positions

    def _take(self, number: int, data: bytes) -> bool:
        """Folds one entry; False when nothing after it can be trusted."""
        try:
            entry = entry_from_json(data)
        except ValidationError as error:
            self.add(f"entry {number} cannot be read: {error.errors()[0]['msg']}")
            return False
        if entry_to_json(entry) != data:
            self.add(f"entry {number} is not in its canonical form")
        for mistake in unproven([entry], self._spec, self._orchestrator):
            self.add(mistake)
        try:
            self.reading.take(entry)
        except DataError as error:
            self.add(str(error))
            return False
        if isinstance(entry.fact, Said):
            self._num_statements += 1
            if isinstance(entry.fact.message, ScoreSheet):
                self._check_sheet(number, entry.fact.hotkey, entry.fact.message)
        return True

    def _check_sheet(self, number: int, validator: Hotkey, sheet: ScoreSheet) -> None:
        self._num_sheets += 1
        summary = self._summaries.get(sheet.num_entries)
        if summary is None:
            self.add(f"entry {number}: {validator} scored {sheet.num_entries} entries, which were not there")
            return
        for difference in differences(sheet, summary, self._spec):
            self.add(f"entry {number}: score sheet of {validator}: {difference}")
