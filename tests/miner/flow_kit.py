"""Steps that tests of a miner in training take again and again."""

from miner_kit import Driver, digest_of, hotkey_of

from orion.common.ids import Direction, Hotkey, MicrobatchId
from orion.common.protocol.messages import (
    RefusalCode,
    Report,
)
from orion.miner.effects import (
    Effect,
    ReadBody,
    Refuse,
    SendReport,
    SendTensor,
)
from orion.miner.events import (
    BackwardOffered,
    BodyEnded,
    BodyRef,
    ComputeEnded,
    ForwardDone,
    ForwardOffered,
    SendEnded,
    SendOutcome,
)


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


def forward(driver: Driver, number: int, after_s: float = 0.0) -> list[Effect]:
    """The device ends the forward of a microbatch."""
    return driver.handle(ComputeEnded(ForwardDone(MicrobatchId(number), body(f"z{number}"), None)), after_s)


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
