"""Merkle trees over ordered records: roots that grow with the list, proofs that part of a list is under a root. Pure.

The shape is that of RFC 6962: leaves and inner nodes are hashed under different first bytes, so neither passes for the
other, and a list of n leaves splits at the largest power of two below n. So the nodes that are complete never change
while the list grows, and a prefix has a root of its own that follows from the same nodes.

A proof is a list of hashes of complete subtrees, left to right, that together with the shown leaves cover the whole
list. Whoever checks it builds the list again from left to right, and meets the root of every prefix on the way at which
the subtrees were cut. One kind of proof thus shows that a range is in the list and that earlier lists are its prefixes.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

from blake3 import blake3

from orion.common.ids import Digest

_LEAF, _NODE = b"\x00", b"\x01"
_DIGEST_BYTES = 32


@dataclass(frozen=True, slots=True)
class Mark:
    """The root of a list when it had `size` leaves."""

    size: int
    root: Digest


def leaf_hash(record: bytes) -> bytes:
    """Of one record."""
    return blake3(_LEAF + record).digest()


def node_hash(left: bytes, right: bytes) -> bytes:
    """Of two subtrees side by side."""
    return blake3(_NODE + left + right).digest()


class Frontier:
    """The root of a list that only grows: keeps one hash for each power of two in its length, nothing else."""

    def __init__(self) -> None:
        self.num_leaves = 0
        self._peaks: list[tuple[int, bytes]] = []
        """Height and hash of the complete subtrees, left to right; heights fall."""

    def append(self, record: bytes) -> None:
        """The next record."""
        self.append_subtree(0, leaf_hash(record))

    def append_subtree(self, height: int, node: bytes) -> None:
        """The next 2**height records, by their hash. Raises ValueError where no complete subtree of that height
        begins."""
        if self.num_leaves % (1 << height):
            raise ValueError(f"no subtree of height {height} begins after {self.num_leaves} leaves")
        self.num_leaves += 1 << height
        while self._peaks and self._peaks[-1][0] == height:
            _, left = self._peaks.pop()
            node, height = node_hash(left, node), height + 1
        self._peaks.append((height, node))

    @property
    def root(self) -> Digest:
        """Of all so far; that of an empty list is the hash of nothing."""
        return _folded([node for _, node in self._peaks])


class MerkleTree:
    """A list with all its complete nodes, to prove from: 64 bytes a record."""

    def __init__(self, records: Sequence[bytes] = ()) -> None:
        self._levels: list[list[bytes]] = [[]]
        """Level h holds the hashes of the complete subtrees of 2**h leaves."""
        for record in records:
            self.append(record)

    def __len__(self) -> int:
        return len(self._levels[0])

    def append(self, record: bytes) -> None:
        """The next record."""
        self._levels[0].append(leaf_hash(record))
        height = 0
        while len(self._levels[height]) % 2 == 0:
            left, right = self._levels[height][-2:]
            height += 1
            if height == len(self._levels):
                self._levels.append([])
            self._levels[height].append(node_hash(left, right))

    def root(self, size: int | None = None) -> Digest:
        """Of the first `size` records, of all when None. Raises ValueError when there are not so many."""
        size = len(self) if size is None else size
        if not 0 <= size <= len(self):
            raise ValueError(f"{size} of {len(self)} records")
        return _folded([self._levels[height][index] for height, index in _cover(0, size)])

    def proof(self, sizes: Sequence[int], start: int, stop: int) -> tuple[Digest, ...]:
        """Shows records [start, stop) under the roots of the lists of `sizes` (growing; the last is the longest).

        Raises ValueError when that cannot be shown.
        """
        _require_growing(sizes)
        if not 0 <= start <= stop <= sizes[-1] <= len(self):
            raise ValueError(f"records {start} to {stop} of {sizes[-1]}, of {len(self)} in all")
        return tuple(
            Digest(self._levels[height][index].hex())
            for first, last in _hidden(sizes, start, stop)
            for height, index in _cover(first, last)
        )


def proof_fault(marks: Sequence[Mark], start: int, records: Sequence[bytes], proof: Sequence[Digest]) -> str | None:
    """What is wrong with a proof that `records` begin at `start` of the list that has all of `marks`; None: nothing.

    `marks` grow in size; the last one is the whole list. A list for which this is None is, at every mark, a
    continuation of what it was at the mark before, unless somebody can break the hash.
    """
    _require_growing([mark.size for mark in marks])
    stop = start + len(records)
    if start < 0 or stop > marks[-1].size:
        return f"records {start} to {stop} of a list of {marks[-1].size}"
    nodes = iter(proof)
    frontier = Frontier()
    for mark in marks:
        while frontier.num_leaves < mark.size:
            position = frontier.num_leaves
            if start <= position < stop:
                frontier.append(records[position - start])
                continue
            end = min(mark.size, start) if position < start else mark.size
            for height, _ in _cover(position, end):
                node = next(nodes, None)
                if node is None:
                    return "the proof is too short"
                raw = bytes.fromhex(node)
                if len(raw) != _DIGEST_BYTES:
                    return "the proof holds something that is no hash"
                frontier.append_subtree(height, raw)
        if frontier.root != mark.root:
            return f"the first {mark.size} records have another root"
    return None if next(nodes, None) is None else "the proof is too long"


def _require_growing(sizes: Sequence[int]) -> None:
    if not sizes or sizes[0] < 0 or any(later <= earlier for earlier, later in pairwise(sizes)):
        raise ValueError("sizes must be there and grow")


def _hidden(sizes: Sequence[int], start: int, stop: int) -> Iterator[tuple[int, int]]:
    """The ranges that a proof covers by hashes: all but [start, stop), cut at every size."""
    cuts = sorted({0, start, stop, *sizes})
    for first, last in pairwise(cuts):
        if not start <= first < stop:
            yield first, last


def _cover(first: int, last: int) -> Iterator[tuple[int, int]]:
    """Height and index of the largest complete subtrees that cover leaves [first, last), left to right."""
    while first < last:
        height = (last - first).bit_length() - 1
        if first:
            height = min(height, (first & -first).bit_length() - 1)
        yield height, first >> height
        first += 1 << height


def _folded(nodes: list[bytes]) -> Digest:
    if not nodes:
        return Digest(blake3(b"").hexdigest())
    root = nodes[-1]
    for node in reversed(nodes[:-1]):
        root = node_hash(node, root)
    return Digest(root.hex())
