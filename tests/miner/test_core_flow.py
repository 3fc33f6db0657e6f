"""MinerCore while it trains: events in, lists of effects out, invariants after each event."""

import pytest
from flow_kit import admit, awaiting, body, forward, gradient_arrives, of_kind, refusal_code, replica_of, sent
from miner_kit import NOW_S, Driver, digest_of, hotkey_of

from orion.common.ids import DataId, Direction, Hotkey, MicrobatchId, Outcome, Phase
from orion.common.protocol.messages import (
    LeaseRequest,
    MicrobatchEnd,
    Refusal,
    RefusalCode,
)
from orion.miner.effects import (
    Accept,
    Compute,
    FreeTensors,
    Refuse,
    RequestLease,
)
from orion.miner.events import (
    Backward,
    BackwardDone,
    BackwardOffered,
    BodyEnded,
    ComputeEnded,
    ComputeRefused,
    Forward,
    ForwardDone,
    ForwardOffered,
    InnerStep,
    InnerStepDone,
    SendEnded,
    SendOutcome,
)

ONE, TWO = MicrobatchId(1), MicrobatchId(2)


# --- the straight way -------------------------------------------------------------------------------------------------


def test_first_stage_leases_runs_and_reports_a_trip() -> None:
    driver = Driver(0)
    assert driver.start() == [
        RequestLease(LeaseRequest(outer_step=0, next_microbatch_id=MicrobatchId(0), num_microbatches=4))
    ]

    assert driver.lease(1, 2, 3) == [Compute(Forward(ONE, DataId(101)))]
    effects = forward(driver, 1, after_s=1.0)
    send = sent(effects)
    assert send.peer in (hotkey_of(1, 0), hotkey_of(1, 1))
    assert send.transfer.path == (driver.me,)
    assert (send.transfer.to_stage, send.transfer.direction) == (1, Direction.ACTIVATION)
    assert send.transfer.digest == digest_of("z1")
    assert Compute(Forward(MicrobatchId(2), DataId(102))) in effects

    driver.handle(SendEnded(ONE, Direction.ACTIVATION, send.peer, SendOutcome.ACCEPTED, 0.01))
    effects = gradient_arrives(driver, 1, send.peer)
    assert of_kind(effects, Accept)

    # The device is still at the forward of 2; backward comes before the forward of 3, which takes too long to wait for.
    assert of_kind(effects, Compute) == [Compute(Backward(ONE))]
    assert of_kind(forward(driver, 2, after_s=1.0), Compute) == []
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
    assert of_kind(effects, Compute) == [Compute(InnerStep(0, 1.0)), Compute(Forward(MicrobatchId(3), DataId(103)))]
    driver.handle(ComputeEnded(InnerStepDone(2, None)))
    assert driver.core.heartbeat(0, 0).inner_step == 1


def test_the_first_stage_begins_nothing_whose_gradient_would_come_too_stale() -> None:
    driver = Driver(0, flow={"staleness_max": 0})
    driver.start()
    begun = of_kind(driver.lease(1, 2, 3, 4), Compute)
    assert begun == [Compute(Forward(ONE, DataId(101)))]
    peers = {}
    for number in (1, 2):
        effects = forward(driver, number, after_s=1.0)
        peers[number] = sent(effects).peer
        driver.handle(SendEnded(MicrobatchId(number), Direction.ACTIVATION, peers[number], SendOutcome.ACCEPTED, 0.01))
        begun += of_kind(effects, Compute)
    assert begun == [Compute(Forward(ONE, DataId(101))), Compute(Forward(TWO, DataId(102)))], "a batch is begun"

    for number in (1, 2):
        assert of_kind(gradient_arrives(driver, number, peers[number]), Compute) == [
            Compute(Backward(MicrobatchId(number)))
        ]
        begun = of_kind(driver.handle(ComputeEnded(BackwardDone(MicrobatchId(number), None))), Compute)
    assert begun == [Compute(InnerStep(0, 1.0))]
    begun = of_kind(driver.handle(ComputeEnded(InnerStepDone(2, None))), Compute)
    assert begun[0] == Compute(Forward(MicrobatchId(3), DataId(103)))


def test_while_it_is_open_whether_a_batch_is_full_nothing_is_decided() -> None:
    driver = Driver(2)
    driver.start()
    effects = [effect for number in (1, 2, 3) for effect in admit(driver, number)]
    assert of_kind(effects, Compute) == [Compute(Forward(ONE, DataId(101))), Compute(Forward(TWO, DataId(102)))]

    assert of_kind(driver.handle(ComputeEnded(ForwardDone(ONE, body("g1"), 3.5))), Compute) == []
    effects = driver.handle(ComputeEnded(ComputeRefused(TWO, "not finite")))

    assert of_kind(effects, Compute) == [Compute(Forward(MicrobatchId(3), DataId(103)))], "one gradient is missing"


def test_a_forward_waits_for_the_device_only_where_it_is_quick() -> None:
    for forward_s, num_ahead in ((0.05, 1), (0.5, 0)):
        driver = Driver(1)
        driver.start()
        for number in (1, 2, 3):
            admit(driver, number)
        effects = forward(driver, 1, after_s=forward_s)
        assert len(of_kind(effects, Compute)) == 1 + num_ahead


def test_a_backward_waits_for_the_device_however_long_it_takes() -> None:
    driver = Driver(1)
    driver.start()
    admit(driver, 1)
    peer = sent(forward(driver, 1, after_s=9.0)).peer
    driver.handle(SendEnded(ONE, Direction.ACTIVATION, peer, SendOutcome.ACCEPTED, 0.01))
    assert of_kind(admit(driver, 2), Compute) == [Compute(Forward(TWO, DataId(102)))]

    assert of_kind(gradient_arrives(driver, 1, peer), Compute) == [Compute(Backward(ONE))]

    assert sent(forward(driver, 2)).transfer.microbatch_id == TWO
    assert sent(driver.handle(ComputeEnded(BackwardDone(ONE, body("g1"))))).transfer.direction is Direction.GRADIENT


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
    assert refuse.refusal.queued == driver.spec.flow.in_flight_max
    first_s = refuse.refusal.retry_after_s
    (refuse,) = driver.handle(ForwardOffered(51, transfer.path[-1], driver.activation(51)))
    assert isinstance(refuse, Refuse) and refuse.refusal.retry_after_s is not None
    assert refuse.refusal.retry_after_s > first_s, "the first credit that becomes free is for the one that came before"


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
    elsewhere = driver.gradient(1, next_replica=replica_of(peer, 2), path=(hotkey_of(0, 1), hotkey_of(1, 1), peer))
    assert refusal_code(driver.handle(BackwardOffered(7, peer, elsewhere))) is RefusalCode.MALFORMED


def test_whoever_sent_an_activation_is_told_the_gradient_whatever_a_later_stage_believes() -> None:
    """One of the hops before may have been replaced, and the later stages need not have heard of that."""
    driver = Driver(1)
    driver.start()
    peer = awaiting(driver, 1)
    older = driver.gradient(1, next_replica=replica_of(peer, 2), path=(hotkey_of(0, 1), driver.me, peer))
    driver.handle(BackwardOffered(7, peer, older))
    driver.handle(BodyEnded(7, None))

    back = sent(driver.handle(ComputeEnded(BackwardDone(ONE, body("g1")))))

    assert (back.peer, back.transfer.path) == (hotkey_of(0, 0), (hotkey_of(0, 0), driver.me, peer))


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
