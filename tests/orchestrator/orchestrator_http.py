"""A real orchestrator on loopback, and clients that sign with real keys."""

import asyncio
import contextlib
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

from orion.common.config import RunSpec
from orion.common.net.chain import Hyperparameters, Metagraph
from orion.common.net.memory_chain import ChainLedger, MemoryChain
from orion.common.net.orchestrator_client import OrchestratorClient
from orion.common.net.rpc import RpcClient
from orion.common.protocol.messages import RefusalCode
from orion.common.protocol.refusals import RefusedError
from orion.common.protocol.signing import Keypair, hotkey_of, keypair_from_uri
from orion.orchestrator.config import OrchestratorConfig
from orion.orchestrator.service import serve

ORCHESTRATOR_KEY = keypair_from_uri("//orchestrator")
MINER_KEYS = [keypair_from_uri(f"//miner/{number}") for number in range(2)]
VALIDATOR_KEY = keypair_from_uri("//validator")
STRANGER_KEY = keypair_from_uri("//stranger")


class WatchedChain(MemoryChain):
    """Tells when it was read for the second time: then the orchestrator has taken in what it read first."""

    def __init__(self, ledger: ChainLedger) -> None:
        super().__init__(ledger)
        self.reads: asyncio.Queue[None] = asyncio.Queue()

    async def metagraph(self) -> Metagraph:
        self.reads.put_nowait(None)
        return await super().metagraph()


def make_chain() -> WatchedChain:
    """The miners and a validator with a permit are registered; the stranger is not."""
    ledger = ChainLedger(Hyperparameters(tempo=1), stakes={hotkey_of(VALIDATOR_KEY): 100.0})
    for key in (*MINER_KEYS, VALIDATOR_KEY):
        ledger.register(hotkey_of(key))
    ledger.advance_to(1)
    return WatchedChain(ledger)


def make_config(folder: Path, **changes: object) -> OrchestratorConfig:
    return OrchestratorConfig.model_validate(
        {
            "state_folder": folder / "orchestrator",
            "port": 0,
            "tick_s": 0.05,
            "chain_poll_s": 0.05,
            # Below the chain's poll, for whose second time `orchestrator` waits: nobody is refused after a restart.
            "clock_skew_s": 0.02,
            **changes,
        }
    )


@asynccontextmanager
async def orchestrator(config: OrchestratorConfig, spec: RunSpec, chain: WatchedChain) -> AsyncIterator[str]:
    """Runs a whole orchestrator; gives its base URL once it knows who is registered."""
    chain.reads = asyncio.Queue()
    listening: asyncio.Future[str] = asyncio.get_running_loop().create_future()
    task = asyncio.create_task(serve(config, spec, ORCHESTRATOR_KEY, chain, on_listening=listening.set_result))

    def tell_failure(_: object) -> None:
        if not listening.done():
            listening.set_exception(task.exception() or AssertionError("ended before it listened"))

    task.add_done_callback(tell_failure)
    url = await listening
    try:
        for _ in range(2):
            await chain.reads.get()
        await _until_known(url, spec)
        yield url
    finally:
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task


async def _until_known(url: str, spec: RunSpec) -> None:
    """Returns once the orchestrator has decided on what it read: then the validator may ask."""
    async with asyncio.timeout(30.0), client(VALIDATOR_KEY, url, spec) as api:
        while True:
            try:
                await api.feed(0, 0.0)
                return
            except RefusedError as error:
                if error.code is RefusalCode.BUSY:
                    return  # it goes on from a journal, in which everybody is known, and takes nothing yet
                if error.code is not RefusalCode.FORBIDDEN:
                    raise
                await asyncio.sleep(0.02)


@asynccontextmanager
async def client(key: Keypair, url: str, spec: RunSpec) -> AsyncIterator[OrchestratorClient]:
    async with RpcClient(key, spec.digest) as rpc:
        yield OrchestratorClient(rpc, url, hotkey_of(ORCHESTRATOR_KEY), timeout_s=10.0)
