"""A ledger as a folder of Parquet files: written by `orion audit --export`, read again by `orion audit`.

`run.json` says which run it is, `entries.parquet` holds every entry as it was chained, the other files are tables that
follow from them (`orion.common.ledger.tables`).
"""

from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

from orion.common.errors import ConfigError, DataError
from orion.common.ids import Digest
from orion.common.ledger.reading import LedgerReading
from orion.common.ledger.tables import COLUMNS, INT, INTS, TEXT, TEXTS, Row, ledger_tables
from orion.common.protocol.entries import chained, entry_from_json, first_digest
from orion.common.protocol.messages import RunInfo

RUN_FILE = "run.json"
ENTRIES_FILE = "entries.parquet"
_ENTRY_COLUMNS = {"sequence": INT, "digest": TEXT, "entry": TEXT}


def write_ledger(
    folder: Path, run_info: RunInfo, run_digest: Digest, entries: Sequence[bytes], reading: LedgerReading
) -> list[Path]:
    """Writes everything into a new folder; `reading` has read these entries. Raises ConfigError when there is
    something in it, or when the library is missing."""
    parquet = _parquet()
    if folder.exists() and any(folder.iterdir()):
        raise ConfigError(f"{folder} is not empty; choose a new folder")
    folder.mkdir(parents=True, exist_ok=True)
    rows: list[Row] = []
    digest = first_digest(run_digest)
    for number, entry in enumerate(entries):
        digest = chained(digest, entry)
        rows.append({"sequence": number, "digest": digest, "entry": entry.decode()})
    paths = [folder / RUN_FILE, folder / ENTRIES_FILE]
    paths[0].write_text(run_info.model_dump_json())
    _write(parquet, paths[1], rows, _ENTRY_COLUMNS)
    for name, table in ledger_tables([entry_from_json(entry) for entry in entries], reading).items():
        paths.append(folder / f"{name}.parquet")
        _write(parquet, paths[-1], table, COLUMNS[name])
    return paths


def read_entries(folder: Path) -> tuple[RunInfo, list[bytes], Digest | None]:
    """Run, entries and the digest that the folder claims for them. Raises DataError when it is no such folder."""
    parquet = _parquet()
    try:
        run_info = RunInfo.model_validate_json((folder / RUN_FILE).read_bytes())
        rows: list[Row] = parquet.read_table(folder / ENTRIES_FILE).to_pylist()
        entries = [str(row["entry"]).encode() for row in rows]
        claimed = Digest(str(rows[-1]["digest"])) if rows else None
    except (OSError, ValueError, KeyError) as error:
        raise DataError(f"{folder} is no exported ledger: {error}") from error
    return run_info, entries, claimed


def table_differences(folder: Path, entries: Sequence[bytes], reading: LedgerReading) -> list[str]:
    """Which of a folder's tables do not follow from its entries, and where they differ first."""
    parquet = _parquet()
    found = []
    for name, expected in ledger_tables([entry_from_json(entry) for entry in entries], reading).items():
        try:
            rows: list[Row] = parquet.read_table(folder / f"{name}.parquet").to_pylist()
        except (OSError, ValueError) as error:
            found.append(f"table {name} cannot be read: {error}")
            continue
        if len(rows) != len(expected):
            found.append(f"table {name} has {len(rows)} rows, {len(expected)} follow from the entries")
        for number, (row, right) in enumerate(zip(rows, expected, strict=False)):
            if row != right:
                wrong = sorted(column for column in row.keys() | right.keys() if row.get(column) != right.get(column))
                found.append(f"table {name}, row {number}: {', '.join(wrong)} differ from what the entries say")
                break
    return found


def _write(parquet: ModuleType, path: Path, rows: list[Row], columns: dict[str, str]) -> None:
    import pyarrow  # noqa: PLC0415 (optional)

    kinds: dict[str, Any] = {TEXTS: pyarrow.list_(pyarrow.string()), INTS: pyarrow.list_(pyarrow.int64())}
    fields = [(name, kinds.get(kind) or pyarrow.type_for_alias(kind)) for name, kind in columns.items()]
    parquet.write_table(pyarrow.Table.from_pylist(rows, schema=pyarrow.schema(fields)), path)


def _parquet() -> ModuleType:
    try:
        import pyarrow.parquet  # noqa: PLC0415 (optional)
    except ImportError:
        raise ConfigError("reading and writing Parquet needs pyarrow: pip install 'orion-swarm[ledger]'") from None
    parquet: ModuleType = pyarrow.parquet
    return parquet
