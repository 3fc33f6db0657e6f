"""The simulated object store: what it acknowledges is durable, and what is durable stays."""

from random import Random

from blake3 import blake3

from orion.common.ids import Digest, Hotkey
from orion.common.protocol.keys import reduced_key
from orion.common.protocol.messages import (
    ObjectRef,
    Refusal,
    RefusalCode,
)
from orion.simulator.clock import VirtualClock
from orion.simulator.store import GetObject, MemoryStore, PutObject, Stored, StoreTrouble

OWNER = Hotkey("5" + "a" * 47)
KEY = reduced_key(3, 1, OWNER, 0)


class Desk:
    """Asks a store without a network."""

    def __init__(self) -> None:
        self.clock = VirtualClock()
        self.store = MemoryStore(self.clock, Random(1))

    def ask(self, request: object, source: str = OWNER) -> list[object]:
        answers: list[object] = []
        self.store.serve(source, request, lambda answer, size_bytes: answers.append(answer))
        return answers

    def wait(self) -> None:
        while self.clock.step():
            pass


def code_of(answer: object) -> RefusalCode:
    assert isinstance(answer, Refusal)
    return answer.code


def test_an_object_is_there_once_its_write_is_acknowledged_and_not_before() -> None:
    desk = Desk()
    ref = ObjectRef(key=KEY, digest=Digest(blake3(b"mean").hexdigest()), size_bytes=4)
    written = desk.ask(PutObject(KEY, b"mean"))
    assert not desk.store.is_durable(ref)
    assert code_of(desk.ask(GetObject(KEY))[0]) is RefusalCode.NOT_FOUND
    assert written == []
    desk.wait()
    assert written == [Stored()]
    assert desk.store.is_durable(ref)
    assert not desk.store.is_durable(ref.model_copy(update={"size_bytes": 5}))
    assert desk.ask(GetObject(KEY)) == [b"mean"]


def test_a_key_is_written_once_and_by_its_owner_alone() -> None:
    desk = Desk()
    assert code_of(desk.ask(PutObject(KEY, b"mean"), source="somebody")[0]) is RefusalCode.FORBIDDEN
    first, same, other = (desk.ask(PutObject(KEY, body)) for body in (b"mean", b"mean", b"else"))
    desk.wait()
    assert first == same == [Stored()]
    assert code_of(other[0]) is RefusalCode.CONFLICT
    desk.store.delete("outer/3/")
    assert desk.store.get(KEY) is None


def test_trouble_refuses_delays_and_counts() -> None:
    desk = Desk()
    refusing, slow = StoreTrouble(fail_share=1.0), StoreTrouble(delay_s=2.0)
    desk.store.troubles.append(refusing)
    assert code_of(desk.ask(PutObject(KEY, b"mean"))[0]) is RefusalCode.BUSY
    desk.store.troubles[:] = [slow]
    desk.ask(PutObject(KEY, b"mean"))
    desk.wait()
    assert desk.clock.monotonic_s() > 2.0
    assert (refusing.num_hits, slow.num_hits) == (1, 1)
