"""The extrinsics that wait for a block.

Owns their order: as they came, and per signer by nonce. Must not check signatures or apply anything. Bounded.
"""

from collections.abc import Callable

from orion.devnet.extrinsics import Signed


class PoolRefusal(Exception):
    """The pool doesn't take an extrinsic; `code` and the text are what the real node answers."""

    def __init__(self, code: int, message: str) -> None:
        super().__init__(message)
        self.code = code


class Pool:
    """Waiting extrinsics, at most one a signer and nonce."""

    def __init__(self, size: int) -> None:
        self._size = size
        self._waiting: dict[tuple[str, int], Signed] = {}

    def __len__(self) -> int:
        return len(self._waiting)

    def add(self, extrinsic: Signed) -> None:
        """Raises PoolRefusal when it is there already, another has its place, or the pool is full."""
        key = (extrinsic.signer, extrinsic.nonce)
        there = self._waiting.get(key)
        if there is not None and there.hash == extrinsic.hash:
            raise PoolRefusal(1013, "Transaction is already imported")
        if there is not None:
            raise PoolRefusal(1014, "Priority is too low: another transaction with this nonce waits already")
        if len(self._waiting) >= self._size:
            raise PoolRefusal(1016, "Immediately dropped: the pool is full")
        self._waiting[key] = extrinsic

    def waiting(self) -> list[Signed]:
        """In the order in which they came."""
        return list(self._waiting.values())

    def remove(self, extrinsic: Signed) -> None:
        del self._waiting[extrinsic.signer, extrinsic.nonce]

    def next_nonce(self, signer: str, nonce: int) -> int:
        """The first nonce from `nonce` on that nothing waits with."""
        while (signer, nonce) in self._waiting:
            nonce += 1
        return nonce

    def drop(self, condition: Callable[[Signed], bool]) -> list[Signed]:
        """Removes and returns what fulfils the condition."""
        dropped = [extrinsic for extrinsic in self._waiting.values() if condition(extrinsic)]
        for extrinsic in dropped:
            self.remove(extrinsic)
        return dropped
