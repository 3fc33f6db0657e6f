"""`orion audit`: a run's ledger from wherever it lies, computed again, and held against the chain."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from orion.cli.chain_access import Subnet, open_chain
from orion.cli.ledger_files import ENTRIES_FILE, read_entries, table_differences, write_ledger
from orion.common.config import RunSpec
from orion.common.errors import DataError
from orion.common.ids import Digest, Hotkey
from orion.common.ledger.audit import Auditor, AuditReport
from orion.common.ledger.sheet import weights_of
from orion.common.ledger.weights import as_u16
from orion.common.net.chain import Chain
from orion.common.net.http import HttpClient
from orion.common.net.orchestrator_client import OrchestratorClient
from orion.common.protocol.entries import entry_to_json
from orion.common.protocol.messages import RunInfo
from orion.orchestrator.ledger_store import LEDGER_FILE, read_ledger_file

PRINTED_MAX = 40
"""Differences shown to people."""


@dataclass(frozen=True, slots=True)
class LedgerSource:
    """A ledger that has been read but not believed."""

    run_info: RunInfo
    spec: RunSpec
    entries: list[bytes]
    claimed_digest: Digest | None
    """What its keeper says that the entries add up to; None where nobody says."""
    tables: Path | None = None
    """Folder of exported tables, which must follow from the entries too."""


async def open_ledger(run: str) -> LedgerSource:
    """The ledger of a run: an orchestrator's URL, a run's folder (or its state's), or an exported folder.

    Raises DataError when there is none, TransportError or RefusedError when the orchestrator does not give it.
    """
    if run.startswith(("http://", "https://")):
        return await _fetch(run.rstrip("/"))
    folder = Path(run)
    if (folder / ENTRIES_FILE).is_file():
        run_info, entries, claimed = read_entries(folder)
        return LedgerSource(run_info, _spec(run_info, run), entries, claimed, folder)
    for path in (folder, folder / LEDGER_FILE, folder / "state" / LEDGER_FILE):
        if path.is_file():
            run_info, stored = read_ledger_file(path)
            return LedgerSource(run_info, _spec(run_info, run), list(stored), None)
    raise DataError(f"{run} holds no ledger: name an orchestrator's URL, a run's folder or an exported one")


async def _fetch(url: str) -> LedgerSource:
    async with HttpClient() as http:
        spec, orchestrator = await OrchestratorClient.run_spec(http, url)
        run_info = RunInfo(orchestrator=orchestrator, spec=spec.model_dump(mode="json"))
        entries: list[bytes] = []
        while True:
            page = await OrchestratorClient.read_entries(http, url, len(entries))
            entries.extend(entry_to_json(entry) for entry in page.entries)
            if len(entries) >= page.num_entries:
                return LedgerSource(run_info, spec, entries, page.head if len(entries) == page.num_entries else None)
            if not page.entries:
                raise DataError(f"{url} holds back its ledger after entry {len(entries)}")


def _spec(run_info: RunInfo, where: str) -> RunSpec:
    return RunSpec.parse(dict(run_info.spec), where)


async def audit_run(run: str, export: Path | None = None, subnet: Subnet | None = None) -> AuditReport:
    """The whole command. Raises DataError, ConfigError, TransportError, RefusedError or ChainError."""
    source = await open_ledger(run)
    if subnet is None:
        return await audit(source, export=export)
    async with open_chain(subnet) as chain:
        return await audit(source, chain, export)


async def audit(source: LedgerSource, chain: Chain | None = None, export: Path | None = None) -> AuditReport:
    """Computes everything again; with a chain, also whether the validators' weights stand there."""
    auditor = Auditor(source.spec, source.run_info.orchestrator)
    auditor.read(source.entries, source.claimed_digest)
    is_whole = auditor.reading.num_entries == len(source.entries)
    if source.tables is not None and is_whole:
        for difference in table_differences(source.tables, source.entries, auditor.reading):
            auditor.add(difference)
    if chain is not None:
        for difference in await chain_differences(auditor, chain):
            auditor.add(difference)
    if export is not None and is_whole:
        write_ledger(export, source.run_info, source.spec.digest, source.entries, auditor.reading)
    return auditor.report()


async def chain_differences(auditor: Auditor, chain: Chain) -> list[str]:
    """Where the chain says something else than the validators' newest sheets: slots, and weights as u16."""
    metagraph = await chain.metagraph()
    uids = {neuron.hotkey: neuron.uid for neuron in metagraph.neurons}
    found = []
    for validator, sheet in auditor.newest_sheets().items():
        moved = [share.hotkey for share in sheet.shares if uids.get(share.hotkey) != share.uid]
        found += [f"score sheet of {validator}: {hotkey} does not sit on the slot that it names" for hotkey in moved]
        if validator not in uids:
            found.append(f"{validator} sent a score sheet and is not on the subnet")
        elif not await chain.commits_of(validator):  # what is timelocked cannot be read yet
            found += _weight_differences(validator, weights_of(sheet), await chain.weights_of(validator))
    return found


def _weight_differences(validator: Hotkey, expected: Mapping[int, float], on_chain: Mapping[int, float]) -> list[str]:
    told, right = as_u16(on_chain), {uid: units for uid, units in as_u16(expected).items() if units > 0}
    return [
        f"weights of {validator} on the chain: uid {uid} has {told.get(uid, 0)}, its score sheet gives it "
        f"{right.get(uid, 0)} of 65535"
        for uid in sorted(told.keys() | right.keys())
        if abs(told.get(uid, 0) - right.get(uid, 0)) > 1  # the chain rounds once more
    ]


def print_report(console: Console, report: AuditReport) -> None:
    """For people."""
    console.print(
        f"{report.run_id}: {report.num_entries} entries, {report.num_statements} signatures, {report.num_credited} "
        f"credited passes, {report.num_contradictions} contradictions, {report.num_sheets} score sheets",
        highlight=False,
    )
    console.print(f"digest {report.digest}", highlight=False)
    for difference in report.differences[:PRINTED_MAX]:
        console.print(f"DIFFERS  {difference}", highlight=False, markup=False, soft_wrap=True)
    if len(report.differences) > PRINTED_MAX:
        console.print(f"… and {len(report.differences) - PRINTED_MAX} more: --json names them", highlight=False)
    if not report.differences:
        console.print("everything follows from the signed entries", highlight=False)
