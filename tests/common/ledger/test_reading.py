"""Who reads a ledger believes nothing that it can't check: every kind of tampering is seen."""

from collections.abc import Callable

import pytest
from ledger_kit import ORCHESTRATOR_KEY, SignedLedger

from orion.common.config import RunSpec
from orion.common.errors import DataError
from orion.common.ids import Digest
from orion.common.ledger.contradictions import ContradictionKind
from orion.common.ledger.reading import LedgerReading, unproven
from orion.common.ledger.sheet import differences, make_sheet, weights_of
from orion.common.net.ledger_reader import LedgerReader
from orion.common.offload import in_place
from orion.common.protocol.entries import LedgerEntry, LedgerPage, OuterStepOpened, Proof, Said, TripsDied
from orion.common.protocol.messages import Report
from orion.common.protocol.records import Ledger, Verdict
from orion.common.protocol.signing import hotkey_of, keypair_from_uri

VALIDATOR_KEY = keypair_from_uri("//validator")


def make_spec(seed: int = 7) -> RunSpec:
    return RunSpec.parse(
        {
            "run_id": "test",
            "seed": seed,
            "model": {"preset": "nano"},
            "data": {"sequence_length": 16, "sequences_per_microbatch": 2},
            "num_stages": 3,
            "replicas": 2,
            "outer_steps": 3,
            "inner_steps": 2,
            "microbatches_per_step": 2,
            "num_partitions": 2,
        },
        "test",
    )


def make_ledger() -> SignedLedger:
    """Two outer steps; in the second one a replica of stage 1 is caught."""
    ledger = SignedLedger(make_spec())
    for _ in range(2):
        ledger.train(4, 0)
        ledger.train(3, 1)
        ledger.merge()
    caught = hotkey_of(ledger.keys[1][1])
    ledger.says(VALIDATOR_KEY, None, Verdict(miner=caught, outer_step=1, passed=False, num_operations=2))
    return ledger


class Pages:
    """Gives pages as an orchestrator does, and may change them."""

    def __init__(self, ledger: SignedLedger, size: int, change: Callable[[LedgerPage], LedgerPage]) -> None:
        self._ledger, self._size, self._change = ledger, size, change
        self.num_asked = 0

    async def entries(self, from_sequence: int) -> LedgerPage:
        self.num_asked += 1
        return self._change(self._ledger.page(from_sequence, self._size))


def reader(
    ledger: SignedLedger, size: int = 512, change: Callable[[LedgerPage], LedgerPage] = lambda page: page
) -> tuple[LedgerReader, Pages]:
    pages = Pages(ledger, size, change)
    return LedgerReader(pages, ledger.spec, ledger.orchestrator, in_place), pages


@pytest.mark.parametrize("size", [1, 7, 512])
async def test_whatever_the_pages_readers_agree_to_the_last_bit(size: int) -> None:
    ledger = make_ledger()
    read, pages = reader(ledger, size)
    found = await read.ledger(0)
    assert found == ledger.summary()
    assert {(record.outer_step, record.num_microbatches) for record in found.work} == {(0, 4), (0, 3), (1, 4), (1, 3)}
    uids = {hotkey_of(key): uid for uid, key in enumerate(key for keys in ledger.keys for key in keys)}
    sheet = make_sheet(found, ledger.spec, uids, None, 1.0)
    assert sheet == make_sheet(ledger.summary(), ledger.spec, uids, None, 1.0)
    assert differences(sheet, ledger.summary(), ledger.spec) == []
    assert sum(weights_of(sheet).values()) == pytest.approx(1)
    assert uids[hotkey_of(ledger.keys[1][1])] not in weights_of(sheet)
    num_asked = pages.num_asked
    ledger.train(1)
    assert await read.ledger(0) == ledger.summary()
    assert pages.num_asked - num_asked <= -(-7 // size)


def changed(entry: LedgerEntry, **fact: object) -> LedgerEntry:
    return entry.model_copy(update={"fact": entry.fact.model_copy(update=fact)})


def first_said(entries: tuple[LedgerEntry, ...]) -> int:
    return next(index for index, entry in enumerate(entries) if isinstance(entry.fact, Said))


def other_words(page: LedgerPage) -> LedgerPage:
    index = first_said(page.entries)
    said = page.entries[index].fact
    assert isinstance(said, Said) and isinstance(said.message, Report)
    message = said.message.model_copy(update={"receipts": said.message.receipts[1:]})
    return replaced(page, index, changed(page.entries[index], message=message))


def other_speaker(page: LedgerPage) -> LedgerPage:
    index = first_said(page.entries)
    return replaced(page, index, changed(page.entries[index], hotkey=hotkey_of(VALIDATOR_KEY)))


def no_proof(page: LedgerPage) -> LedgerPage:
    index = first_said(page.entries)
    return replaced(page, index, changed(page.entries[index], proof=None))


def other_route(page: LedgerPage) -> LedgerPage:
    index = first_said(page.entries)
    said = page.entries[index].fact
    assert isinstance(said, Said) and isinstance(said.proof, Proof)
    proof = said.proof.model_copy(update={"target": said.proof.target.replace("report", "verdict")})
    return replaced(page, index, changed(page.entries[index], proof=proof))


def left_out(page: LedgerPage) -> LedgerPage:
    return page.model_copy(update={"entries": page.entries[:3] + page.entries[4:]})


def swapped(page: LedgerPage) -> LedgerPage:
    second, third = page.entries[2:4]
    return page.model_copy(update={"entries": (*page.entries[:2], third, second, *page.entries[4:])})


def later(page: LedgerPage) -> LedgerPage:
    return replaced(page, 2, page.entries[2].model_copy(update={"time_s": 1.0}))


def made_up(page: LedgerPage) -> LedgerPage:
    last = page.entries[-1]
    fact = TripsDied(outer_step=1, microbatch_ids=(9_999,), reason="never leased")
    return page.model_copy(
        update={"entries": (*page.entries, LedgerEntry(sequence=last.sequence + 1, time_s=last.time_s, fact=fact))}
    )


def said_twice(page: LedgerPage) -> LedgerPage:
    last = page.entries[-1]
    return page.model_copy(update={"entries": (*page.entries, last.model_copy(update={"sequence": last.sequence + 1}))})


def other_past(page: LedgerPage) -> LedgerPage:
    return page.model_copy(update={"previous": Digest("e" * 64)})


def other_head(page: LedgerPage) -> LedgerPage:
    return page.model_copy(update={"head": Digest("e" * 64)})


def held_back(page: LedgerPage) -> LedgerPage:
    return page.model_copy(update={"entries": ()})


def wrong_place(page: LedgerPage) -> LedgerPage:
    return page.model_copy(update={"from_sequence": page.from_sequence + 1})


def replaced(page: LedgerPage, index: int, entry: LedgerEntry) -> LedgerPage:
    return page.model_copy(update={"entries": (*page.entries[:index], entry, *page.entries[index + 1 :])})


TAMPERINGS = [
    other_words,
    other_speaker,
    no_proof,
    other_route,
    left_out,
    swapped,
    later,
    made_up,
    said_twice,
    other_past,
    other_head,
    held_back,
    wrong_place,
]


@pytest.mark.parametrize("tampering", TAMPERINGS, ids=lambda tampering: tampering.__name__)
async def test_a_ledger_that_cannot_be_true_is_not_believed(tampering: Callable[[LedgerPage], LedgerPage]) -> None:
    ledger = make_ledger()
    read, pages = reader(ledger, change=tampering)
    with pytest.raises(DataError):
        await read.ledger(0)
    assert pages.num_asked == 1


async def test_a_past_that_changes_later_is_seen() -> None:
    ledger, other = make_ledger(), make_ledger()
    read, pages = reader(ledger)
    await read.ledger(0)
    other.train(2)
    other.entries[1] = other.entries[1].model_copy(update={"time_s": 1.0})
    rewritten = LedgerReading(other.spec)
    for entry in other.entries:
        rewritten.take(entry)
    other.reading = rewritten
    pages._ledger = other
    with pytest.raises(DataError, match="has changed its ledger"):
        await read.ledger(0)


def test_proofs_are_of_this_run_and_this_orchestrator() -> None:
    ledger = make_ledger()
    assert unproven(ledger.entries, ledger.spec, ledger.orchestrator) == []
    assert unproven(ledger.entries, ledger.spec, hotkey_of(VALIDATOR_KEY))
    assert unproven(ledger.entries, make_spec(seed=8), ledger.orchestrator)
    assert hotkey_of(ORCHESTRATOR_KEY) == ledger.orchestrator


def test_receipts_that_contradict_each_other_name_both_reports() -> None:
    ledger = SignedLedger(make_spec())
    (microbatch_id,) = ledger.train(1)
    entries = [entry for entry in ledger.entries if isinstance(entry.fact, Said)]
    sender = entries[1]
    assert isinstance(sender.fact, Said) and isinstance(sender.fact.message, Report)
    other = sender.fact.message.receipts[0].model_copy(update={"digest": Digest("f" * 64)})
    ledger.report(ledger.keys[1][0], 1, receipts=(other,))
    (found,) = ledger.reading.book.steps[0].contradictions.found
    assert found.kind is ContradictionKind.TWO_WORDS
    assert found.microbatch_id == microbatch_id
    assert found.sequences == (sender.sequence, ledger.entries[-1].sequence)
    assert found.hotkeys == (hotkey_of(ledger.keys[1][0]),)
    credited: Ledger = ledger.summary()
    assert {record.num_microbatches for record in credited.work} == {1}


def test_an_outer_step_that_was_opened_twice_does_not_pay_twice() -> None:
    ledger = make_ledger()
    before = ledger.summary()
    with pytest.raises(DataError, match="opened"):
        ledger.fact(OuterStepOpened(outer_step=1))
    assert ledger.summary() == before
