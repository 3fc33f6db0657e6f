"""Chains for the contract suite: a subnet with rules, and hands to let blocks pass, to register and to set rules."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from types import MappingProxyType
from typing import Protocol

from orion.common.clock import SystemClock
from orion.common.net.bittensor_chain import BittensorChain
from orion.common.net.bittensor_client import BittensorClient
from orion.common.net.chain import Chain, Hyperparameters
from orion.common.net.coldkey import RAO, Coldkey
from orion.common.net.memory_chain import ChainLedger, MemoryChain
from orion.common.protocol.signing import Keypair, hotkey_of, keypair_from_uri
from orion.devnet.config import DevnetConfig
from orion.devnet.server import serve_devnet

BLOCK_MS = 50
ROOT = keypair_from_uri("//Alice")
_NAMES = MappingProxyType(
    {
        "weights_rate_limit_blocks": "weights_set_rate_limit",
        "serving_rate_limit": "serving_rate_limit",
        "min_allowed_weights": "min_allowed_weights",
        "weights_version": "weights_version_key",
        "commit_reveal": "commit_reveal_weights_enabled",
        "tempo": "tempo",
    }
)
"""What the chain's root calls the rules that `Hyperparameters` names."""


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


class SdkWorld:
    """A new subnet on a chain that is reached through the SDK, owned by the root."""

    def __init__(self, client: BittensorClient, netuid: int) -> None:
        self.client = client
        self.netuid = netuid
        self.root = Coldkey(client, ROOT)

    def chain_of(self, keypair: Keypair) -> BittensorChain:
        return BittensorChain(self.client, self.netuid, keypair)

    async def register(self, keypair: Keypair) -> int:
        return await self.root.register_openly(self.netuid, hotkey_of(keypair))

    async def set_rules(self, **changes: int | bool) -> None:
        await self.root.set_rules(self.netuid, {_NAMES[name]: value for name, value in changes.items()})

    async def pass_blocks(self, count: int) -> None:
        # Not by the SDK's own wait: that leaves a subscription to be ended in the background, even when its connection
        # is closed meanwhile; then the SDK opens it again, and nobody closes that one.
        chain = self.chain_of(ROOT)
        until = await chain.block() + count
        while True:
            if await chain.block() >= until:
                return
            await asyncio.sleep(BLOCK_MS / 1000)


@asynccontextmanager
async def memory_world(owner: Keypair, validator: Keypair) -> AsyncIterator[ChainWorld]:
    rules = Hyperparameters(tempo=10, weights_rate_limit_blocks=0)
    ledger = ChainLedger(rules, owner=hotkey_of(owner), stakes={hotkey_of(validator): 100.0})
    ledger.register(hotkey_of(validator))
    ledger.advance_to(rules.tempo)
    yield MemoryWorld(ledger)


@asynccontextmanager
async def sdk_world(url: str, owner: Keypair, validator: Keypair) -> AsyncIterator[SdkWorld]:
    """A new subnet on the chain at `url`, where //Alice must have TAO and be root."""
    async with BittensorClient(url) as client:
        netuid = await Coldkey(client, ROOT).make_subnet(hotkey_of(owner))
        world = SdkWorld(client, netuid)
        await asyncio.gather(
            world.set_rules(tempo=10, weights_rate_limit_blocks=0, commit_reveal=False, min_allowed_weights=1),
            world.set_rules(serving_rate_limit=0),
            world.root.start(netuid),
            world.register(validator),
        )
        await world.root.stake(netuid, hotkey_of(validator), 100 * RAO)
        chain = world.chain_of(validator)
        while (own := (await chain.metagraph()).neuron_of(hotkey_of(validator))) is None or not own.validator_permit:
            await world.pass_blocks(1)
        yield world


@asynccontextmanager
async def devnet_world(owner: Keypair, validator: Keypair) -> AsyncIterator[SdkWorld]:
    """The same on a development chain in this process."""
    async with (
        serve_devnet("127.0.0.1", 0, DevnetConfig(block_ms=BLOCK_MS), SystemClock()) as running,
        sdk_world(running.url, owner, validator) as world,
    ):
        yield world
