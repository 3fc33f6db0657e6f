"""An object store in memory that takes its time and can fail: what the seam for objects promises, and no more.

It owns the objects' bytes and what is durable. It is reached over the simulated network like any other host.
Invariants: an object is readable only once it is durable; a write that was acknowledged is durable; a key is written
once: the same bytes again change nothing, others are refused.
"""

from dataclasses import dataclass, field
from random import Random

from blake3 import blake3

from orion.common.ids import Digest
from orion.common.protocol.keys import owner_of
from orion.common.protocol.messages import (
    ObjectRef,
    Refusal,
    RefusalCode,
)
from orion.simulator.clock import VirtualClock
from orion.simulator.network import Address, Respond

ANSWER_BYTES = 200
"""An answer without a body: status line and headers."""


@dataclass(frozen=True, slots=True)
class PutObject:
    """Writes an object under its owner's key. Answered by `Stored` or a `Refusal`."""

    key: str
    body: bytes


@dataclass(frozen=True, slots=True)
class GetObject:
    """Reads an object. Answered by its bytes or a `Refusal`."""

    key: str


@dataclass(frozen=True, slots=True)
class Stored:
    """The object is durable."""


@dataclass(slots=True, eq=False)
class StoreTrouble:
    """Something wrong with the store, until it is lifted."""

    fail_share: float = 0.0
    """Requests that are answered with BUSY and change nothing."""
    delay_s: float = 0.0
    """Added to every write before it is durable."""
    num_hits: int = 0


@dataclass(slots=True, eq=False)
class MemoryStore:
    """Objects by key."""

    clock: VirtualClock
    rng: Random
    write_s: float = 0.01
    """From the last byte of a write until it is durable."""
    troubles: list[StoreTrouble] = field(default_factory=list)
    _objects: dict[str, bytes] = field(default_factory=dict)
    _digests: dict[str, Digest] = field(default_factory=dict)

    def serve(self, source: Address, request: object, respond: Respond) -> None:
        """The handler of the store's host."""
        assert isinstance(request, PutObject | GetObject)
        delay_s = self.write_s
        for trouble in self.troubles:
            if trouble.fail_share and self.rng.random() < trouble.fail_share:
                trouble.num_hits += 1
                respond(_refusal(RefusalCode.BUSY, "the store is in trouble", retry_after_s=1.0), ANSWER_BYTES)
                return
            if trouble.delay_s and isinstance(request, PutObject):
                trouble.num_hits += 1
                delay_s += trouble.delay_s
        if isinstance(request, GetObject):
            body = self._objects.get(request.key)
            if body is None:
                respond(_refusal(RefusalCode.NOT_FOUND, f"no object {request.key}"), ANSWER_BYTES)
            else:
                respond(body, ANSWER_BYTES + len(body))
            return
        if owner_of(request.key) != source:
            respond(_refusal(RefusalCode.FORBIDDEN, f"{source} does not own {request.key}"), ANSWER_BYTES)
            return
        self.clock.schedule(delay_s, lambda: self._make_durable(request, respond))

    def is_durable(self, ref: ObjectRef) -> bool:
        """Whether the object lies here with the size and digest that `ref` names."""
        body = self._objects.get(ref.key)
        return body is not None and len(body) == ref.size_bytes and self._digests[ref.key] == ref.digest

    def get(self, key: str) -> bytes | None:
        """An object's bytes, for checks that stand outside the simulated world."""
        return self._objects.get(key)

    def hold(self, key: str, body: bytes) -> None:
        """Has an object durable from now on, however it came here."""
        self._objects[key] = body
        self._digests[key] = Digest(blake3(body).hexdigest())

    def delete(self, prefix: str) -> None:
        """Deletes every object whose key starts with the prefix."""
        for key in [key for key in self._objects if key.startswith(prefix)]:
            del self._objects[key], self._digests[key]

    def _make_durable(self, request: PutObject, respond: Respond) -> None:
        present = self._objects.get(request.key)
        if present is not None and present != request.body:
            respond(_refusal(RefusalCode.CONFLICT, f"{request.key} holds other bytes"), ANSWER_BYTES)
            return
        self.hold(request.key, request.body)
        respond(Stored(), ANSWER_BYTES)


def _refusal(code: RefusalCode, message: str, retry_after_s: float | None = None) -> Refusal:
    return Refusal(code=code, message=message, retry_after_s=retry_after_s)
