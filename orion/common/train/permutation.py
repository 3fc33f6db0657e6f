"""A keyed shuffle of 0 … size−1 that is computed, not stored.

Owns one bijection: a Feistel network over the smallest near-square grid that holds the range, walking on while it
lands on one of the grid's few surplus cells. Any index costs a few hashes; no table grows with the data.
Invariant: for a fixed (size, key) the map is one-to-one onto the range, on every machine.
"""

from math import isqrt

from blake3 import blake3

NUM_ROUNDS = 6
"""Four rounds already make a strong pseudo-random permutation; two more cost little and help tiny ranges."""


class KeyedPermutation:
    """Bijection of range(size), fixed by a 32-byte key."""

    __slots__ = ("_key", "_num_columns", "_num_rows", "size")

    def __init__(self, size: int, key: bytes) -> None:
        """`size` ≥ 1; `key` is 32 bytes. Raises ValueError otherwise."""
        if size < 1:
            raise ValueError(f"a permutation needs at least one element, not {size}")
        if len(key) != blake3.key_size:
            raise ValueError(f"the key has {len(key)} bytes, not {blake3.key_size}")
        self.size = size
        self._key = key
        # rows × columns ≥ size with a surplus below √size + 1, so that walking on is rare.
        self._num_rows = isqrt(size - 1) + 1
        self._num_columns = -(-size // self._num_rows)

    def __call__(self, index: int) -> int:
        """Where `index` goes. Raises IndexError outside 0 … size−1."""
        if not 0 <= index < self.size:
            raise IndexError(f"index {index} lies outside 0 … {self.size - 1}")
        # Ends: the orbit of `index` on the grid comes back to `index` itself, which is inside the range.
        while True:
            index = self._scramble(index)
            if index < self.size:
                return index

    def _scramble(self, cell: int) -> int:
        row, column = divmod(cell, self._num_columns)
        for round_index in range(0, NUM_ROUNDS, 2):
            row = (row + self._mix(round_index, column)) % self._num_rows
            column = (column + self._mix(round_index + 1, row)) % self._num_columns
        return row * self._num_columns + column

    def _mix(self, round_index: int, half: int) -> int:
        block = half.to_bytes(8, "little") + bytes((round_index,))
        return int.from_bytes(blake3(block, key=self._key).digest(length=8), "little")
