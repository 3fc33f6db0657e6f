"""The ledger as tables, for people who count with other tools. Pure: entries in, rows out.

Every row follows from the entries; `sequence` names the one that it stands in.
"""

from collections.abc import Sequence
from typing import Any

from orion.common.ledger.book import LedgerBook
from orion.common.ledger.reading import LedgerReading
from orion.common.ledger.scoring import counted_flops, paid_until_steps
from orion.common.protocol.entries import LedgerEntry, MergeSettled, Said, TripsDied, TripsLeased
from orion.common.protocol.messages import Report
from orion.common.protocol.records import ScoreSheet, Verdict

Row = dict[str, Any]
INT, REAL, TEXT, TRUTH, TEXTS, INTS = "int64", "float64", "string", "bool", "list<string>", "list<int64>"

COLUMNS: dict[str, dict[str, str]] = {
    "trips": {
        "sequence": INT,
        "outer_step": INT,
        "microbatch_id": INT,
        "data_id": INT,
        "lessee": TEXT,
        "died_sequence": INT,
        "died_reason": TEXT,
    },
    "receipts": {
        "sequence": INT,
        "reporter": TEXT,
        "stage_index": INT,
        "direction": TEXT,
        "microbatch_id": INT,
        "outer_step": INT,
        "sender": TEXT,
        "receiver": TEXT,
        "to_stage": INT,
        "digest": TEXT,
        "size_bytes": INT,
    },
    "ends": {
        "sequence": INT,
        "reporter": TEXT,
        "microbatch_id": INT,
        "outcome": TEXT,
        "reason": TEXT,
        "loss": REAL,
        "path": TEXTS,
    },
    "commitments": {
        "sequence": INT,
        "hotkey": TEXT,
        "stage_index": INT,
        "in_time": TRUTH,
        "outer_step": INT,
        "num_entries": INT,
        "num_applied": INT,
        "num_contributed": INT,
        "num_kept": INT,
        "root": TEXT,
        "is_final": TRUTH,
    },
    "contributions": {
        "sequence": INT,
        "stage_index": INT,
        "outer_step": INT,
        "hotkey": TEXT,
        "num_microbatches": INT,
        "age": INT,
        "num_merged": INT,
        "num_settled": INT,
        "num_partitions": INT,
    },
    "reductions": {
        "sequence": INT,
        "stage_index": INT,
        "outer_step": INT,
        "partition_index": INT,
        "hotkey": TEXT,
        "vote": TEXT,
    },
    "verdicts": {
        "sequence": INT,
        "validator": TEXT,
        "miner": TEXT,
        "outer_step": INT,
        "passed": TRUTH,
        "subject": TEXT,
        "num_operations": INT,
        "reason": TEXT,
    },
    "contradictions": {
        "kind": TEXT,
        "hotkeys": TEXTS,
        "outer_step": INT,
        "microbatch_id": INT,
        "direction": TEXT,
        "to_stage": INT,
        "sequences": INTS,
    },
    "work": {
        "outer_step": INT,
        "stage_index": INT,
        "hotkey": TEXT,
        "num_microbatches": INT,
        "num_committed": INT,
        "flops": REAL,
        "counted_flops": REAL,
        "waiting": TRUTH,
    },
    "scores": {
        "sequence": INT,
        "validator": TEXT,
        "outer_step": INT,
        "num_entries": INT,
        "hotkey": TEXT,
        "uid": INT,
        "score": REAL,
        "weight": REAL,
    },
}
"""Name and kind of every column of every table. Rows of `work` and `contradictions` that the book has forgotten (older
than the score window) are not in them; the entries that they follow from are. `waiting`: for verification, by the
ledger as it stands."""


def ledger_tables(entries: Sequence[LedgerEntry], reading: LedgerReading) -> dict[str, list[Row]]:
    """All tables of a ledger; `reading` has read these entries."""
    tables: dict[str, list[Row]] = {name: [] for name in COLUMNS}
    trips: dict[int, Row] = {}
    for entry in entries:
        _add_entry(tables, trips, entry)
    tables["contradictions"] = _contradictions(reading.book)
    summary = reading.summary()
    paid_until = paid_until_steps(summary, reading.spec)
    tables["work"] = [
        {
            "outer_step": record.outer_step,
            "stage_index": record.stage_index,
            "hotkey": record.hotkey,
            "num_microbatches": record.num_microbatches,
            "num_committed": record.num_committed,
            "flops": record.flops,
            "counted_flops": counted_flops(record),
            "waiting": record.outer_step > paid_until.get(record.hotkey, -1),
        }
        for record in summary.work
    ]
    return tables


def _add_entry(tables: dict[str, list[Row]], trips: dict[int, Row], entry: LedgerEntry) -> None:
    place: Row = {"sequence": entry.sequence}
    match entry.fact:
        case TripsLeased() as leased:
            for trip in leased.trips:
                row = place | {
                    "outer_step": leased.outer_step,
                    "microbatch_id": trip.microbatch_id,
                    "data_id": trip.data_id,
                    "lessee": leased.lessee,
                    "died_sequence": None,
                    "died_reason": None,
                }
                trips[trip.microbatch_id] = row
                tables["trips"].append(row)
        case TripsDied() as died:
            for microbatch_id in died.microbatch_ids:
                trips[microbatch_id] |= {"died_sequence": entry.sequence, "died_reason": died.reason}
        case MergeSettled() as merge:
            _add_merge(tables, place, merge)
        case Said() as said:
            _add_statement(tables, place, said)
        case _:
            pass


def _add_merge(tables: dict[str, list[Row]], place: Row, merge: MergeSettled) -> None:
    stage = place | {"stage_index": merge.stage_index, "outer_step": merge.outer_step}
    settled = {"num_settled": merge.num_settled, "num_partitions": merge.num_partitions}
    tables["contributions"] += [stage | each.model_dump(mode="json") | settled for each in merge.contributions]
    tables["reductions"] += [stage | each.model_dump(mode="json") for each in merge.reductions]


def _add_statement(tables: dict[str, list[Row]], place: Row, said: Said) -> None:
    match said.message:
        case Report() as report:
            reporter = place | {"reporter": said.hotkey}
            staged = reporter | {"stage_index": said.stage_index}
            tables["receipts"] += [staged | receipt.model_dump(mode="json") for receipt in report.receipts]
            tables["ends"] += [reporter | end.model_dump(mode="json") for end in report.ends]
            if report.commitment is not None:
                whose = {"hotkey": said.hotkey, "stage_index": said.stage_index, "in_time": said.commitment_in_time}
                tables["commitments"].append(place | whose | report.commitment.model_dump(mode="json"))
        case Verdict() as verdict:
            fields = verdict.model_dump(mode="json", include=set(COLUMNS["verdicts"]))
            tables["verdicts"].append(place | {"validator": said.hotkey} | fields)
        case ScoreSheet() as sheet:
            read = {"validator": said.hotkey, "outer_step": sheet.outer_step, "num_entries": sheet.num_entries}
            tables["scores"] += [place | read | share.model_dump(mode="json") for share in sheet.shares]
        case _:
            pass


def _contradictions(book: LedgerBook) -> list[Row]:
    return [
        {
            "kind": found.kind.value,
            "hotkeys": list(found.hotkeys),
            "outer_step": found.outer_step,
            "microbatch_id": found.microbatch_id,
            "direction": found.direction.value,
            "to_stage": found.to_stage,
            "sequences": list(found.sequences),
        }
        for _, step in sorted(book.steps.items())
        for found in step.contradictions.found
    ]
