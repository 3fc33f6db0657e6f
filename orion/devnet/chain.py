"""The development chain itself: takes extrinsics, makes blocks, answers questions. Synchronous; waits for nothing.

Owns the order of things: what is checked when an extrinsic comes, what a block contains, what happens at its end. The
rules are in `calls`, `epoch` and `yuma`. Must not know the network, the clock or a disk: time comes in with each
block, and what a block changed goes out, for whoever keeps it. Invariants: each block follows the one before; an
extrinsic is in at most one block; what was refused changes nothing.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from orion.devnet import accounts, epoch, shield, subnets
from orion.devnet.accounts import DEVELOPMENT_URIS, development_address
from orion.devnet.blocks import NO_PARENT, Block, BlockLog, digest, state_root
from orion.devnet.calls.registration import create_subnet
from orion.devnet.calls.table import carry_out
from orion.devnet.config import DevnetConfig
from orion.devnet.dispatch import DispatchError, Execution, Origin
from orion.devnet.extrinsics import InvalidTransaction, Signed, decode_signed, unsigned
from orion.devnet.metadata import Runtime, development_metadata
from orion.devnet.pool import Pool
from orion.devnet.state import Changes, Reader, State

TIMELOCK_VERSION = 4
"""Of the commits that the SDK makes."""

_SEALED_MAX = 16
"""Extrinsics that one carries sealed; the SDK's carry one."""


@dataclass(frozen=True)
class Sealed:
    """A block as it was made."""

    block: Block
    changes: Changes
    """Of the state."""
    included: tuple[bytes, ...] = ()
    """Hashes of the signed extrinsics in it."""
    dropped: tuple[bytes, ...] = ()
    """Hashes of those that left the pool because no block can take them any more."""


class DevChain:
    """One chain. `submit`, `produce_block` and the readers are all there is; each call is complete in itself."""

    def __init__(self, config: DevnetConfig, blocks: Sequence[Block], versions: Sequence[tuple[int, Changes]]) -> None:
        """Goes on from a kept history; `begin` makes a new chain."""
        self.config = config
        self.runtime = Runtime(development_metadata(config.block_ms))
        self.state = State(self.runtime, config.history_blocks)
        self.blocks = BlockLog(config.history_blocks)
        self.pool = Pool(config.pool_size)
        self.state.load(versions)
        for block in blocks:
            self.blocks.append(block)

    @classmethod
    def begin(cls, config: DevnetConfig, seed: bytes, now_ms: int) -> tuple["DevChain", Sealed]:
        """A new chain and its first block. Chains of different seeds don't take each other's extrinsics."""
        chain = cls(config, (), ())
        execution = Execution(chain.state, 0, config)
        for uri in DEVELOPMENT_URIS:
            accounts.endow(chain.state, development_address(uri), config.endowment_rao)
        chain.state.put("Sudo.Key", value=development_address(DEVELOPMENT_URIS[0]))
        chain.state.put("NetworkRateLimit", value=0)
        chain.state.put("CommitRevealWeightsVersion", value=TIMELOCK_VERSION)
        for name in ("MevShield.CurrentKey", "MevShield.NextKey"):
            chain.state.put(name, value=shield.public_key())
        create_subnet(execution, subnets.ROOT_NETUID)
        chain.state.put("SubtokenEnabled", subnets.ROOT_NETUID, value=True)
        chain.state.put("Timestamp.Now", value=now_ms)
        return chain, chain._seal(execution, [], digest(seed))

    @property
    def head(self) -> Block:
        return self.blocks.head

    def reader(self, block_hash: bytes | None) -> Reader:
        """The state after a block, the newest by default. Raises LookupError when the block isn't known or kept."""
        if block_hash is None:
            return self.state.at(self.state.head)
        block = self.blocks.by_hash(block_hash)
        if block is None:
            raise LookupError(f"no block 0x{block_hash.hex()} is known")
        return self.state.at(block.number)

    def next_nonce(self, address: str) -> int:
        """The nonce of the account's next extrinsic, after those that wait."""
        return self.pool.next_nonce(address, accounts.nonce_of(self.state, address))

    def submit(self, raw: bytes) -> Signed:
        """Takes an extrinsic into the pool. Raises InvalidTransaction and PoolRefusal."""
        extrinsic = decode_signed(self.runtime, raw, self.head.number + 1, self.blocks.hash_of)
        if extrinsic.nonce < accounts.nonce_of(self.state, extrinsic.signer):
            raise InvalidTransaction("Transaction is outdated")
        self.pool.add(extrinsic)
        return extrinsic

    def produce_block(self, now_ms: int) -> Sealed:
        """Makes the next block of what waits. `now_ms`: since the Unix epoch; blocks' times only grow."""
        parent = self.blocks.head
        number = parent.number + 1
        execution = Execution(self.state, number, self.config)
        now_ms = max(now_ms, int(self.state.get("Timestamp.Now")) + 1)
        parent_hash = "0x" + self.blocks.head_hash.hex()
        self.state.put("System.ParentHash", value=parent_hash)
        self.state.put("System.BlockHash", parent.number, value=parent_hash)
        if parent.number >= self.config.history_blocks:
            self.state.remove("System.BlockHash", parent.number - self.config.history_blocks)
        self.state.put("Timestamp.Now", value=now_ms)
        execution.enter({"ApplyExtrinsic": 0})
        _succeeded(execution, "Mandatory")
        extrinsics = [unsigned(self.runtime.compose_call("Timestamp", "set", now=now_ms))]
        dropped = self.pool.drop(lambda extrinsic: not extrinsic.is_alive(number))
        included = self._apply_waiting(execution, extrinsics)
        dropped += self.pool.drop(lambda waiting: waiting.nonce < accounts.nonce_of(self.state, waiting.signer))
        execution.enter({"Finalization": None})
        epoch.run_due_epochs(execution)
        sealed = self._seal(execution, extrinsics, parent.state_root)
        return Sealed(sealed.block, sealed.changes, tuple(included), tuple(extrinsic.hash for extrinsic in dropped))

    def _apply_waiting(self, execution: Execution, extrinsics: list[bytes]) -> list[bytes]:
        """Applies what waits and whose turn it is by nonce, in order of arrival, until nothing is left or no room."""
        included: list[bytes] = []
        progress = True
        while progress:
            progress = False
            for extrinsic in self.pool.waiting():
                if len(included) >= self.config.block_size:
                    return included
                if extrinsic.nonce != accounts.nonce_of(self.state, extrinsic.signer):
                    continue
                self.pool.remove(extrinsic)
                for applied in (extrinsic, *self._opened(execution, extrinsic, len(extrinsics))):
                    extrinsics.append(applied.raw)
                    included.append(applied.hash)
                progress = True
        return included

    def _opened(self, execution: Execution, carrier: Signed, index: int) -> list[Signed]:
        """Applies an extrinsic at `index` of the block, and behind it what it carried sealed; returns the latter.

        What is sealed is an extrinsic of its own, with the next nonce. What can't be opened, or could not have been
        sent in the open, is left out; whoever sent it sees that it doesn't come.
        """
        _apply(execution, carrier, index)
        opened: list[Signed] = []
        for sealed in execution.sealed:
            try:
                inner = decode_signed(self.runtime, shield.open_sealed(sealed), execution.block, self.blocks.hash_of)
            except (ValueError, InvalidTransaction):
                continue
            if inner.nonce == accounts.nonce_of(self.state, inner.signer) and len(opened) < _SEALED_MAX:
                _apply(execution, inner, index + 1 + len(opened))
                opened.append(inner)
        execution.sealed.clear()
        return opened

    def _seal(self, execution: Execution, extrinsics: Sequence[bytes], parent_root: bytes) -> Sealed:
        number = execution.block
        self.state.put("System.Number", value=number)
        self.state.put("System.EventCount", value=len(execution.events))
        self.state.put("System.Events", value=execution.events)
        changes = self.state.seal(number)
        parent = self.blocks.head_hash if number else NO_PARENT
        block = Block(number, parent, state_root(parent_root, changes), tuple(extrinsics))
        self.blocks.append(block)
        return Sealed(block, changes)


def _apply(execution: Execution, extrinsic: Signed, index: int) -> None:
    execution.enter({"ApplyExtrinsic": index})
    accounts.count_nonce(execution.state, extrinsic.signer)
    try:
        carry_out(execution, Origin(extrinsic.signer), extrinsic.call)
    except DispatchError as error:
        failure = {"dispatch_error": execution.encode_error(error), "dispatch_info": _dispatch_info("Normal")}
        execution.emit("ExtrinsicFailed", pallet="System", **failure)
        return
    _succeeded(execution, "Normal")


def _succeeded(execution: Execution, dispatch_class: str) -> None:
    execution.emit("ExtrinsicSuccess", pallet="System", dispatch_info=_dispatch_info(dispatch_class))


def _dispatch_info(dispatch_class: str) -> dict[str, object]:
    return {"weight": {"ref_time": 0, "proof_size": 0}, "class": dispatch_class, "pays_fee": "No"}
