"""MinerCore as it passes work on, lets go of it and reports it: invariants after each event."""

import pytest
from flow_kit import admit, awaiting, body, forward, gradient_arrives, of_kind, refusal_code, replica_of, reported, sent
from miner_kit import NOW_S, Driver, hotkey_of

from orion.common.ids import Direction, Hotkey, MemberState, MicrobatchId, Outcome, Phase
from orion.common.protocol.messages import (
    Cancel,
    RefusalCode,
    Transfer,
)
from orion.miner.core import FEED_REFRESH_S
from orion.miner.effects import (
    Compute,
    DropGraph,
    Effect,
    FreeTensors,
    ReadBody,
    RefreshFeed,
    RequestLease,
    SendCancel,
    SendReport,
    SendTensor,
)
from orion.miner.events import (
    BackwardDone,
    BackwardOffered,
    BodyEnded,
    CancelArrived,
    ComputeEnded,
    ComputeRefused,
    ForwardDone,
    ForwardOffered,
    InnerStepDone,
    LeaseRefused,
    ReportEnded,
    SendEnded,
    SendOutcome,
    StrangerAsked,
    Ticked,
)

ONE = MicrobatchId(1)


# --- sending on -------------------------------------------------------------------------------------------------------


def first_send(driver: Driver) -> SendTensor:
    driver.start()
    admit(driver, 1)
    return sent(forward(driver, 1))


def other_of(peer: Hotkey) -> Hotkey:
    return hotkey_of(2, 1 - replica_of(peer, 2))


def end_send(
    driver: Driver, peer: Hotkey, outcome: SendOutcome, code: RefusalCode | None = None, retry_s: float | None = None
) -> list[Effect]:
    return driver.handle(SendEnded(ONE, Direction.ACTIVATION, peer, outcome, 0.01, code=code, retry_after_s=retry_s))


def test_a_busy_replica_is_passed_over_for_another() -> None:
    driver = Driver(1)
    send = first_send(driver)

    effects = end_send(driver, send.peer, SendOutcome.BUSY, retry_s=0.5)
    assert sent(effects).peer == other_of(send.peer)
    assert end_send(driver, other_of(send.peer), SendOutcome.BUSY, retry_s=0.3) == []
    assert driver.core.next_wake_s(driver.now_s) == pytest.approx(driver.now_s + 0.2, abs=0.11)
    assert sent(driver.handle(Ticked(), after_s=0.31)).peer == other_of(send.peer)


def test_an_unreachable_replica_is_told_to_let_go_and_not_asked_again() -> None:
    driver = Driver(1)
    send = first_send(driver)

    effects = end_send(driver, send.peer, SendOutcome.UNREACHABLE)

    (cancel,) = of_kind(effects, SendCancel)
    assert isinstance(cancel, SendCancel)
    assert (cancel.peer, cancel.cancel.microbatch_id) == (send.peer, ONE)
    assert sent(effects).peer == other_of(send.peer)
    effects = end_send(driver, other_of(send.peer), SendOutcome.REFUSED, RefusalCode.BAD_TENSOR)
    assert FreeTensors(ONE) in effects
    (cancel,) = of_kind(effects, SendCancel)
    assert isinstance(cancel, SendCancel)
    assert cancel.peer == hotkey_of(0, 0), "the stage before hears that the trip is over"


def test_a_replica_whose_feed_lags_is_asked_again() -> None:
    driver = Driver(1)
    send = first_send(driver)
    driver.world.gone = {other_of(send.peer)}
    driver.tell()

    assert of_kind(end_send(driver, send.peer, SendOutcome.REFUSED, RefusalCode.WRONG_PHASE), SendTensor) == []
    assert sent(driver.handle(Ticked(), after_s=0.2)).peer == send.peer


def test_nothing_is_sent_to_a_stage_that_is_still_merging() -> None:
    driver = Driver(1)
    driver.world.phases[2] = Phase.MERGE
    driver.start()
    admit(driver, 1)

    assert of_kind(forward(driver, 1), SendTensor) == []
    driver.world.phases[2] = Phase.TRAIN
    assert len(of_kind(driver.tell(), SendTensor)) == 1


def test_a_gradient_that_overtakes_the_answer_counts_as_acceptance() -> None:
    driver = Driver(1)
    send = first_send(driver)

    gradient_arrives(driver, 1, send.peer)
    effects = end_send(driver, send.peer, SendOutcome.UNREACHABLE)

    assert of_kind(effects, SendCancel) == []
    directions = [receipt.direction for receipt in driver.receipts()]
    assert sorted(directions) == [Direction.ACTIVATION, Direction.ACTIVATION, Direction.GRADIENT]
    assert sent(driver.handle(ComputeEnded(BackwardDone(ONE, body("g1"))))).peer == hotkey_of(0, 0)


def test_a_late_acceptance_of_what_was_cancelled_is_cancelled_again() -> None:
    driver = Driver(1)
    send = first_send(driver)
    cancel = Cancel(microbatch_id=ONE, outer_step=0, reason="test")
    effects = driver.handle(CancelArrived(hotkey_of(0, 0), cancel))
    assert FreeTensors(ONE) in effects and len(of_kind(effects, SendCancel)) == 1

    (late,) = of_kind(end_send(driver, send.peer, SendOutcome.ACCEPTED), SendCancel)

    assert isinstance(late, SendCancel) and late.peer == send.peer


def test_a_gradient_is_returned_again_and_again_but_not_for_ever() -> None:
    driver = Driver(1)
    driver.start()
    peer = awaiting(driver, 1)
    gradient_arrives(driver, 1, peer)
    back = sent(driver.handle(ComputeEnded(BackwardDone(ONE, body("g1")))))
    attempts = 1
    effects = driver.handle(SendEnded(ONE, Direction.GRADIENT, back.peer, SendOutcome.UNREACHABLE, 1.0))
    while FreeTensors(ONE) not in effects:
        assert len(of_kind(driver.handle(Ticked(), after_s=4.0), SendTensor)) == 1
        attempts += 1
        effects = driver.handle(SendEnded(ONE, Direction.GRADIENT, back.peer, SendOutcome.UNREACHABLE, 1.0))

    assert attempts == 5
    assert driver.core.heartbeat(0, 0).applied == 1, "it was applied here, whatever became of the gradient"


# --- ending early -----------------------------------------------------------------------------------------------------


def test_a_cancel_goes_on_to_the_other_side() -> None:
    driver = Driver(1)
    driver.start()
    peer = awaiting(driver, 1)
    cancel = Cancel(microbatch_id=ONE, outer_step=0, reason="test")

    assert driver.handle(CancelArrived(other_of(peer), cancel)) == [], "not from somebody off the path"
    effects = driver.handle(CancelArrived(peer, cancel))

    (told,) = of_kind(effects, SendCancel)
    assert isinstance(told, SendCancel) and told.peer == hotkey_of(0, 0)
    assert FreeTensors(ONE) in effects
    assert driver.handle(CancelArrived(peer, cancel)) == [], "again changes nothing"


def test_a_cancel_during_a_forward_waits_for_the_device() -> None:
    driver = Driver(1)
    driver.start()
    admit(driver, 1)
    cancel = Cancel(microbatch_id=ONE, outer_step=0, reason="test")

    assert of_kind(driver.handle(CancelArrived(hotkey_of(0, 0), cancel)), FreeTensors) == []
    effects = forward(driver, 1)

    assert of_kind(effects, FreeTensors) == [FreeTensors(ONE)]
    assert of_kind(effects, SendTensor) == []


def test_a_cancel_during_the_last_stages_pass_comes_too_late() -> None:
    driver = Driver(2)
    driver.start()
    admit(driver, 1)
    driver.handle(CancelArrived(hotkey_of(1, 0), Cancel(microbatch_id=ONE, outer_step=0, reason="test")))

    effects = driver.handle(ComputeEnded(ForwardDone(ONE, body("g1"), 3.5)))

    assert of_kind(effects, FreeTensors) == [FreeTensors(ONE)] and of_kind(effects, SendTensor) == []
    assert driver.core.heartbeat(0, 0).applied == 1


def test_when_every_next_hop_dies_both_ways_are_freed() -> None:
    driver = Driver(1)
    driver.start()
    awaiting(driver, 1)
    driver.world.gone = {hotkey_of(2, 0), hotkey_of(2, 1)}

    effects = driver.tell()

    assert FreeTensors(ONE) in effects
    told = [effect.peer for effect in effects if isinstance(effect, SendCancel)]
    assert told == [hotkey_of(0, 0)]


def test_when_the_stage_before_dies_the_next_hop_is_told() -> None:
    driver = Driver(1)
    driver.start()
    peer = awaiting(driver, 1)
    driver.world.gone = {hotkey_of(0, 0)}

    effects = driver.tell()

    assert FreeTensors(ONE) in effects
    assert [effect.peer for effect in effects if isinstance(effect, SendCancel)] == [peer]


def test_everything_is_freed_at_its_deadline() -> None:
    driver = Driver(1)
    driver.start()
    peer = awaiting(driver, 1)
    wake_s = driver.core.next_wake_s(driver.now_s)
    assert wake_s is not None and wake_s <= driver.now_s + 51

    effects = driver.handle(Ticked(), after_s=51)

    assert FreeTensors(ONE) in effects
    assert {effect.peer for effect in effects if isinstance(effect, SendCancel)} == {peer, hotkey_of(0, 0)}


def test_a_peers_deadline_is_not_believed_beyond_the_runs_own() -> None:
    driver = Driver(1)
    driver.start()
    transfer = driver.activation(1, deadline_s=NOW_S + 1e6)
    driver.handle(ForwardOffered(1, transfer.path[-1], transfer))
    driver.handle(BodyEnded(1, None))
    forward(driver, 1)

    effects = driver.handle(Ticked(), after_s=driver.spec.time_limits.microbatch_s + 1)

    assert FreeTensors(ONE) in effects


def test_what_the_device_cannot_use_is_cancelled() -> None:
    driver = Driver(1)
    driver.start()
    admit(driver, 1)

    effects = driver.handle(ComputeEnded(ComputeRefused(ONE, "not finite")))

    assert FreeTensors(ONE) in effects
    assert [effect.peer for effect in effects if isinstance(effect, SendCancel)] == [hotkey_of(0, 0)]


def test_a_microbatch_that_grew_too_stale_is_cancelled() -> None:
    driver = Driver(1, flow={"staleness_max": 1, "in_flight_max": 8}, microbatches_per_step=1)
    driver.start()
    awaiting(driver, 1)
    freed: list[Effect] = []
    for number in (2, 3):
        peer = awaiting(driver, number)
        gradient_arrives(driver, number, peer)
        assert freed == []
        effects = driver.handle(ComputeEnded(BackwardDone(MicrobatchId(number), body("g"))))
        (step,) = of_kind(effects, Compute)
        freed = of_kind(effects, FreeTensors)
        assert not freed or effects.index(freed[0]) < effects.index(step), "its version must go before another is made"
        driver.handle(ComputeEnded(InnerStepDone(1, None)))

    assert freed == [FreeTensors(ONE)]


def test_a_gradient_that_comes_in_too_slowly_keeps_no_graph_alive() -> None:
    driver = Driver(1, flow={"staleness_max": 0, "in_flight_max": 8}, microbatches_per_step=1)
    driver.start()
    slow, quick = awaiting(driver, 1), awaiting(driver, 2)
    transfer = driver.gradient(1, next_replica=replica_of(slow, 2))
    assert ReadBody(71) in driver.handle(BackwardOffered(71, slow, transfer))
    gradient_arrives(driver, 2, quick)

    effects = driver.handle(ComputeEnded(BackwardDone(MicrobatchId(2), body("g"))))

    assert DropGraph(ONE) in effects and FreeTensors(ONE) not in effects
    driver.handle(ComputeEnded(InnerStepDone(1, None)))
    effects = driver.handle(BodyEnded(71, None))
    assert refusal_code(effects) is RefusalCode.CONFLICT
    assert FreeTensors(ONE) in effects


def test_losing_membership_frees_everything() -> None:
    driver = Driver(1)
    driver.start()
    awaiting(driver, 1)
    driver.world.state = None

    assert FreeTensors(ONE) in driver.tell()
    driver.world.state = MemberState.GONE
    driver.tell()
    assert (
        refusal_code(driver.handle(ForwardOffered(8, hotkey_of(0, 0), driver.activation(8)))) is RefusalCode.NOT_MEMBER
    )


# --- leases and reports -----------------------------------------------------------------------------------------------


def test_leases_are_asked_for_within_the_credits_and_again_after_a_pause() -> None:
    driver = Driver(0)
    driver.start()

    assert driver.handle(LeaseRefused(0.5)) == []
    (request,) = driver.handle(Ticked(), after_s=0.6)
    assert isinstance(request, RequestLease)
    driver.lease(1, 2, 3, 4, 5, 6)
    assert of_kind(driver.handle(Ticked(), after_s=5.0), RequestLease) == []


def test_a_lease_that_comes_too_late_is_given_back() -> None:
    driver = Driver(0)
    driver.start()
    driver.world.set_phase(Phase.UPLOAD, 0)
    driver.tell()

    driver.lease(1)

    assert [(end.microbatch_id, end.outcome) for end in driver.ends()] == [(ONE, Outcome.CANCELLED)]


def test_reports_are_numbered_without_gaps_and_repeated_until_acknowledged() -> None:
    driver = Driver(0, num_stages=1)
    driver.start()
    driver.lease(1, 2)
    first = reported(driver.handle(ComputeEnded(ForwardDone(ONE, None, 3.5))))
    assert first.sequence == 0 and len(first.ends) == 1
    effects = driver.handle(ComputeEnded(ForwardDone(MicrobatchId(2), None, 3.5)))
    assert of_kind(effects, SendReport) == [], "one at a time"

    assert of_kind(driver.handle(ReportEnded(0, False)), SendReport) == []
    assert of_kind(driver.handle(Ticked(), after_s=0.1), SendReport) == []
    assert reported(driver.handle(Ticked(), after_s=1.0)) == first
    second = reported(driver.handle(ReportEnded(0, True)))
    assert second.sequence == 1 and len(second.ends) == 1
    assert of_kind(driver.handle(ReportEnded(0, True)), SendReport) == [], "an old acknowledgement changes nothing"


def test_both_ends_make_the_same_receipt() -> None:
    sender, receiver = Driver(0), Driver(1)
    sender.world.gone = {hotkey_of(1, 1)}
    sender.start()
    receiver.start()
    sender.lease(1)
    transfer = sent(forward(sender, 1)).transfer
    assert isinstance(transfer, Transfer)
    receiver.handle(ForwardOffered(1, sender.me, transfer))
    receiver.handle(BodyEnded(1, None))
    sender.handle(SendEnded(ONE, Direction.ACTIVATION, receiver.me, SendOutcome.ACCEPTED, 0.1))

    (receipt,) = sender.receipts()
    assert receiver.receipts() == [receipt]
    assert (receipt.sender, receipt.receiver) == (sender.me, receiver.me)


# --- questions of strangers -------------------------------------------------------------------------------------------


def test_a_stranger_makes_the_miner_look_at_the_feed_again_but_not_all_the_time() -> None:
    driver = Driver(1)
    driver.start()
    assert driver.handle(StrangerAsked()) == [RefreshFeed()]
    assert driver.handle(StrangerAsked()) == []
    driver.now_s += FEED_REFRESH_S
    assert driver.handle(StrangerAsked()) == [RefreshFeed()]
