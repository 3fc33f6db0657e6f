"""MinerCore while it trains: events in, lists of effects out, invariants after each event."""

import pytest
from miner_kit import NOW_S, Driver, digest_of, hotkey_of

from orion.common.ids import DataId, Direction, Hotkey, MemberState, MicrobatchId, Outcome, Phase
from orion.common.protocol.messages import Cancel, LeaseRequest, MicrobatchEnd, Refusal, RefusalCode, Report, Transfer
from orion.miner.effects import (
    Accept,
    Compute,
    Effect,
    FreeTensors,
    ReadBody,
    Refuse,
    RequestLease,
    SendCancel,
    SendReport,
    SendTensor,
)
from orion.miner.events import (
    Backward,
    BackwardDone,
    BackwardOffered,
    BodyEnded,
    BodyRef,
    CancelArrived,
    ComputeEnded,
    ComputeRefused,
    Forward,
    ForwardDone,
    ForwardOffered,
    InnerStep,
    InnerStepDone,
    LeaseRefused,
    ReportEnded,
    SendEnded,
    SendOutcome,
    Ticked,
)

ONE = MicrobatchId(1)


def body(name: str) -> BodyRef:
    return BodyRef(digest_of(name), 10)


def of_kind(effects: list[Effect], kind: type) -> list[Effect]:
    return [effect for effect in effects if isinstance(effect, kind)]


def refusal_code(effects: list[Effect]) -> RefusalCode:
    (refuse,) = of_kind(effects, Refuse)
    assert isinstance(refuse, Refuse)
    return refuse.refusal.code


def reported(effects: list[Effect]) -> Report:
    (send,) = of_kind(effects, SendReport)
    assert isinstance(send, SendReport)
    return send.report


def sent(effects: list[Effect]) -> SendTensor:
    (send,) = of_kind(effects, SendTensor)
    assert isinstance(send, SendTensor)
    return send


def admit(driver: Driver, number: int, request_id: int | None = None) -> list[Effect]:
    """An activation is offered and its body arrives."""
    request_id = number if request_id is None else request_id
    transfer = driver.activation(number)
    assert driver.handle(ForwardOffered(request_id, transfer.path[-1], transfer)) == [ReadBody(request_id)]
    return driver.handle(BodyEnded(request_id, None))


def forward(driver: Driver, number: int) -> list[Effect]:
    """The device ends the forward of a microbatch."""
    return driver.handle(ComputeEnded(ForwardDone(MicrobatchId(number), body(f"z{number}"), None)))


def awaiting(driver: Driver, number: int) -> Hotkey:
    """A microbatch goes all the way to the next stage; who took it."""
    admit(driver, number)
    peer = sent(forward(driver, number)).peer
    driver.handle(SendEnded(MicrobatchId(number), Direction.ACTIVATION, peer, SendOutcome.ACCEPTED, 0.01))
    return peer


def replica_of(peer: Hotkey, stage_index: int) -> int:
    return 0 if peer == hotkey_of(stage_index, 0) else 1


def gradient_arrives(driver: Driver, number: int, peer: Hotkey) -> list[Effect]:
    transfer = driver.gradient(number, next_replica=replica_of(peer, driver.stage_index + 1))
    assert ReadBody(900 + number) in driver.handle(BackwardOffered(900 + number, peer, transfer))
    return driver.handle(BodyEnded(900 + number, None))


# --- the straight way -------------------------------------------------------------------------------------------------


def test_first_stage_leases_runs_and_reports_a_trip() -> None:
    driver = Driver(0)
    assert driver.start() == [RequestLease(LeaseRequest(outer_step=0, num_microbatches=6))]

    assert driver.lease(1, 2, 3) == [Compute(Forward(ONE, DataId(101)))]
    effects = forward(driver, 1)
    send = sent(effects)
    assert send.peer in (hotkey_of(1, 0), hotkey_of(1, 1))
    assert send.transfer.path == (driver.me,)
    assert (send.transfer.to_stage, send.transfer.direction) == (1, Direction.ACTIVATION)
    assert send.transfer.digest == digest_of("z1")
    assert Compute(Forward(MicrobatchId(2), DataId(102))) in effects

    driver.handle(SendEnded(ONE, Direction.ACTIVATION, send.peer, SendOutcome.ACCEPTED, 0.01))
    effects = gradient_arrives(driver, 1, send.peer)
    assert of_kind(effects, Accept)

    # The device is still at the forward of 2; backward comes before the forward of 3.
    effects = forward(driver, 2)
    assert of_kind(effects, Compute) == [Compute(Backward(ONE))]
    effects = driver.handle(ComputeEnded(BackwardDone(ONE, None)))
    assert FreeTensors(ONE) in effects
    assert Compute(Forward(MicrobatchId(3), DataId(103))) in effects

    path = (driver.me, send.peer, hotkey_of(2, replica_of(send.peer, 1)))
    assert driver.ends() == [MicrobatchEnd(microbatch_id=ONE, outcome=Outcome.APPLIED, loss=2.5, path=path)]
    assert [receipt.direction for receipt in driver.receipts()] == [Direction.ACTIVATION, Direction.GRADIENT]


def test_middle_stage_passes_an_activation_on_and_its_gradient_back() -> None:
    driver = Driver(1)
    driver.start()

    effects = admit(driver, 1)
    assert of_kind(effects, Compute) == [Compute(Forward(ONE, DataId(101)))]
    (accept,) = of_kind(effects, Accept)
    assert isinstance(accept, Accept)
    assert accept.accepted.credits == driver.spec.flow.in_flight_max - 1

    send = sent(forward(driver, 1))
    assert send.transfer.path == (hotkey_of(0, 0), driver.me)
    driver.handle(SendEnded(ONE, Direction.ACTIVATION, send.peer, SendOutcome.ACCEPTED, 0.01))
    effects = gradient_arrives(driver, 1, send.peer)
    assert of_kind(effects, Compute) == [Compute(Backward(ONE))]

    back = sent(driver.handle(ComputeEnded(BackwardDone(ONE, body("g1")))))
    assert back.peer == hotkey_of(0, 0)
    assert (back.transfer.to_stage, back.transfer.loss) == (0, 2.5)
    assert back.transfer.path == (hotkey_of(0, 0), driver.me, send.peer)
    effects = driver.handle(SendEnded(ONE, Direction.GRADIENT, back.peer, SendOutcome.ACCEPTED, 0.01))
    assert FreeTensors(ONE) in effects
    assert driver.core.heartbeat(0, 0).applied == 1


def test_last_stage_has_the_gradient_after_its_forward() -> None:
    driver = Driver(2)
    driver.start()
    admit(driver, 1)

    back = sent(driver.handle(ComputeEnded(ForwardDone(ONE, body("g1"), 3.5))))

    assert back.peer == hotkey_of(1, 0)
    assert back.transfer.path == (hotkey_of(0, 0), hotkey_of(1, 0), driver.me)
    assert (back.transfer.loss, back.transfer.direction) == (3.5, Direction.GRADIENT)


def test_single_stage_ends_a_trip_by_itself() -> None:
    driver = Driver(0, num_stages=1)
    driver.start()
    driver.lease(1)

    effects = driver.handle(ComputeEnded(ForwardDone(ONE, None, 3.5)))

    assert FreeTensors(ONE) in effects
    expected = MicrobatchEnd(microbatch_id=ONE, outcome=Outcome.APPLIED, loss=3.5, path=(driver.me,))
    assert driver.ends() == [expected]


def test_an_inner_step_comes_as_soon_as_a_batch_is_full() -> None:
    driver = Driver(2)
    driver.start()
    for number in (1, 2, 3):
        admit(driver, number)

    driver.handle(ComputeEnded(ForwardDone(ONE, body("g1"), 3.5)))
    effects = driver.handle(ComputeEnded(ForwardDone(MicrobatchId(2), body("g2"), 3.5)))
    assert of_kind(effects, Compute) == [Compute(InnerStep(0, 1.0))]
    effects = driver.handle(ComputeEnded(InnerStepDone(2, None)))
    assert of_kind(effects, Compute) == [Compute(Forward(MicrobatchId(3), DataId(103)))]
    assert driver.core.heartbeat(0, 0).inner_step == 1


# --- admission --------------------------------------------------------------------------------------------------------


def test_credits_bound_what_is_held_and_busy_says_when_to_come_again() -> None:
    driver = Driver(1)
    driver.start()
    for number in range(driver.spec.flow.in_flight_max):
        admit(driver, number)

    transfer = driver.activation(50)
    (refuse,) = driver.handle(ForwardOffered(50, transfer.path[-1], transfer))

    assert isinstance(refuse, Refuse)
    assert refuse.refusal.code is RefusalCode.BUSY
    assert refuse.refusal.retry_after_s is not None and refuse.refusal.retry_after_s > 0


def test_a_duplicate_is_accepted_without_effect() -> None:
    driver = Driver(1)
    driver.start()
    admit(driver, 1)
    transfer = driver.activation(1)

    effects = driver.handle(ForwardOffered(7, transfer.path[-1], transfer))

    assert [type(effect) for effect in effects] == [Accept]


def test_a_duplicate_of_a_body_that_is_being_read_is_asked_to_wait() -> None:
    driver = Driver(1)
    driver.start()
    transfer = driver.activation(1)
    driver.handle(ForwardOffered(1, transfer.path[-1], transfer))

    assert refusal_code(driver.handle(ForwardOffered(2, transfer.path[-1], transfer))) is RefusalCode.BUSY


def test_after_its_end_an_applied_microbatch_is_still_known() -> None:
    driver = Driver(2)
    driver.start()
    admit(driver, 1)
    back = sent(driver.handle(ComputeEnded(ForwardDone(ONE, body("g1"), 3.5))))
    driver.handle(SendEnded(ONE, Direction.GRADIENT, back.peer, SendOutcome.ACCEPTED, 0.01))
    transfer = driver.activation(1)

    assert of_kind(driver.handle(ForwardOffered(7, transfer.path[-1], transfer)), Accept)
    other = transfer.model_copy(update={"digest": digest_of("other")})
    assert refusal_code(driver.handle(ForwardOffered(8, transfer.path[-1], other))) is RefusalCode.CONFLICT


@pytest.mark.parametrize(
    ("fields", "code"),
    [
        ({"to_stage": 2}, RefusalCode.WRONG_STAGE),
        ({"outer_step": 3}, RefusalCode.BUSY),
        ({"deadline_s": NOW_S - 1}, RefusalCode.CONFLICT),
        ({"path": (hotkey_of(1, 1), hotkey_of(0, 0))}, RefusalCode.MALFORMED),
        ({"path": (hotkey_of(0, 1),)}, RefusalCode.MALFORMED),
        ({"direction": Direction.GRADIENT}, RefusalCode.MALFORMED),
    ],
)
def test_what_does_not_fit_is_refused(fields: dict[str, object], code: RefusalCode) -> None:
    driver = Driver(1)
    driver.start()
    transfer = driver.activation(1, **fields)

    assert refusal_code(driver.handle(ForwardOffered(1, hotkey_of(0, 0), transfer))) is code
    assert driver.core.heartbeat(0, 0).in_flight == 0


def test_an_older_outer_step_is_refused_for_good() -> None:
    driver = Driver(1)
    driver.world.set_phase(Phase.TRAIN, 2)
    driver.start()

    effects = driver.handle(ForwardOffered(1, hotkey_of(0, 0), driver.activation(1, outer_step=1)))

    assert refusal_code(effects) is RefusalCode.WRONG_PHASE


@pytest.mark.parametrize("sender", [hotkey_of(2, 0), hotkey_of(1, 1), hotkey_of(9, 7)])
def test_only_the_stage_before_may_send_activations(sender: Hotkey) -> None:
    driver = Driver(1)
    driver.start()
    transfer = driver.activation(1, path=(sender,))

    assert refusal_code(driver.handle(ForwardOffered(1, sender, transfer))) is RefusalCode.FORBIDDEN


def test_a_gradient_is_taken_only_from_where_the_activation_went() -> None:
    driver = Driver(1)
    driver.start()
    peer = awaiting(driver, 1)
    other = hotkey_of(2, 1 - replica_of(peer, 2))
    transfer = driver.gradient(1, next_replica=1 - replica_of(peer, 2))

    assert refusal_code(driver.handle(BackwardOffered(5, other, transfer))) is RefusalCode.CONFLICT
    unknown = driver.gradient(44, next_replica=replica_of(peer, 2))
    assert refusal_code(driver.handle(BackwardOffered(6, peer, unknown))) is RefusalCode.NOT_FOUND
    lost_path = driver.gradient(1, next_replica=replica_of(peer, 2), path=(hotkey_of(0, 1), driver.me, peer))
    assert refusal_code(driver.handle(BackwardOffered(7, peer, lost_path))) is RefusalCode.CONFLICT


def test_a_body_that_fails_frees_its_credit() -> None:
    driver = Driver(1)
    driver.start()
    transfer = driver.activation(1)
    driver.handle(ForwardOffered(1, transfer.path[-1], transfer))
    refusal = Refusal(code=RefusalCode.DIGEST_MISMATCH, message="body is not what its digest says")

    effects = driver.handle(BodyEnded(1, refusal))

    assert effects == [Refuse(1, refusal), FreeTensors(ONE)]
    assert driver.core.heartbeat(0, 0).in_flight == 0


def test_a_gradient_whose_body_fails_may_come_again() -> None:
    driver = Driver(1)
    driver.start()
    peer = awaiting(driver, 1)
    transfer = driver.gradient(1, next_replica=replica_of(peer, 2))
    driver.handle(BackwardOffered(5, peer, transfer))

    driver.handle(BodyEnded(5, Refusal(code=RefusalCode.NOT_FINITE, message="")))

    assert Compute(Backward(ONE)) in gradient_arrives(driver, 1, peer)


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
    driver = Driver(2)
    driver.start()
    admit(driver, 1)
    back = sent(driver.handle(ComputeEnded(ForwardDone(ONE, body("g1"), 3.5))))
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


def test_when_the_next_hop_dies_both_ways_are_freed() -> None:
    driver = Driver(1)
    driver.start()
    peer = awaiting(driver, 1)
    driver.world.gone = {peer}

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
        driver.handle(ComputeEnded(BackwardDone(MicrobatchId(number), body("g"))))
        assert freed == []
        freed = of_kind(driver.handle(ComputeEnded(InnerStepDone(1, None))), FreeTensors)

    assert freed == [FreeTensors(ONE)]


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
