"""The chain's state: encoded values under encoded keys, typed through the runtime, with the history of recent blocks.

Owns reading and writing of storage items, transactions that can be undone, and old values for as long as the history
goes back. Must not know what any item means. Invariants: a key's versions are in ascending order of blocks; a version
is dropped only when no block that may still be asked for sees it; what a failed transaction wrote is gone.
"""

from bisect import bisect_left, bisect_right, insort
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Protocol

from orion.devnet.metadata import Runtime

Changes = dict[bytes, bytes | None]
"""Key to its new encoded value, None where it was removed."""


class DoesNotFit(Exception):
    """A value is out of its item's range."""


class Raw(Protocol):
    """Encoded state at one moment."""

    def raw(self, key: bytes) -> bytes | None: ...

    def keys(self, prefix: bytes) -> list[bytes]:
        """The keys that begin with `prefix` and have a value, in ascending order."""
        ...


class Reader:
    """Typed reading of encoded state. Items are named `Pallet.Item`, or `Item` in the main pallet."""

    def __init__(self, runtime: Runtime, source: Raw) -> None:
        self.runtime = runtime
        self.source = source

    def get(self, name: str, *params: object) -> Any:
        """The item's value; where it was never set its default, or None when it has none."""
        item = self.runtime.item(name)
        raw = self.source.raw(self.runtime.storage_key(name, *params))
        if raw is None:
            raw = item.default
        return None if raw is None else self.runtime.decode(item.value_type, raw)

    def has(self, name: str, *params: object) -> bool:
        """Whether the item was set."""
        return self.source.raw(self.runtime.storage_key(name, *params)) is not None

    def items(self, name: str, *params: object) -> list[tuple[tuple[Any, ...], Any]]:
        """(parameters, value) of every key of a map that was set and begins with `params`."""
        value_type = self.runtime.item(name).value_type
        found = []
        for key in self.source.keys(self.runtime.storage_key(name, *params)):
            raw = self.source.raw(key)
            assert raw is not None
            found.append((self.runtime.key_params(name, key), self.runtime.decode(value_type, raw)))
        return found


class State(Reader):
    """The newest state, being written, and older ones within the history."""

    def __init__(self, runtime: Runtime, history_blocks: int) -> None:
        """`history_blocks`: how many blocks before the newest can still be read."""
        super().__init__(runtime, self)
        self._history_blocks = history_blocks
        self._versions: dict[bytes, list[tuple[int, bytes | None]]] = {}
        self._sorted_keys: list[bytes] = []
        self._changed: deque[tuple[int, list[bytes]]] = deque()
        self._layers: list[Changes] = [{}]
        self.head = -1
        """The newest sealed block."""

    @property
    def first(self) -> int:
        """The oldest block that can be read."""
        return max(0, self.head - self._history_blocks)

    # Reading

    def raw(self, key: bytes) -> bytes | None:
        for layer in reversed(self._layers):
            if key in layer:
                return layer[key]
        return self.raw_at(key, self.head)

    def keys(self, prefix: bytes) -> list[bytes]:
        written = {key for layer in self._layers for key in layer if key.startswith(prefix)}
        return sorted(key for key in written.union(self._known_keys(prefix)) if self.raw(key) is not None)

    def raw_at(self, key: bytes, block: int) -> bytes | None:
        """The encoded value after `block`, which must be within the history."""
        versions = self._versions.get(key)
        if not versions:
            return None
        if versions[-1][0] <= block:
            return versions[-1][1]
        index = bisect_right(versions, block, key=lambda version: version[0])
        return versions[index - 1][1] if index else None

    def keys_at(self, prefix: bytes, block: int) -> list[bytes]:
        return [key for key in self._known_keys(prefix) if self.raw_at(key, block) is not None]

    def at(self, block: int) -> "Reader":
        """Reads the state after `block`. Raises LookupError when it lies outside the history."""
        if not self.first <= block <= self.head:
            raise LookupError(f"the state of block {block} is not kept: only blocks {self.first} to {self.head} are")
        return Reader(self.runtime, _Past(self, block))

    def _known_keys(self, prefix: bytes) -> Iterator[bytes]:
        for index in range(bisect_left(self._sorted_keys, prefix), len(self._sorted_keys)):
            key = self._sorted_keys[index]
            if not key.startswith(prefix):
                return
            yield key

    # Writing

    def put(self, name: str, *params: object, value: object) -> None:
        """Sets an item. Raises DoesNotFit."""
        try:
            encoded = self.runtime.encode(self.runtime.item(name).value_type, value)
        except (ValueError, OverflowError) as error:
            raise DoesNotFit(f"{name}: {error}") from error
        self._layers[-1][self.runtime.storage_key(name, *params)] = encoded

    def remove(self, name: str, *params: object) -> None:
        self._layers[-1][self.runtime.storage_key(name, *params)] = None

    @contextmanager
    def transaction(self) -> Iterator[None]:
        """What is written inside is kept when it ends, and undone when it raises."""
        self._layers.append({})
        try:
            yield
        except BaseException:
            self._layers.pop()
            raise
        written = self._layers.pop()
        self._layers[-1].update(written)

    def seal(self, block: int) -> Changes:
        """Makes what was written the state after `block`; returns what changed. No transaction may be open."""
        assert len(self._layers) == 1, "a block ends outside of transactions"
        assert block == self.head + 1, "blocks follow each other"
        changes = {key: value for key, value in self._layers[0].items() if self.raw_at(key, self.head) != value}
        self._layers[0].clear()
        self._append(block, changes)
        return changes

    def load(self, versions: Iterable[tuple[int, Changes]]) -> None:
        """Puts a kept history into a new state, in ascending order of blocks."""
        assert self.head == -1, "only a new state is loaded"
        for block, changes in versions:
            self._append(block, changes)

    def _append(self, block: int, changes: Mapping[bytes, bytes | None]) -> None:
        for key, value in changes.items():
            versions = self._versions.get(key)
            if versions is None:
                self._versions[key] = [(block, value)]
                insort(self._sorted_keys, key)
            else:
                versions.append((block, value))
        self._changed.append((block, list(changes)))
        self.head = block
        while self._changed and self._changed[0][0] <= self.first:
            floor, keys = self._changed.popleft()
            for key in keys:
                self._drop_before(key, floor)

    def _drop_before(self, key: bytes, floor: int) -> None:
        """Forgets what no block from `floor` on sees."""
        versions = self._versions[key]
        seen_from = bisect_right(versions, floor, key=lambda version: version[0]) - 1
        del versions[: max(0, seen_from)]
        if len(versions) == 1 and versions[0][1] is None:
            del self._versions[key]
            del self._sorted_keys[bisect_left(self._sorted_keys, key)]


class _Past:
    """The encoded state after one block."""

    def __init__(self, state: State, block: int) -> None:
        self._state = state
        self._block = block

    def raw(self, key: bytes) -> bytes | None:
        return self._state.raw_at(key, self._block)

    def keys(self, prefix: bytes) -> list[bytes]:
        return self._state.keys_at(prefix, self._block)
