"""Memory for bodies that arrive, used again once nobody looks at it any more.

Fresh memory of some megabytes costs more than what is received into it: the kernel clears it page by page, and takes it
back when it is freed. Whoever took a buffer need not say when it is done: the last view of it that goes brings it back.

Invariants: a buffer is handed out again only when no view of it (memoryview, array or tensor) is left; few are kept.
"""

import weakref
from collections import defaultdict

import numpy as np
import numpy.typing as npt

KEPT_PER_SIZE_MAX = 8
"""Free ones: bodies come about as fast as they are freed, so more would only lie there."""
KEPT_BYTES_MAX = 64 * 1024 * 1024
"""Larger ones are not kept, and of smaller ones no more than this in all."""

_Memory = npt.NDArray[np.uint8]


class BufferPool:
    """Buffers by size. Any thread may let go of one; a single thread takes them."""

    def __init__(self) -> None:
        # No lock: a buffer may come back in the middle of anything, on this very thread. Steps on lists are atomic, and
        # a bound that two threads overstep by one is still a bound.
        self._free: defaultdict[int, list[_Memory]] = defaultdict(list)

    def take(self, size_bytes: int) -> memoryview:
        """Writable memory that is the caller's alone, with anything in it, for as long as a view of it is held."""
        free = self._free.get(size_bytes)
        memory = free.pop() if free else np.empty(size_bytes, np.uint8)
        lent = memory.view()
        weakref.finalize(lent, self._give_back, memory).atexit = False
        return lent.data

    @property
    def kept_bytes(self) -> int:
        """Of all that is free."""
        return sum(size_bytes * len(free) for size_bytes, free in list(self._free.items()))

    def _give_back(self, memory: _Memory) -> None:
        free = self._free[memory.nbytes]
        if len(free) < KEPT_PER_SIZE_MAX and self.kept_bytes + memory.nbytes <= KEPT_BYTES_MAX:
            free.append(memory)
