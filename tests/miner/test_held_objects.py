"""HeldObjects: what is held is not fetched again, and is found by its content."""

from collections.abc import Mapping, Sequence

import torch

from orion.common.errors import TransportError
from orion.common.protocol.codec import Body, encode
from orion.common.protocol.messages import ObjectRef, RefusalCode
from orion.common.protocol.refusals import refused
from orion.miner.held_objects import HeldObjects


class Store:
    """Objects by key; counts what is read."""

    def __init__(self) -> None:
        self.objects: dict[str, Body] = {}
        self.read: list[str] = []
        self.is_away = False
        self.waited: list[float] = []

    def add(self, key: str, value: float) -> ObjectRef:
        body = self.objects[key] = encode({"mean": torch.full((4,), value)})
        return ObjectRef(key=key, digest=body.digest, size_bytes=body.size_bytes)

    async def get_many(self, refs: Sequence[ObjectRef], wait_s: float = 0.0) -> list[bytearray]:
        self.waited.append(wait_s)
        if self.is_away:
            raise TransportError("away")
        for ref in refs:
            if ref.key not in self.objects:
                raise refused(RefusalCode.NOT_FOUND, ref.key)
            self.read.append(ref.key)
        return [bytearray(self.objects[ref.key].tobytes()) for ref in refs]

    async def put_many(self, bodies: Mapping[str, Body]) -> list[ObjectRef]:
        raise AssertionError("nothing is written here")


async def test_what_was_fetched_ahead_is_not_fetched_again_until_it_is_let_go() -> None:
    store = Store()
    refs = [store.add("a", 1.0), store.add("b", 2.0), store.add("c", 3.0)]
    held = HeldObjects(store, store)
    assert await held.fetch(refs[:2])
    assert await held.fetch(refs[:2])
    assert store.read == ["a", "b"]

    bodies = await held.get_many(refs)

    assert bodies == [bytearray(store.objects[key].tobytes()) for key in "abc"]
    assert store.read == ["a", "b", "c"]
    held.release(refs[:1])
    await held.get(refs[0])
    assert store.read == ["a", "b", "c", "a"]
    held.clear()
    await held.get(refs[1])
    assert store.read[-1] == "b"


async def test_what_is_not_there_yet_does_not_keep_the_rest_from_being_fetched() -> None:
    store = Store()
    first, last = store.add("a", 1.0), store.add("c", 3.0)
    missing = store.add("b", 2.0)
    later = store.objects.pop("b")
    held = HeldObjects(store, store)

    assert not await held.fetch([first, missing, last], wait_s=1.0)
    assert store.read == ["a", "c"]
    assert store.waited == [1.0, 1.0, 0.0], "when one did not come in time, the others are only looked for"
    store.objects["b"] = later
    assert await held.fetch([first, missing, last])
    assert store.read == ["a", "c", "b"]


async def test_a_store_that_is_away_is_asked_once() -> None:
    store = Store()
    ref = store.add("a", 1.0)
    store.is_away = True

    assert not await HeldObjects(store, store).fetch([ref, ref])


async def test_another_key_of_the_same_content_is_held_too() -> None:
    store = Store()
    mine, theirs = store.add("mine", 1.0), store.add("theirs", 1.0)
    held = HeldObjects(store, store)
    held.hold(store.objects["mine"])

    assert await held.get(theirs) == bytearray(store.objects["theirs"].tobytes())
    assert store.read == [] and mine.digest == theirs.digest
