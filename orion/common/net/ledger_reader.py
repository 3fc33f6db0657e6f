"""The public ledger as a validator reads it: page by page, verified, and never read twice.

Owns the reading; what follows from the entries is `orion.common.ledger`. Every method raises RefusedError,
TransportError or, for a ledger that cannot be true, DataError. Calls may overlap: a page that another call has taken
meanwhile is fetched again from where the reading stands.
"""

from collections.abc import Sequence
from typing import Protocol

from orion.common.config import RunSpec
from orion.common.errors import DataError
from orion.common.ids import Hotkey
from orion.common.ledger.reading import LedgerReading, unproven
from orion.common.offload import Offload, in_thread
from orion.common.protocol.entries import LedgerEntry, LedgerPage
from orion.common.protocol.messages import Receipt
from orion.common.protocol.records import Ledger


class LedgerPages(Protocol):
    """Where pages come from (`OrchestratorClient`)."""

    async def entries(self, from_sequence: int) -> LedgerPage: ...


class LedgerReader:
    """Reads one run's ledger."""

    def __init__(
        self, pages: LedgerPages, spec: RunSpec, orchestrator: Hotkey | None, offload: Offload = in_thread
    ) -> None:
        """`orchestrator` is whom statements were signed for; None where there are no signatures (the simulator)."""
        self._pages = pages
        self._spec = spec
        self._orchestrator = orchestrator
        self._offload = offload
        self._reading = LedgerReading(spec)

    async def ledger(self, from_outer_step: int) -> Ledger:
        """What follows from the ledger as it is now, from an outer step on."""
        reading = self._reading
        goal: int | None = None
        while True:
            asked = reading.num_entries
            page = await self._pages.entries(asked)
            goal = page.num_entries if goal is None else goal
            if page.from_sequence != asked:
                raise DataError(f"the ledger was asked for from entry {asked}, it came from {page.from_sequence}")
            await self._verify(page.entries)
            if asked == reading.num_entries:  # else another call has read it meanwhile
                self._take(page)
            if reading.num_entries >= goal:
                return reading.summary(from_outer_step)

    def agreed_transfers(self, outer_step: int, hotkey: Hotkey) -> tuple[Receipt, ...]:
        """Transfers of a miner on which both ends agree, as far as the ledger has been read."""
        return self._reading.book.agreed_transfers(outer_step, hotkey)

    async def _verify(self, entries: Sequence[LedgerEntry]) -> None:
        """Raises DataError when a statement is not its speaker's own."""
        if self._orchestrator is None:
            return
        orchestrator = self._orchestrator
        if mistakes := await self._offload(lambda: unproven(entries, self._spec, orchestrator)):
            raise DataError(f"the orchestrator's ledger is false: {mistakes[0]}")

    def _take(self, page: LedgerPage) -> None:
        reading = self._reading
        if page.previous != reading.digest:
            raise DataError(f"the orchestrator has changed its ledger before entry {reading.num_entries}")
        if not page.entries and page.num_entries > reading.num_entries:
            raise DataError("the orchestrator holds entries of its ledger back")
        for entry in page.entries:
            reading.take(entry)
        if reading.num_entries == page.num_entries and reading.digest != page.head:
            raise DataError("the orchestrator's ledger does not have the digest that it says")
