"""Blocks: their headers, hashes and bodies, and the chain of the recent ones.

Owns which block has which number and hash. Must not know state or extrinsics' meaning. Invariants: a block's parent is
the block before it; the hash is the real one of a Substrate header (BLAKE2b-256 over its SCALE encoding), while the
state root is a digest over the changes of every block, not a trie's.
"""

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from hashlib import blake2b

from orion.devnet.metadata import compact

NO_PARENT = bytes(32)


def digest(data: bytes) -> bytes:
    """BLAKE2b-256, the chain's hash."""
    return blake2b(data, digest_size=32).digest()


@dataclass(frozen=True)
class Block:
    """A block without its state."""

    number: int
    parent: bytes
    state_root: bytes
    extrinsics: tuple[bytes, ...]
    """Encoded, each with its length in front, in the order in which they were applied."""

    @property
    def extrinsics_root(self) -> bytes:
        return digest(b"".join(self.extrinsics))

    @property
    def hash(self) -> bytes:
        number = self.number
        # Headers carry the number in compact form; four bytes last for 2^30 blocks.
        return digest(self.parent + compact(number) + self.state_root + self.extrinsics_root + compact(0))

    def header(self) -> dict[str, object]:
        """As JSON-RPC gives it."""
        return {
            "parentHash": "0x" + self.parent.hex(),
            "number": hex(self.number),
            "stateRoot": "0x" + self.state_root.hex(),
            "extrinsicsRoot": "0x" + self.extrinsics_root.hex(),
            "digest": {"logs": []},
        }


def state_root(parent_root: bytes, changes: Mapping[bytes, bytes | None]) -> bytes:
    """A digest that commits to every change since the first block."""
    parts = [parent_root]
    for key, value in sorted(changes.items()):
        parts += [compact(len(key)), key, b"\x00" if value is None else b"\x01" + compact(len(value)) + value]
    return digest(b"".join(parts))


class BlockLog:
    """The first block and the recent ones, by number and by hash."""

    def __init__(self, history_blocks: int) -> None:
        """`history_blocks`: how many blocks before the newest are kept; the first is kept besides."""
        self._history_blocks = history_blocks
        self._blocks: OrderedDict[int, tuple[Block, bytes]] = OrderedDict()
        self._numbers: dict[bytes, int] = {}

    @property
    def head(self) -> Block:
        return next(reversed(self._blocks.values()))[0]

    @property
    def head_hash(self) -> bytes:
        return next(reversed(self._blocks.values()))[1]

    @property
    def genesis_hash(self) -> bytes:
        return self._blocks[0][1]

    def append(self, block: Block) -> None:
        """Adds the next block. A log that is loaded may leave out blocks behind the first."""
        block_hash = block.hash
        self._blocks[block.number] = (block, block_hash)
        self._numbers[block_hash] = block.number
        gone = block.number - self._history_blocks - 1
        if gone > 0 and gone in self._blocks:
            _, old_hash = self._blocks.pop(gone)
            del self._numbers[old_hash]

    def by_number(self, number: int) -> Block | None:
        found = self._blocks.get(number)
        return None if found is None else found[0]

    def hash_of(self, number: int) -> bytes | None:
        found = self._blocks.get(number)
        return None if found is None else found[1]

    def by_hash(self, block_hash: bytes) -> Block | None:
        number = self._numbers.get(block_hash)
        return None if number is None else self._blocks[number][0]

    def kept(self) -> Sequence[Block]:
        """The blocks that are kept, oldest first."""
        return [block for block, _ in self._blocks.values()]
