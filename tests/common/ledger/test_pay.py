"""A miner's pay says everything that its score follows from."""

from ledger_kit import SignedLedger
from test_reading import make_spec

from orion.common.ids import Hotkey, Subject
from orion.common.ledger.pay import miner_pay
from orion.common.ledger.scoring import scores
from orion.common.ledger.sheet import make_sheet
from orion.common.protocol.entries import OuterStepOpened
from orion.common.protocol.records import Verdict
from orion.common.protocol.signing import hotkey_of, keypair_from_uri

VALIDATOR_KEY = keypair_from_uri("//validator")


def pay_of(ledger: SignedLedger, hotkey: Hotkey):  # type: ignore[no-untyped-def]
    return miner_pay(ledger.reading.book, ledger.summary(), ledger.spec, hotkey)


def test_pay_names_work_checks_merges_and_scores() -> None:
    ledger = SignedLedger(make_spec())
    honest, caught = hotkey_of(ledger.keys[1][0]), hotkey_of(ledger.keys[1][1])
    ledger.train(4, 0)
    ledger.train(3, 1)
    ledger.merge(absent=[caught])
    ledger.says(
        VALIDATOR_KEY, None, Verdict(miner=caught, outer_step=0, passed=False, num_operations=2, reason="noise")
    )
    ledger.says(
        VALIDATOR_KEY, None, Verdict(miner=honest, outer_step=0, subject=Subject.WHOLE, passed=True, num_operations=2)
    )
    uids = {hotkey_of(key): uid for uid, key in enumerate(key for keys in ledger.keys for key in keys)}
    ledger.says(VALIDATOR_KEY, None, make_sheet(ledger.summary(), ledger.spec, uids, None, 1.0))
    good, bad = pay_of(ledger, honest), pay_of(ledger, caught)
    earned = scores(ledger.summary(), ledger.spec)
    assert good.score == earned[honest] == sum(step.counted_flops for step in good.steps) > 0
    assert (good.verified_outer_step, bad.verified_outer_step) == (0, None)
    assert (good.waiting_flops, good.counted_flops) == (0.0, good.score)
    assert bad.waiting_flops == bad.counted_flops > 0
    assert good.paid_again_from is None
    (step,) = good.steps
    assert (step.num_credited, step.num_committed, step.stage_index) == (4, 4, 1)
    assert step.num_receipts == step.num_matched == 4 * 4
    assert step.merge is not None and step.merge.num_merged == step.merge.num_settled
    (given,) = good.scores
    assert (given.validator, given.score) == (hotkey_of(VALIDATOR_KEY), good.score) and given.weight > 0
    assert (bad.score, bad.scores[0].weight) == (0.0, 0.0)
    assert bad.paid_again_from == ledger.spec.validation.score_window_outer_steps
    (step,) = bad.steps
    assert step.failed and [record.verdict.reason for record in step.verdicts] == ["noise"]
    assert step.merge is not None and step.merge.num_merged == 0


def test_pay_says_how_much_of_the_work_waits_for_verification() -> None:
    ledger = SignedLedger(make_spec())
    miner, spec = hotkey_of(ledger.keys[1][0]), ledger.spec
    ledger.train(4, 0)
    ledger.says(
        VALIDATOR_KEY, None, Verdict(miner=miner, outer_step=0, subject=Subject.WHOLE, passed=True, num_operations=2)
    )
    ledger.fact(OuterStepOpened(outer_step=1))
    ledger.train(2, 0)
    assert [step.waiting for step in pay_of(ledger, miner).steps] == [False, False]
    for number in range(spec.num_stages * spec.replicas + 1):
        validator_key = keypair_from_uri(f"//validator/{number}")
        other = hotkey_of(keypair_from_uri(f"//other/{number}"))
        ledger.says(validator_key, None, Verdict(miner=other, outer_step=1, passed=True, num_operations=2))
    pay = pay_of(ledger, miner)
    assert [step.waiting for step in pay.steps] == [False, True], "a whole turn of checks later"
    assert pay.waiting_flops == pay.steps[1].counted_flops == pay.counted_flops / 3 > 0
    assert pay.score == pay.counted_flops - pay.waiting_flops + pay.waiting_flops * pay.unverified_factor


def test_one_sided_receipts_are_counted_and_earn_nothing() -> None:
    ledger = SignedLedger(make_spec())
    ledger.train(2, 0)
    miner = hotkey_of(ledger.keys[2][0])
    before = pay_of(ledger, miner)
    known = ledger.reading.book.steps[0].trips
    (hop,) = [hop for hop in next(iter(known.values())).hops if hop.sender == miner]
    receipt = {
        "direction": hop.direction,
        "microbatch_id": next(iter(known)),
        "outer_step": 0,
        "sender": miner,
        "receiver": hotkey_of(ledger.keys[1][1]),
        "to_stage": hop.to_stage,
        "digest": "d" * 64,
        "size_bytes": 64,
    }
    ledger.report(ledger.keys[2][0], 2, receipts=(receipt,))
    after = pay_of(ledger, miner)
    assert after.score == before.score
    assert after.steps[0].num_receipts - after.steps[0].num_matched == 1
