"""Which objects are known to be durable, and which are still being looked at.

Owns no rule about what objects are for. Invariants: an object counts as durable only after the store has confirmed the
very digest and size; checks are asked again until they succeed or are forgotten, so a lost answer costs only time.
"""

from collections.abc import Collection
from dataclasses import dataclass, field

from orion.common.protocol.messages import ObjectRef

RECHECK_S = 2.0
"""Between two looks at the same object; a store confirms in milliseconds, so this only repairs lost answers."""
RECHECKS_PER_TICK_MAX = 256
"""So that an outage of the store does not end in a flood."""


@dataclass(slots=True)
class Watch:
    """An object somebody says it has written."""

    ref: ObjectRef
    asked_s: float


@dataclass(slots=True)
class ObjectBook:
    """Objects by key."""

    watched: dict[str, Watch] = field(default_factory=dict)
    durable: dict[str, ObjectRef] = field(default_factory=dict)

    def watch(self, ref: ObjectRef, now_s: float) -> bool:
        """Starts looking at an object; False when it is known to be durable. A key's newest content counts."""
        if self.is_durable(ref):
            return False
        self.watched[ref.key] = Watch(ref, now_s)
        return True

    def checked(self, ref: ObjectRef, durable: bool) -> bool:
        """Takes the store's answer; whether the object has just become durable. Nothing else changes anything."""
        watch = self.watched.get(ref.key)
        if not durable or watch is None or watch.ref != ref:
            return False
        del self.watched[ref.key]
        self.durable[ref.key] = ref
        return True

    def is_durable(self, ref: ObjectRef) -> bool:
        return self.durable.get(ref.key) == ref

    def due(self, now_s: float) -> list[ObjectRef]:
        """Objects to look at again now; they count as asked."""
        due = [watch for watch in self.watched.values() if now_s >= watch.asked_s + RECHECK_S][:RECHECKS_PER_TICK_MAX]
        for watch in due:
            watch.asked_s = now_s
        return [watch.ref for watch in due]

    def forget(self, prefix: str) -> None:
        """Drops everything under a prefix."""
        for objects in (self.watched, self.durable):
            for key in [key for key in objects if key.startswith(prefix)]:
                del objects[key]

    def stop_watching(self, prefix: str, but: Collection[str] = ()) -> None:
        """Looks no longer at what is not durable yet under a prefix, but for these keys."""
        for key in [key for key in self.watched if key.startswith(prefix) and key not in but]:
            del self.watched[key]
