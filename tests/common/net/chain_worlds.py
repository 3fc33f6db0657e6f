"""Chains for the contract suite: a subnet with rules, and hands to let blocks pass and to register and stake."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Protocol

from orion.common.ids import Hotkey
from orion.common.net.chain import Chain, Hyperparameters
from orion.common.net.memory_chain import ChainLedger, MemoryChain
from orion.common.protocol.signing import Keypair, hotkey_of


class ChainWorld(Protocol):
    """One subnet that nobody else uses. Its owner has uid 0; the validator is registered, staked, and has a permit."""

    def chain_of(self, keypair: Keypair) -> Chain:
        """The chain as this hotkey reaches it."""
        ...

    async def register(self, keypair: Keypair) -> int:
        """Gives it a slot; its uid."""
        ...

    async def set_rules(self, **changes: int | bool) -> None:
        """Changes the subnet's rules, by the names of `Hyperparameters`."""
        ...

    async def pass_blocks(self, count: int) -> None:
        """Returns once so many blocks have passed."""
        ...


class MemoryWorld:
    """A ledger."""

    def __init__(self, ledger: ChainLedger) -> None:
        self.ledger = ledger

    def chain_of(self, keypair: Keypair) -> Chain:
        return MemoryChain(self.ledger, hotkey_of(keypair))

    async def register(self, keypair: Keypair) -> int:
        return self.ledger.register(hotkey_of(keypair))

    async def set_rules(self, **changes: int | bool) -> None:
        self.ledger.hyperparameters = self.ledger.hyperparameters.model_copy(update=changes)

    async def pass_blocks(self, count: int) -> None:
        self.ledger.advance_to(self.ledger.block + count)


@asynccontextmanager
async def memory_world(owner: Hotkey, validator: Keypair) -> AsyncIterator[ChainWorld]:
    rules = Hyperparameters(tempo=10, weights_rate_limit_blocks=0)
    ledger = ChainLedger(rules, owner=owner, stakes={hotkey_of(validator): 100.0})
    ledger.register(hotkey_of(validator))
    ledger.advance_to(rules.tempo)
    yield MemoryWorld(ledger)
