"""Objects that this miner holds already: its own, and those fetched ahead of their use. Known by what they contain. And
reductions that were made before they were due.

In front of the object store: what is held is not fetched. Decides nothing about what is worth holding. Invariants: what
is handed out has the digest that was asked for; nobody writes into it.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Protocol

from orion.common.errors import TransportError
from orion.common.ids import Digest
from orion.common.protocol.codec import Body
from orion.common.protocol.messages import Contribution, ObjectRef, RefusalCode
from orion.common.protocol.reduction import Reduction
from orion.common.protocol.refusals import RefusedError

ReductionInputs = tuple[int, int, tuple[Contribution, ...]]
"""Stage, partition, and the contributions in the plan's order, with weights and digests: all that goes into it."""


class Objects(Protocol):
    """The object store (`ObjectClient`)."""

    async def get_many(self, refs: Sequence[ObjectRef], wait_s: float = 0.0) -> list[bytearray]: ...

    async def put_many(self, bodies: Mapping[str, Body]) -> list[ObjectRef]: ...


class HeldObjects:
    """The store, and what is held of it."""

    def __init__(self, reading: Objects, writing: Objects) -> None:
        """The store twice: each bounds what it has on its way, and what is read must not wait behind what is
        written."""
        self._reading = reading
        self._writing = writing
        self._held: dict[Digest, Body | bytearray] = {}
        self._reductions: dict[ReductionInputs, Reduction] = {}

    async def get(self, ref: ObjectRef) -> bytearray:
        """One object. Raises as the store does."""
        return (await self.get_many([ref]))[0]

    async def get_many(self, refs: Sequence[ObjectRef]) -> list[bytearray]:
        """Objects in order. Raises as the store does."""
        missing = [ref for ref in refs if ref.digest not in self._held]
        fetched = dict(zip((ref.digest for ref in missing), await self._reading.get_many(missing), strict=True))
        return [fetched[ref.digest] if ref.digest in fetched else _bytes(self._held[ref.digest]) for ref in refs]

    async def put_many(self, bodies: Mapping[str, Body]) -> list[ObjectRef]:
        """Writes objects; holds nothing by that. Raises as the store does."""
        return await self._writing.put_many(bodies)

    async def fetch(self, refs: Iterable[ObjectRef], wait_s: float = 0.0) -> bool:
        """Fetches what is there, one after the other, and holds it; whether all of it is held now. Each is waited for
        so long, where the store can tell when it comes, until one did not."""
        is_complete = True
        for ref in refs:
            if ref.digest in self._held:
                continue
            try:
                (self._held[ref.digest],) = await self._reading.get_many([ref], wait_s)
            except RefusedError as error:
                is_complete, wait_s = False, 0.0
                if error.code is not RefusalCode.NOT_FOUND:
                    return False
            except TransportError:
                return False
        return is_complete

    def hold(self, body: Body) -> None:
        """Keeps something of this miner's own."""
        self._held[body.digest] = body

    def hold_reduction(self, inputs: ReductionInputs, reduction: Reduction) -> None:
        """Keeps what was made of some slices: made of the same again, it is the same."""
        self._reductions[inputs] = reduction

    def reduction(self, inputs: ReductionInputs) -> Reduction | None:
        """What was made of these, if it is held."""
        return self._reductions.get(inputs)

    def release(self, refs: Iterable[ObjectRef]) -> None:
        """Lets go of these."""
        for ref in refs:
            self._held.pop(ref.digest, None)

    def clear(self) -> None:
        """Lets go of everything."""
        self._held.clear()
        self._reductions.clear()


def _bytes(held: Body | bytearray) -> bytearray:
    return held if isinstance(held, bytearray) else bytearray(held.tobytes())
