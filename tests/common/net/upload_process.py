"""Uploads one object in a process of its own, which can be killed: URL, key, size and seed."""

import asyncio
import sys

import torch
from net_loopback import CLIENT_KEY, RUN, SERVER

from orion.common.net.object_client import ObjectClient
from orion.common.net.orchestrator_client import OrchestratorClient
from orion.common.net.rpc import RpcClient
from orion.common.protocol.codec import Body, encode


def body_of(num_bytes: int, seed: int) -> Body:
    """The same in every process."""
    generator = torch.Generator().manual_seed(seed)
    return encode({"values": torch.randint(-128, 128, (num_bytes,), dtype=torch.int8, generator=generator)})


async def main() -> None:
    url, key, num_bytes, seed = sys.argv[1:]
    async with RpcClient(CLIENT_KEY, RUN) as rpc:
        await ObjectClient(OrchestratorClient(rpc, url, SERVER)).put(key, body_of(int(num_bytes), int(seed)))


if __name__ == "__main__":
    asyncio.run(main())
