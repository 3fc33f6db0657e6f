"""`orion audit`: a true ledger passes from wherever it lies, and every kind of tampering is named."""

import sqlite3
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from ledger_kit import SignedLedger
from typer.testing import CliRunner

from orion.cli.audit import audit, chain_differences, open_ledger
from orion.cli.ledger_files import write_ledger
from orion.cli.main import app
from orion.common.config import RunSpec
from orion.common.errors import ConfigError, DataError
from orion.common.ids import Digest, Hotkey
from orion.common.ledger.audit import Auditor, AuditReport
from orion.common.ledger.sheet import make_sheet, weights_of
from orion.common.ledger.tables import COLUMNS
from orion.common.net.chain import Hyperparameters
from orion.common.net.memory_chain import ChainLedger, MemoryChain
from orion.common.protocol.entries import LedgerEntry, Said, chained, entry_to_json, first_digest
from orion.common.protocol.messages import Report, RunInfo
from orion.common.protocol.records import ScoreSheet, Verdict
from orion.common.protocol.signing import hotkey_of, keypair_from_uri
from orion.orchestrator.events import Recorded
from orion.orchestrator.ledger_store import SqliteLedger

VALIDATOR_KEY = keypair_from_uri("//validator")
VALIDATOR = hotkey_of(VALIDATOR_KEY)
RUN_FILE = Path(__file__).parents[2] / "runs" / "local.toml"
SPEC = RunSpec.load(RUN_FILE)


def chain_of(ledger: SignedLedger) -> ChainLedger:
    chain = ChainLedger(Hyperparameters(weights_rate_limit_blocks=0), stakes={VALIDATOR: 10.0})
    for hotkey in (VALIDATOR, *(hotkey_of(key) for keys in ledger.keys for key in keys)):
        chain.register(hotkey)
    chain.advance_to(chain.hyperparameters.tempo)
    return chain


def uids_of(chain: ChainLedger) -> dict[Hotkey, int]:
    return {neuron.hotkey: neuron.uid for neuron in chain.metagraph().neurons}


def make_ledger() -> SignedLedger:
    """Two outer steps, a miner that is caught, and a validator's scores after each."""
    ledger = SignedLedger(SPEC)
    uids = uids_of(chain_of(ledger))
    for _ in range(2):
        ledger.train(4, 0)
        ledger.train(3, 1)
        ledger.merge()
        ledger.says(VALIDATOR_KEY, None, make_sheet(ledger.summary(), SPEC, uids, None, 1.0))
    caught = hotkey_of(ledger.keys[1][1])
    ledger.says(VALIDATOR_KEY, None, Verdict(miner=caught, outer_step=1, passed=False, num_operations=2))
    ledger.says(VALIDATOR_KEY, None, make_sheet(ledger.summary(), SPEC, uids, None, 1.0))
    return ledger


def run_info(ledger: SignedLedger) -> RunInfo:
    return RunInfo(orchestrator=ledger.orchestrator, spec=SPEC.model_dump(mode="json"))


def audited(ledger: SignedLedger, lines: list[bytes], claimed: Digest | None = None) -> AuditReport:
    auditor = Auditor(SPEC, ledger.orchestrator)
    auditor.read(lines, claimed)
    return auditor.report()


def store(ledger: SignedLedger, folder: Path) -> Path:
    """As the orchestrator keeps it in a run's folder."""
    path = folder / "state" / "ledger.sqlite"
    path.parent.mkdir(parents=True)
    kept = SqliteLedger(path, run_info(ledger), SPEC.digest)
    digest, recorded = first_digest(SPEC.digest), []
    for number, line in enumerate(ledger.json_lines()):
        digest = chained(digest, line)
        recorded.append(Recorded(number, line, digest))
    kept.append(recorded)
    kept.close()
    return path


def export(ledger: SignedLedger, folder: Path) -> Path:
    write_ledger(folder, run_info(ledger), SPEC.digest, ledger.json_lines(), ledger.reading)
    return folder


def test_a_true_ledger_has_no_difference() -> None:
    ledger = make_ledger()
    report = audited(ledger, ledger.json_lines(), ledger.reading.digest)
    assert report.differences == []
    assert (report.num_entries, report.num_sheets) == (len(ledger.entries), 3)
    assert report.num_statements == sum(isinstance(entry.fact, Said) for entry in ledger.entries)
    assert report.num_credited == 2 * 7 * SPEC.num_stages
    assert report.scores[hotkey_of(ledger.keys[1][1])] == 0 < report.scores[hotkey_of(ledger.keys[1][0])]


# --- tampering with entries -------------------------------------------------------------------------------------------


def last_said(ledger: SignedLedger, kind: type) -> int:
    return max(
        number
        for number, entry in enumerate(ledger.entries)
        if isinstance(entry.fact, Said) and isinstance(entry.fact.message, kind)
    )


def changed(ledger: SignedLedger, number: int, **changes: object) -> list[bytes]:
    """The ledger with a statement's words changed, proof kept."""
    entry = ledger.entries[number]
    assert isinstance(entry.fact, Said)
    fact = entry.fact.model_copy(update={"message": entry.fact.message.model_copy(update=changes)})
    lines = ledger.json_lines()
    lines[number] = entry_to_json(entry.model_copy(update={"fact": fact}))
    return lines


def better_verdict(ledger: SignedLedger) -> list[bytes]:
    return changed(ledger, last_said(ledger, Verdict), passed=True)


def other_scores(ledger: SignedLedger) -> list[bytes]:
    number = last_said(ledger, ScoreSheet)
    return changed(ledger, number, outer_step=1)


def fewer_receipts(ledger: SignedLedger) -> list[bytes]:
    number = next(
        number
        for number, entry in enumerate(ledger.entries)
        if isinstance(entry.fact, Said) and isinstance(entry.fact.message, Report) and entry.fact.message.receipts
    )
    entry = ledger.entries[number].fact
    assert isinstance(entry, Said) and isinstance(entry.message, Report)
    return changed(ledger, number, receipts=entry.message.receipts[:-1])


def no_trips(ledger: SignedLedger) -> list[bytes]:
    return [line for line in ledger.json_lines() if b"trips_leased" not in line]


def left_out(ledger: SignedLedger) -> list[bytes]:
    return ledger.json_lines()[:-2] + ledger.json_lines()[-1:]


def left_out_and_numbered_anew(ledger: SignedLedger) -> list[bytes]:
    """As a keeper would that wants to hide a verdict: the validator's later sheet still names the digest before it."""
    hidden = last_said(ledger, Verdict)
    kept: list[LedgerEntry] = [entry for entry in ledger.entries if entry.sequence != hidden]
    return [entry_to_json(entry.model_copy(update={"sequence": number})) for number, entry in enumerate(kept)]


def other_merge(ledger: SignedLedger) -> list[bytes]:
    lines = ledger.json_lines()
    number = next(number for number, line in enumerate(lines) if b"merge_settled" in line)
    lines[number] = lines[number].replace(b'"vote":"agreed"', b'"vote":"differed"')
    return lines


def other_spelling(ledger: SignedLedger) -> list[bytes]:
    return [line.replace(b":", b": ", 1) for line in ledger.json_lines()]


def no_json(ledger: SignedLedger) -> list[bytes]:
    return [*ledger.json_lines()[:5], b"{}", *ledger.json_lines()[6:]]


@pytest.mark.parametrize(
    ("tampering", "named"),
    [
        (better_verdict, "was not signed by it"),
        (other_scores, "was not signed by it"),
        (fewer_receipts, "was not signed by it"),
        (no_trips, "is missing"),
        (left_out, "is missing"),
        (left_out_and_numbered_anew, "score"),
        (other_merge, "it was made from another ledger"),
        (other_spelling, "canonical"),
        (no_json, "cannot be read"),
    ],
    ids=lambda value: value.__name__ if callable(value) else None,
)
def test_tampering_is_named(tampering: Callable[[SignedLedger], list[bytes]], named: str) -> None:
    ledger = make_ledger()
    lines = tampering(ledger)
    assert lines != ledger.json_lines()
    report = audited(ledger, lines)
    assert any(named in difference for difference in report.differences), report.differences


def test_a_score_that_does_not_follow_is_named_though_it_is_signed() -> None:
    ledger = make_ledger()
    sheet = ledger.reading.book.sheets[VALIDATOR][1]
    share = sheet.shares[0].model_copy(update={"score": sheet.shares[0].score * 1.01})
    ledger.says(VALIDATOR_KEY, None, sheet.model_copy(update={"shares": (share, *sheet.shares[1:])}))
    (difference, *_) = audited(ledger, ledger.json_lines()).differences
    assert f"the score of {share.hotkey} is {share.score}" in difference


def test_an_end_that_is_cut_off_is_named() -> None:
    ledger = make_ledger()
    (difference,) = audited(ledger, ledger.json_lines()[:-1], ledger.reading.digest).differences
    assert "the ledger's digest is" in difference


# --- the chain --------------------------------------------------------------------------------------------------------


async def test_weights_on_the_chain_are_compared() -> None:
    ledger = make_ledger()
    auditor = Auditor(SPEC, ledger.orchestrator)
    auditor.read(ledger.json_lines(), None)
    slots = chain_of(ledger)
    chain = MemoryChain(slots, VALIDATOR)
    weights = weights_of(ledger.reading.book.sheets[VALIDATOR][1])
    assert any("on the chain" in difference for difference in await chain_differences(auditor, chain))
    await chain.set_weights(weights)
    assert await chain_differences(auditor, chain) == []
    favoured = max(weights)
    await chain.set_weights(weights | {favoured: weights[favoured] * 1.1})
    assert any(
        f"uid {favoured}" in difference or "uid" in difference for difference in await chain_differences(auditor, chain)
    )
    strangers = MemoryChain(ChainLedger())
    assert any("not on the subnet" in difference for difference in await chain_differences(auditor, strangers))


# --- where a ledger lies ----------------------------------------------------------------------------------------------


async def test_a_run_s_folder_and_an_exported_one_say_the_same(tmp_path: Path) -> None:
    ledger = make_ledger()
    store(ledger, tmp_path / "run")
    from_run = await audit(await open_ledger(str(tmp_path / "run")), export=tmp_path / "out")
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        "run.json",
        "entries.parquet",
        *(f"{name}.parquet" for name in COLUMNS),
    }
    from_export = await audit(await open_ledger(str(tmp_path / "out")))
    assert from_run == from_export
    assert from_run.differences == []
    assert pq.read_table(tmp_path / "out" / "receipts.parquet").num_rows == 14 * 2 * 2 * (SPEC.num_stages - 1)
    with pytest.raises(ConfigError, match="not empty"):
        export(ledger, tmp_path / "out")
    with pytest.raises(DataError, match="holds no ledger"):
        await open_ledger(str(tmp_path))


@pytest.mark.parametrize("name", sorted(set(COLUMNS) - {"contradictions"}))
async def test_a_table_that_was_changed_is_named(tmp_path: Path, name: str) -> None:
    folder = export(make_ledger(), tmp_path / "out")
    table = pq.read_table(folder / f"{name}.parquet")
    rows = table.to_pylist()
    column = next(column for column, value in rows[-1].items() if isinstance(value, int))
    rows[-1][column] += 1
    pq.write_table(pa.Table.from_pylist(rows, schema=table.schema), folder / f"{name}.parquet")
    (difference,) = (await audit(await open_ledger(str(folder)))).differences
    assert difference.startswith(f"table {name}, row {len(rows) - 1}: {column}")
    pq.write_table(table.slice(1), folder / f"{name}.parquet")
    assert any(f"table {name} has" in line for line in (await audit(await open_ledger(str(folder)))).differences)


def test_the_command_says_yes_or_no(tmp_path: Path) -> None:
    path = store(make_ledger(), tmp_path)
    runner = CliRunner()
    good = runner.invoke(app, ["audit", str(tmp_path), "--json"])
    assert good.exit_code == 0, good.output
    assert AuditReport.model_validate_json(good.stdout.splitlines()[-1]).differences == []
    with sqlite3.connect(path) as connection:
        (entry,) = connection.execute("SELECT entry FROM entries WHERE sequence = 3").fetchone()
        changed_entry = entry.replace(b'"size_bytes":64', b'"size_bytes":65', 1)
        assert changed_entry != entry
        connection.execute("UPDATE entries SET entry = ? WHERE sequence = 3", (changed_entry,))
    bad = runner.invoke(app, ["audit", str(tmp_path)])
    assert bad.exit_code == 1
    assert "DIFFERS" in bad.stdout
    assert "entry 3" in bad.stdout
