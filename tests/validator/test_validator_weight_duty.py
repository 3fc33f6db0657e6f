"""When weights are set: at once after a round, and not in the middle of one unless an epoch would be missed."""

from dataclasses import replace

import pytest
from working_miner import hotkey, make_spec

from orion.common.ids import Digest, Subject
from orion.common.protocol.records import Ledger, Verdict, VerdictRecord, WorkRecord
from orion.validator.errand import Errands
from orion.validator.events import ChainView, FetchLedger, FetchMetagraph, SendVerdict, SetWeights
from orion.validator.weight_duty import BLOCKS_TO_SET, WeightDuty

A, B = hotkey(0), hotkey(1)
SPEC = make_spec()
VIEW = ChainView(
    block=1000,
    block_s=12.0,
    uids={A: 1, B: 2},
    owner_uid=None,
    has_permit=True,
    next_epoch_s=600.0,
    last_update_block=None,
    weights_rate_limit_blocks=100,
    weight_max=1.0,
)
LIMITED = replace(VIEW, last_update_block=VIEW.block - 90)
"""Weights may be set in ten blocks."""
WAIT_S = 10 * VIEW.block_s
FAILED = Verdict(miner=B, outer_step=0, passed=False, num_operations=1)


def ledger(*verdicts: Verdict) -> Ledger:
    work = tuple(
        WorkRecord(
            hotkey=miner, stage_index=0, outer_step=0, num_microbatches=1, num_committed=1, merge=None, flops=1.0
        )
        for miner in (A, B)
    )
    records = tuple(VerdictRecord(validator=hotkey(2), verdict=verdict) for verdict in verdicts)
    return Ledger(num_entries=1, digest=Digest("0" * 64), outer_step=0, work=work, verdicts=records)


class Desk:
    """A duty with a request, and its errands."""

    def __init__(self) -> None:
        self.errands = Errands()
        self.duty = WeightDuty(SPEC, self.errands)
        self.duty.request(0)
        self.now_s = 0.0

    def look(self, *, is_checking: bool) -> set[type]:
        """What is asked for now."""
        self.duty.pump(self.now_s, is_checking=is_checking)
        return {type(effect) for effect in self.errands.pump(self.now_s)}

    def answer(self, view: ChainView, *verdicts: Verdict, is_checking: bool) -> set[type]:
        """Hands over ledger and subnet; what is asked for then."""
        self.errands.ledger_arrived()
        self.duty.on_ledger(ledger(*verdicts), self.now_s)
        self.errands.succeeded(FetchMetagraph())
        self.duty.on_view(view, self.now_s)
        return self.look(is_checking=is_checking)

    @property
    def weights(self) -> dict[int, float]:
        (setting,) = [errand.effect for errand in self.errands._errands if isinstance(errand.effect, SetWeights)]
        return dict(setting.weights)


BOTH = {FetchLedger, FetchMetagraph}


def test_after_a_round_weights_are_set_at_once_though_the_next_one_has_begun() -> None:
    desk = Desk()
    assert desk.look(is_checking=True) == BOTH
    assert SetWeights in desk.answer(VIEW, is_checking=True)


def held(view: ChainView) -> Desk:
    """A duty that the rate limit has kept waiting until the next round was under way."""
    desk = Desk()
    desk.look(is_checking=True)
    assert desk.answer(LIMITED, is_checking=True) == set()
    desk.now_s = WAIT_S
    assert desk.look(is_checking=True) == BOTH
    assert desk.answer(view, is_checking=True) == set()
    return desk


def test_what_the_chain_has_kept_waiting_waits_for_the_round_under_way() -> None:
    desk = held(VIEW)
    desk.now_s += 300.0
    assert desk.look(is_checking=True) == set()
    desk.duty.request(1)
    assert desk.look(is_checking=True) == BOTH
    assert SetWeights in desk.answer(VIEW, FAILED, is_checking=True)
    assert desk.weights == {1: 1.0}


def test_no_epoch_is_missed_for_it() -> None:
    desk = held(VIEW)
    last_s = WAIT_S + 600.0 - BLOCKS_TO_SET * VIEW.block_s
    desk.now_s = last_s - 1
    assert desk.look(is_checking=True) == set()
    desk.now_s = last_s
    assert desk.look(is_checking=True) == BOTH
    assert SetWeights in desk.answer(VIEW, is_checking=True)


def test_right_before_an_epoch_nothing_waits() -> None:
    desk = Desk()
    desk.look(is_checking=True)
    desk.answer(LIMITED, is_checking=True)
    desk.now_s = WAIT_S
    desk.look(is_checking=True)
    soon = replace(VIEW, next_epoch_s=BLOCKS_TO_SET * VIEW.block_s)
    assert SetWeights in desk.answer(soon, is_checking=True)


def test_without_epochs_the_round_s_end_is_awaited() -> None:
    desk = held(replace(VIEW, next_epoch_s=None))
    desk.now_s += 1e6
    assert desk.look(is_checking=True) == set()
    assert desk.look(is_checking=False) == BOTH


@pytest.mark.parametrize("is_asked", [True, False], ids=["while the ledger is on its way", "after it has come"])
def test_no_weights_are_set_without_a_verdict_that_was_delivered(is_asked: bool) -> None:
    desk = Desk()
    desk.look(is_checking=False)
    if is_asked:
        desk.duty.on_sent(SendVerdict(FAILED))
        assert desk.answer(VIEW, is_checking=False) == {FetchLedger}, "what was on its way may lack it"
    else:
        desk.errands.ledger_arrived()
        desk.duty.on_ledger(ledger(), 0.0)
        desk.duty.on_sent(SendVerdict(FAILED))
        desk.errands.succeeded(FetchMetagraph())
        desk.duty.on_view(VIEW, 0.0)
        assert desk.look(is_checking=False) == {FetchLedger}
    assert SetWeights in desk.answer(VIEW, FAILED, is_checking=False)
    assert desk.weights == {1: 1.0}


def test_a_verdict_on_a_reduction_counts_too() -> None:
    desk = Desk()
    desk.look(is_checking=False)
    wrong = FAILED.model_copy(update={"subject": Subject.REDUCTION})
    desk.duty.on_sent(SendVerdict(wrong))
    assert desk.answer(VIEW, is_checking=False) == {FetchLedger}
