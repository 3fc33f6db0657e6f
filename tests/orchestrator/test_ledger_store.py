"""Every keeper of the public ledger behaves alike, and what it keeps follows from the entries alone."""

from collections.abc import Callable
from pathlib import Path

import pytest
from orchestrator_world import VALIDATOR, World, make_spec

from orion.common.errors import ConfigError, DataError
from orion.common.ids import Digest, Hotkey
from orion.common.ledger.book import LedgerBook
from orion.common.ledger.work import microbatch_flops
from orion.common.protocol import entries as ledger_entries
from orion.common.protocol.entries import LedgerPage, Said, chained, entry_from_json, entry_to_json, first_digest
from orion.common.protocol.messages import RunInfo
from orion.common.protocol.records import LedgerQuery, Verdict
from orion.orchestrator import ledger_store
from orion.orchestrator.events import Recorded
from orion.orchestrator.ledger_store import LedgerStore, MemoryLedger, SqliteLedger, read_ledger_file

RUN = Digest("a" * 64)
RUN_INFO = RunInfo(orchestrator=Hotkey("5" + "z" * 47), spec={"run_id": "test"})

KEEPERS: dict[str, Callable[[Path], LedgerStore]] = {
    "memory": lambda folder: MemoryLedger(RUN),
    "sqlite": lambda folder: SqliteLedger(folder / "ledger.sqlite", RUN_INFO, RUN),
}


def made_up(count: int, first: int = 0, digest: Digest | None = None) -> list[Recorded]:
    recorded = []
    digest = digest if digest is not None else first_digest(RUN)
    for sequence in range(first, first + count):
        entry = f'{{"sequence":{sequence}}}'.encode()
        digest = chained(digest, entry)
        recorded.append(Recorded(sequence, entry, digest))
    return recorded


@pytest.mark.parametrize("kind", KEEPERS)
def test_what_was_appended_is_read_in_pages(tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ledger_store, "PAGE_ENTRIES_MAX", 4)
    store = KEEPERS[kind](tmp_path)
    recorded = made_up(10)
    assert store.page(0).entries == ()
    store.append(recorded[:7])
    store.append(recorded[5:])
    read: list[bytes] = []
    while len(read) < store.num_entries:
        page = store.page(len(read))
        assert page.from_sequence == len(read)
        assert page.previous == (recorded[len(read) - 1].digest if read else first_digest(RUN))
        assert (page.num_entries, page.head) == (10, recorded[-1].digest)
        assert 0 < len(page.entries) <= 4
        read.extend(page.entries)
    assert read == [each.entry for each in recorded]
    assert store.page(99).entries == ()
    store.close()


@pytest.mark.parametrize("kind", KEEPERS)
def test_a_page_is_bounded_in_bytes_and_never_empty(tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ledger_store, "PAGE_BYTES_MAX", 1)
    store = KEEPERS[kind](tmp_path)
    store.append(made_up(3))
    assert len(store.page(1).entries) == 1
    store.close()


@pytest.mark.parametrize("kind", KEEPERS)
def test_what_is_there_cannot_change_and_nothing_can_be_left_out(tmp_path: Path, kind: str) -> None:
    store = KEEPERS[kind](tmp_path)
    store.append(made_up(3))
    with pytest.raises(DataError, match="not the one that follows"):
        store.append(made_up(1, 2, Digest("b" * 64)))
    with pytest.raises(DataError, match="do not follow"):
        store.append(made_up(1, 5))
    assert store.num_entries == 3
    store.close()


def test_a_file_is_found_again_and_belongs_to_one_run(tmp_path: Path) -> None:
    store = KEEPERS["sqlite"](tmp_path)
    store.append(made_up(3))
    store.close()
    again = KEEPERS["sqlite"](tmp_path)
    assert again.num_entries == 3
    run_info, entries = read_ledger_file(tmp_path / "ledger.sqlite")
    assert run_info == RUN_INFO
    assert len(list(entries)) == 3
    again.close()
    with pytest.raises(ConfigError, match="another run"):
        SqliteLedger(tmp_path / "ledger.sqlite", RUN_INFO.model_copy(update={"spec": {}}), RUN)
    with pytest.raises(DataError, match="no ledger"):
        read_ledger_file(tmp_path / "none.sqlite")


def test_whoever_reads_the_entries_comes_to_what_the_orchestrator_says() -> None:
    world = World(make_spec(outer_steps=7, keep_outer_steps=2, validation={"score_window_outer_steps": 3}))
    world.run()
    miner = world.core.ledger(LedgerQuery()).work[0].hotkey
    world.accept(VALIDATOR, Verdict(miner=miner, outer_step=6, passed=False, num_operations=3, reason="noise"))
    book = LedgerBook(world.spec.num_stages)
    digest = first_digest(world.spec.digest)
    for number, recorded in enumerate(world.recorded):
        digest = chained(digest, recorded.entry)
        entry = entry_from_json(recorded.entry)
        assert (entry.sequence, recorded.sequence, recorded.digest) == (number, number, digest)
        assert entry_to_json(entry) == recorded.entry
        assert book.take(number, entry.fact).changed, f"nothing follows from {entry.fact}"
    flops = microbatch_flops(world.spec)
    told = world.core.ledger(LedgerQuery())
    assert book.summary(0, len(world.recorded), digest, flops) == told
    assert {record.outer_step for record in told.work} == {4, 5, 6}
    assert all(record.merge is not None and record.merge.num_merged > 0 for record in told.work)
    assert all(record.num_committed >= record.num_microbatches > 0 for record in told.work)


def test_a_page_on_the_wire_is_the_message() -> None:
    world = World()
    world.run()
    store = MemoryLedger(world.spec.digest)
    store.append(world.recorded)
    page = store.page(3)
    assert LedgerPage.model_validate_json(page.to_json()) == page.to_message()
    assert sum(isinstance(entry.fact, Said) for entry in page.to_message().entries) > 0
    assert len(page.entries) <= ledger_entries.PAGE_ENTRIES_MAX
