"""MinerCore when a miner of the next stage, or of the stage before, is lost while it holds a microbatch."""

import pytest
from flow_kit import admit, awaiting, body, forward, gradient_arrives, of_kind, refusal_code, sent
from miner_kit import Driver, digest_of, hotkey_of

from orion.common.ids import Direction, Hotkey, MicrobatchId
from orion.common.protocol.messages import Cancel, HoldsQuery, RefusalCode, Transfer
from orion.miner.effects import (
    Accept,
    AnswerHolds,
    AskHolds,
    Compute,
    Effect,
    FreeAllButGradient,
    FreeTensors,
    ReadBody,
    Refuse,
    SendCancel,
    SendTensor,
)
from orion.miner.events import (
    Backward,
    BackwardDone,
    BackwardOffered,
    BodyEnded,
    CancelArrived,
    ComputeEnded,
    ForwardDone,
    ForwardOffered,
    HoldsAsked,
    HoldsEnded,
    SendEnded,
    SendOutcome,
    Ticked,
)
from orion.miner.repair import SEEK_S
from orion.miner.splice import ORPHAN_S
from orion.miner.watch import MISSES_MAX, PATIENCE_MIN_S, SILENCE_S

ONE = MicrobatchId(1)


def other_of(peer: Hotkey) -> Hotkey:
    stage_index = next(stage for stage in range(4) for replica in range(2) if hotkey_of(stage, replica) == peer)
    return hotkey_of(stage_index, 0) if peer == hotkey_of(stage_index, 1) else hotkey_of(stage_index, 1)


def questions(effects: list[Effect]) -> list[AskHolds]:
    return [effect for effect in effects if isinstance(effect, AskHolds)]


def cancelled(effects: list[Effect]) -> list[Hotkey]:
    return [effect.peer for effect in effects if isinstance(effect, SendCancel)]


def told(effects: list[Effect]) -> tuple[MicrobatchId, ...]:
    (answer,) = of_kind(effects, AnswerHolds)
    assert isinstance(answer, AnswerHolds)
    return answer.holds.microbatch_ids


def end(driver: Driver, question: AskHolds, outcome: SendOutcome, *held: MicrobatchId) -> list[Effect]:
    return driver.handle(HoldsEnded(question.peer, question.query, outcome, 0.01, held))


def silence(driver: Driver) -> AskHolds:
    """Nothing is heard of the next hop for a while; what it is asked."""
    (question,) = questions(driver.handle(Ticked(), after_s=SILENCE_S + 0.01))
    assert question.query.lost is None
    return question


def lose_next_hop(driver: Driver) -> list[Effect]:
    """The next hop does not answer any more; what follows."""
    question = silence(driver)
    effects: list[Effect] = []
    for _ in range(MISSES_MAX):
        effects = end(driver, question, SendOutcome.UNREACHABLE)
    return effects


def accepted(driver: Driver, peer: Hotkey, *, adopted: bool = False) -> list[Effect]:
    return driver.handle(SendEnded(ONE, Direction.ACTIVATION, peer, SendOutcome.ACCEPTED, 0.01, adopted=adopted))


# --- the stage before the lost one ------------------------------------------------------------------------------------


def test_a_silent_next_hop_is_asked_and_believed() -> None:
    driver = Driver(1)
    driver.start()
    peer = awaiting(driver, 1)

    question = silence(driver)

    assert (question.peer, question.query.microbatch_ids) == (peer, (ONE,))
    assert end(driver, question, SendOutcome.ACCEPTED, ONE) == []
    assert driver.handle(Ticked(), after_s=SILENCE_S / 2) == []
    assert silence(driver).peer == peer, "again after the next silence"


@pytest.mark.parametrize("how", ["gone", "no answer", "forgotten"])
def test_when_the_next_hop_is_lost_another_replica_gets_the_microbatch(how: str) -> None:
    driver = Driver(1)
    driver.start()
    peer = awaiting(driver, 1)
    if how == "gone":
        driver.world.gone = {peer}
        effects = driver.tell()
    elif how == "no answer":
        effects = lose_next_hop(driver)
    else:
        effects = end(driver, silence(driver), SendOutcome.ACCEPTED)

    send = sent(effects)
    assert send.peer == other_of(peer)
    assert send.transfer.continues_at is None, "there is no stage after the last one"
    assert FreeTensors(ONE) not in effects
    assert cancelled(effects) == ([] if how == "gone" else [peer])
    accepted(driver, send.peer)
    effects = gradient_arrives(driver, 1, send.peer)
    assert of_kind(effects, Compute) == [Compute(Backward(ONE))]
    heartbeat = driver.core.heartbeat(0, 0)
    assert (heartbeat.rerouted, heartbeat.spliced) == (1, 0)


def test_whoever_holds_the_rest_is_sought_first_and_named_to_the_replacement() -> None:
    driver = Driver(1, num_stages=4)
    driver.start()
    peer = awaiting(driver, 1)

    effects = lose_next_hop(driver)

    sought = questions(effects)
    assert {question.peer for question in sought} == {hotkey_of(3, 0), hotkey_of(3, 1)}
    assert all(question.query.lost == peer and question.query.microbatch_ids == (ONE,) for question in sought)
    assert of_kind(effects, SendTensor) == [] and cancelled(effects) == [], "the lost one might pass a cancel on"
    assert end(driver, sought[0], SendOutcome.ACCEPTED) == []
    effects = end(driver, sought[1], SendOutcome.ACCEPTED, ONE)
    send = sent(effects)
    assert (send.peer, send.transfer.continues_at) == (other_of(peer), sought[1].peer)
    assert cancelled(effects) == [peer]
    accepted(driver, send.peer)
    assert driver.core.heartbeat(0, 0).rerouted == 0, "the replacement counts it"


def test_word_of_who_holds_the_rest_is_not_waited_for_without_end() -> None:
    driver = Driver(1, num_stages=4)
    driver.start()
    peer = awaiting(driver, 1)
    lose_next_hop(driver)

    effects = driver.handle(Ticked(), after_s=SEEK_S + 0.01)

    send = sent(effects)
    assert (send.peer, send.transfer.continues_at) == (other_of(peer), None)
    assert cancelled(effects) == [peer]


def test_nothing_is_taken_from_a_lost_peer_that_has_no_other_replica() -> None:
    driver = Driver(1)
    driver.start()
    peer = awaiting(driver, 1)
    driver.world.gone = {other_of(peer)}
    driver.tell()

    assert of_kind(lose_next_hop(driver), SendTensor) == []

    effects = gradient_arrives(driver, 1, peer)
    assert of_kind(effects, Compute) == [Compute(Backward(ONE))], "it came back in time"


def test_a_peer_that_answers_and_brings_nothing_is_lost_after_several_times_the_usual() -> None:
    driver = Driver(1)
    driver.start()
    driver.now_s += 0.1
    gradient_arrives(driver, 1, awaiting(driver, 1))  # what is usual has been measured
    driver.handle(ComputeEnded(BackwardDone(ONE, body("g1"))))
    peer = awaiting(driver, 2)
    waited_s = 0.0
    effects: list[Effect] = []
    while not of_kind(effects, SendTensor):
        effects = driver.handle(Ticked(), after_s=0.6)
        waited_s += 0.6
        for question in questions(effects):
            effects += end(driver, question, SendOutcome.ACCEPTED, *question.query.microbatch_ids)
        assert waited_s < 4 * PATIENCE_MIN_S, "it was never lost"

    assert waited_s >= PATIENCE_MIN_S
    assert sent(effects).peer == other_of(peer)


def test_a_lost_peer_gets_nothing_until_it_answers_again() -> None:
    driver = Driver(1)
    driver.start()
    peer = awaiting(driver, 1)
    lose_next_hop(driver)
    for number in range(2, 5):
        assert awaiting(driver, number) == other_of(peer)
    asked: list[AskHolds] = []
    while not any(question.peer == peer for question in asked):
        asked = questions(driver.handle(Ticked(), after_s=0.5))
    (question,) = (question for question in asked if question.peer == peer)
    assert question.query.microbatch_ids == ()
    end(driver, question, SendOutcome.ACCEPTED)
    driver.world.gone = {other_of(peer)}
    effects = driver.tell()

    assert {effect.peer for effect in effects if isinstance(effect, SendTensor)} == {peer}


def test_what_a_lost_peer_sends_after_all_changes_nothing() -> None:
    driver = Driver(1)
    driver.start()
    peer = awaiting(driver, 1)
    replacement = sent(lose_next_hop(driver)).peer
    accepted(driver, replacement)
    before = driver.core.heartbeat(0, 0)

    late = driver.gradient(1, next_replica=0 if peer == hotkey_of(2, 0) else 1)
    assert refusal_code(driver.handle(BackwardOffered(77, peer, late))) is RefusalCode.CONFLICT
    cancel = Cancel(microbatch_id=ONE, outer_step=0, reason="its stage before is gone")
    assert driver.handle(CancelArrived(peer, cancel)) == []
    late_answer = SendEnded(ONE, Direction.ACTIVATION, peer, SendOutcome.ACCEPTED, 9.0)
    assert cancelled(driver.handle(late_answer)) == [peer]
    assert driver.core.heartbeat(0, 0) == before


# --- the stage after the lost one -------------------------------------------------------------------------------------


def orphan(driver: Driver, asker: Hotkey, *numbers: int) -> tuple[MicrobatchId, ...]:
    """The miner before the one before asks for what came from that."""
    query = HoldsQuery(
        outer_step=0,
        microbatch_ids=tuple(MicrobatchId(number) for number in numbers),
        lost=hotkey_of(driver.stage_index - 1, 0),
    )
    return told(driver.handle(HoldsAsked(500, asker, query)))


def replacement_of(driver: Driver, number: int, **fields: object) -> Transfer:
    before = tuple(hotkey_of(stage, 0) for stage in range(driver.stage_index - 1))
    path = (*before, hotkey_of(driver.stage_index - 1, 1))
    return driver.activation(number, **{"path": path, "digest": digest_of(("other", number)), **fields})


def test_an_orphan_goes_on_and_returns_its_gradient_to_the_replacement() -> None:
    driver = Driver(2)
    driver.start()
    admit(driver, 1)
    assert orphan(driver, hotkey_of(0, 0), 1, 7) == (ONE,)
    effects = driver.handle(ComputeEnded(ForwardDone(ONE, body("g1"), 3.5)))
    assert of_kind(effects, SendTensor) == [], "nobody is there to take the gradient"
    transfer = replacement_of(driver, 1)

    effects = driver.handle(ForwardOffered(40, transfer.path[-1], transfer))

    (accept,) = of_kind(effects, Accept)
    assert isinstance(accept, Accept) and accept.accepted.adopted
    back = sent(effects)
    assert back.peer == transfer.path[-1]
    assert back.transfer.path == (*transfer.path, driver.me)
    effects = driver.handle(ForwardOffered(41, transfer.path[-1], transfer))
    assert [type(effect) for effect in effects] == [Accept], "again changes nothing"
    directions = [(receipt.direction, receipt.sender) for receipt in driver.receipts()]
    assert directions == [(Direction.ACTIVATION, hotkey_of(1, 0))], "what the replacement offered was not taken"


def test_a_gradient_that_was_returned_is_kept_in_case_its_receiver_is_lost_with_it() -> None:
    driver = Driver(2)
    driver.start()
    admit(driver, 1)
    back = sent(driver.handle(ComputeEnded(ForwardDone(ONE, body("g1"), 3.5))))
    effects = driver.handle(SendEnded(ONE, Direction.GRADIENT, back.peer, SendOutcome.ACCEPTED, 0.01))
    assert of_kind(effects, FreeAllButGradient) == [FreeAllButGradient(ONE)] and FreeTensors(ONE) not in effects
    heartbeat = driver.core.heartbeat(0, 0)
    assert (heartbeat.in_flight, heartbeat.applied) == (0, 1)

    assert orphan(driver, hotkey_of(0, 0), 1) == (ONE,)
    transfer = replacement_of(driver, 1)
    again = sent(driver.handle(ForwardOffered(40, transfer.path[-1], transfer)))
    assert (again.peer, again.transfer.digest) == (transfer.path[-1], back.transfer.digest)
    driver.handle(SendEnded(ONE, Direction.GRADIENT, again.peer, SendOutcome.ACCEPTED, 0.01))
    assert driver.core.heartbeat(0, 0).applied == 1
    assert FreeTensors(ONE) in driver.handle(Ticked(), after_s=60.0)


def test_no_more_gradients_are_kept_aside_than_there_are_credits() -> None:
    driver = Driver(2, microbatches_per_step=64)
    driver.start()
    num_kept = driver.spec.flow.in_flight_max
    freed: list[Effect] = []
    for number in range(1, num_kept + 3):
        admit(driver, number)
        microbatch_id = MicrobatchId(number)
        back = sent(driver.handle(ComputeEnded(ForwardDone(microbatch_id, body(f"g{number}"), 3.5))))
        effects = driver.handle(SendEnded(microbatch_id, Direction.GRADIENT, back.peer, SendOutcome.ACCEPTED, 0.01))
        freed += of_kind(effects, FreeTensors)

    assert freed == [FreeTensors(ONE), FreeTensors(MicrobatchId(2))]


@pytest.mark.parametrize(
    "fields",
    [
        {"path": (hotkey_of(0, 1), hotkey_of(1, 1))},
        {"data_id": 5},
    ],
)
def test_an_orphan_takes_no_replacement_on_another_way(fields: dict[str, object]) -> None:
    driver = Driver(2)
    driver.start()
    admit(driver, 1)
    orphan(driver, hotkey_of(0, 0), 1)
    transfer = replacement_of(driver, 1, **fields)

    assert refusal_code(driver.handle(ForwardOffered(40, transfer.path[-1], transfer))) is RefusalCode.CONFLICT


def test_nobody_else_makes_an_orphan() -> None:
    driver = Driver(2)
    driver.start()
    admit(driver, 1)
    assert orphan(driver, hotkey_of(0, 1), 1) == (), "not the one that sent it to the lost one"
    query = HoldsQuery(outer_step=0, microbatch_ids=(ONE,), lost=hotkey_of(1, 0))
    (refuse,) = driver.handle(HoldsAsked(6, hotkey_of(1, 1), query))
    assert isinstance(refuse, Refuse) and refuse.refusal.code is RefusalCode.FORBIDDEN
    transfer = replacement_of(driver, 1)
    assert refusal_code(driver.handle(ForwardOffered(40, transfer.path[-1], transfer))) is RefusalCode.CONFLICT


def test_an_orphan_ignores_a_cancel_of_the_lost_one_and_ends_when_nobody_takes_its_place() -> None:
    driver = Driver(2)
    driver.start()
    admit(driver, 1)
    orphan(driver, hotkey_of(0, 0), 1)
    driver.handle(ComputeEnded(ForwardDone(ONE, body("g1"), 3.5)))
    cancel = Cancel(microbatch_id=ONE, outer_step=0, reason="replaced")
    assert driver.handle(CancelArrived(hotkey_of(1, 0), cancel)) == []

    assert FreeTensors(ONE) in driver.handle(Ticked(), after_s=ORPHAN_S + 0.01)


def test_when_the_feed_shows_the_stage_before_gone_an_orphan_waits_too() -> None:
    driver = Driver(2)
    driver.start()
    admit(driver, 1)
    driver.world.gone = {hotkey_of(1, 0)}
    assert FreeTensors(ONE) not in driver.tell()
    driver.handle(ComputeEnded(ForwardDone(ONE, body("g1"), 3.5)))
    transfer = replacement_of(driver, 1)

    assert sent(driver.handle(ForwardOffered(40, transfer.path[-1], transfer))).peer == transfer.path[-1]
    driver.world.gone = {hotkey_of(1, 0), hotkey_of(1, 1), hotkey_of(0, 0)}
    assert FreeTensors(ONE) in driver.tell(), "and not when nobody is left who could choose a replacement"


def test_what_was_taken_from_a_lost_miner_is_not_taken_from_it_when_it_comes_back() -> None:
    driver = Driver(2)
    driver.start()
    assert orphan(driver, hotkey_of(0, 0), 1) == (), "it is not here yet"

    late = driver.activation(1)
    assert late.path == (hotkey_of(0, 0), hotkey_of(1, 0))
    assert refusal_code(driver.handle(ForwardOffered(1, late.path[-1], late))) is RefusalCode.CONFLICT
    elsewhere = driver.activation(2)
    assert driver.handle(ForwardOffered(2, elsewhere.path[-1], elsewhere)) == [ReadBody(2)], "that was not taken"
    transfer = replacement_of(driver, 1)
    assert driver.handle(ForwardOffered(3, transfer.path[-1], transfer)) == [ReadBody(3)]


def test_a_body_that_was_on_its_way_from_a_lost_miner_is_waited_for_and_spliced() -> None:
    driver = Driver(2)
    driver.start()
    late = driver.activation(1)
    assert driver.handle(ForwardOffered(1, late.path[-1], late)) == [ReadBody(1)]
    assert orphan(driver, hotkey_of(0, 0), 1) == (), "it may never be whole"
    transfer = replacement_of(driver, 1)
    assert refusal_code(driver.handle(ForwardOffered(2, transfer.path[-1], transfer))) is RefusalCode.BUSY

    assert of_kind(driver.handle(BodyEnded(1, None)), Compute)
    (accept,) = driver.handle(ForwardOffered(3, transfer.path[-1], transfer))

    assert isinstance(accept, Accept) and accept.accepted.adopted


# --- one that stood still itself --------------------------------------------------------------------------------------


def stand_still(driver: Driver) -> list[Effect]:
    """The process is stopped and goes on much later; what it does first."""
    return driver.handle(Ticked(), after_s=20.0)


def test_who_stood_still_offers_again_what_was_not_answered_meanwhile() -> None:
    driver = Driver(1)
    driver.start()
    admit(driver, 1)
    send = sent(forward(driver, 1, after_s=0.1))
    stand_still(driver)

    effects = driver.handle(SendEnded(ONE, Direction.ACTIVATION, send.peer, SendOutcome.UNREACHABLE, 20.0))

    again = sent(effects)
    assert (again.peer, again.transfer) == (send.peer, send.transfer)
    assert cancelled(effects) == []
    effects = driver.handle(SendEnded(ONE, Direction.ACTIVATION, send.peer, SendOutcome.UNREACHABLE, 0.01))
    assert sent(effects).peer == other_of(send.peer), "now it was the peer"
    assert cancelled(effects) == [send.peer]


def test_who_stood_still_takes_no_old_question_for_an_answer() -> None:
    driver = Driver(1)
    driver.start()
    peer = awaiting(driver, 1)
    question = silence(driver)
    end(driver, question, SendOutcome.UNREACHABLE)  # asked again at once
    assert stand_still(driver) == []

    assert questions(end(driver, question, SendOutcome.UNREACHABLE)), "it asks anew"
    effects: list[Effect] = []
    for _ in range(MISSES_MAX):
        assert of_kind(effects, SendTensor) == []
        effects = end(driver, question, SendOutcome.UNREACHABLE)
    assert sent(effects).peer == other_of(peer)


def test_who_stood_still_gives_nobody_up_for_what_was_not_brought_meanwhile() -> None:
    driver = Driver(1)
    driver.start()
    gradient_arrives(driver, 1, awaiting(driver, 1))  # what is usual has been measured
    driver.handle(ComputeEnded(BackwardDone(ONE, body("g1"))))
    awaiting(driver, 2)

    assert of_kind(stand_still(driver), SendTensor) == []


# --- the replacement --------------------------------------------------------------------------------------------------


def replacing(driver: Driver) -> list[Effect]:
    """An activation comes that a lost replica had; the forward ends."""
    driver.start()
    transfer = driver.activation(1, continues_at=hotkey_of(2, 1))
    driver.handle(ForwardOffered(1, transfer.path[-1], transfer))
    driver.handle(BodyEnded(1, None))
    return forward(driver, 1)


@pytest.mark.parametrize("seed", range(6))
def test_a_replacement_offers_to_who_holds_the_rest(seed: int) -> None:
    driver = Driver(1, seed=seed)
    send = sent(replacing(driver))
    assert (send.peer, send.transfer.continues_at) == (hotkey_of(2, 1), None)

    accepted(driver, send.peer, adopted=True)
    effects = gradient_arrives(driver, 1, send.peer)

    assert of_kind(effects, Compute) == [Compute(Backward(ONE))]
    heartbeat = driver.core.heartbeat(0, 0)
    assert (heartbeat.rerouted, heartbeat.spliced) == (0, 1)
    assert [(receipt.direction, receipt.to_stage) for receipt in driver.receipts()] == [
        (Direction.ACTIVATION, 1),
        (Direction.GRADIENT, 1),
    ], "there is no receipt for what nobody took"


@pytest.mark.parametrize("outcome", [SendOutcome.UNREACHABLE, SendOutcome.REFUSED])
def test_a_replacement_goes_forward_anew_when_the_rest_is_lost_too(outcome: SendOutcome) -> None:
    driver = Driver(1)
    replacing(driver)

    effects = driver.handle(
        SendEnded(ONE, Direction.ACTIVATION, hotkey_of(2, 1), outcome, 0.01, code=RefusalCode.CONFLICT)
    )

    assert sent(effects).peer == hotkey_of(2, 0)
    accepted(driver, hotkey_of(2, 0))
    heartbeat = driver.core.heartbeat(0, 0)
    assert (heartbeat.rerouted, heartbeat.spliced) == (1, 0)
