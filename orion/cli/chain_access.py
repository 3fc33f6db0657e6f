"""How a command reaches its subnet: what the command line says about the chain, and the chain behind it."""

from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import TypeVar

from orion.common.net.bittensor_chain import BittensorChain
from orion.common.net.bittensor_client import BittensorClient
from orion.common.protocol.signing import Keypair

ResultT = TypeVar("ResultT")


@dataclass(frozen=True, slots=True)
class Subnet:
    """One subnet of one chain."""

    network: str
    """finney, test, local, or a ws:// or wss:// URL."""
    netuid: int
    fallbacks: tuple[str, ...] = ()
    """Further endpoints of the same chain."""


@asynccontextmanager
async def open_chain(subnet: Subnet, keypair: Keypair | None = None) -> AsyncIterator[BittensorChain]:
    """The chain until the block is left; it is reached when it is first asked. `keypair` is the hotkey that acts."""
    async with BittensorClient(subnet.network, subnet.fallbacks) as client:
        yield BittensorChain(client, subnet.netuid, keypair)


async def with_chain(subnet: Subnet, keypair: Keypair, work: Callable[[BittensorChain], Awaitable[ResultT]]) -> ResultT:
    """What the work gives that is done with the chain, signed as `keypair`."""
    async with open_chain(subnet, keypair) as chain:
        return await work(chain)
