"""The SDK behind the seam where it differs from a ledger in memory: endpoints that are lost, deadlines, raw calls."""

import asyncio
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import psutil
import pytest
from chain_worlds import SdkWorld, devnet_world, sdk_world
from devnet_process import devnet_process

from orion.common.clock import SystemClock
from orion.common.errors import ConfigError, TransportError
from orion.common.net.bittensor_chain import BittensorChain
from orion.common.net.bittensor_client import BittensorClient
from orion.common.net.bittensor_weights import set_weights_raw
from orion.common.net.chain import ChainError, ChainErrorCode
from orion.common.protocol.signing import hotkey_of, keypair_from_uri
from orion.devnet.config import DevnetConfig
from orion.devnet.server import serve_devnet
from orion.miner.axon import publish_axon

OWNER, VALIDATOR, MINER0, MINER1 = (
    keypair_from_uri(f"//sdk/{name}") for name in ("owner", "validator", "miner0", "miner1")
)


def num_connections_to(port: int | None) -> int:
    """Of this process."""
    found = psutil.Process().net_connections("tcp")
    return sum(
        bool(each.raddr) and each.raddr.port == port and each.status == psutil.CONN_ESTABLISHED for each in found
    )


@pytest.fixture
async def world() -> AsyncIterator[SdkWorld]:
    async with devnet_world(OWNER, VALIDATOR) as world:
        yield world


async def test_a_chain_that_went_away_is_found_again(tmp_path: Path, unused_tcp_port: int) -> None:
    state = tmp_path / "chain"
    async with devnet_process(state, unused_tcp_port) as url, sdk_world(url, OWNER, VALIDATOR) as world:
        netuid = world.netuid
        uid = await world.register(MINER0)
        await world.chain_of(VALIDATOR).set_weights({uid: 1.0})
    async with BittensorClient(url) as client:
        chain = BittensorChain(client, netuid, VALIDATOR)
        with pytest.raises(TransportError):
            await chain.block()
        async with devnet_process(state, unused_tcp_port):
            before = await chain.block()
            assert await chain.weights_of(hotkey_of(VALIDATOR)) == {uid: 1.0}
        # The server is killed with the connection open.
        with pytest.raises(TransportError):
            await chain.metagraph()
        async with devnet_process(state, unused_tcp_port):
            assert (await chain.metagraph()).block >= before
            await chain.set_weights({uid: 1.0})


async def test_a_lost_endpoint_is_replaced_by_the_next(
    tmp_path: Path, unused_tcp_port_factory: Callable[[], int]
) -> None:
    state = tmp_path / "chain"
    first, second = unused_tcp_port_factory(), unused_tcp_port_factory()
    async with BittensorClient(f"ws://127.0.0.1:{first}", [f"ws://127.0.0.1:{second}"]) as client:
        chain = BittensorChain(client, 1, VALIDATOR)
        async with devnet_process(state, first):
            before = await chain.block()
        async with devnet_process(state, second):
            assert await chain.block() >= before


async def test_a_server_that_does_not_answer_is_given_up() -> None:
    released = asyncio.Event()

    async def say_nothing(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await released.wait()
        writer.close()
        await writer.wait_closed()

    server = await asyncio.start_server(say_nothing, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    async with server, BittensorClient(f"ws://127.0.0.1:{port}") as client:
        async with asyncio.timeout(5.0):
            with pytest.raises(TransportError, match="no answer within"):
                await client.ask(lambda sdk: sdk.block(), timeout_s=0.3)
        released.set()
        with pytest.raises(TransportError):
            await client.ask(lambda sdk: sdk.block(), timeout_s=5.0)


async def test_a_connection_that_was_given_up_is_closed_when_the_last_question_has_its_answer() -> None:
    given_up = asyncio.Event()

    async def ask_late(sdk: Any) -> int:
        await given_up.wait()
        return int(await sdk.block())

    async with serve_devnet("127.0.0.1", 0, DevnetConfig(block_ms=50), SystemClock()) as running:
        port = urlsplit(running.url).port
        async with BittensorClient(running.url) as client:
            late = asyncio.create_task(client.ask(ask_late))
            before = await client.ask(lambda sdk: sdk.block())
            assert num_connections_to(port) == 1
            with pytest.raises(TransportError, match="no answer within"):
                await client.ask(lambda _: asyncio.sleep(60.0), timeout_s=0.01)
            given_up.set()
            assert await late >= before
            assert await client.ask(lambda sdk: sdk.block()) >= before
        assert num_connections_to(port) == 0


async def test_an_endpoint_that_asks_for_patience_is_left_alone() -> None:
    num_connections = 0

    async def turn_away(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal num_connections
        num_connections += 1
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 429 Too Many Requests\r\nRetry-After: 60\r\nContent-Length: 0\r\n\r\n")
        writer.close()
        await writer.wait_closed()

    server = await asyncio.start_server(turn_away, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    async with server, BittensorClient(f"ws://127.0.0.1:{port}") as client:
        with pytest.raises(TransportError, match="left alone for 60 s"):
            await client.ask(lambda sdk: sdk.block())
        for _ in range(3):
            with pytest.raises(TransportError, match="asked for patience"):
                await client.ask(lambda sdk: sdk.block())
    assert num_connections == 1


def test_an_unknown_network_is_told_at_once() -> None:
    with pytest.raises(ConfigError, match="--network nowhere"):
        BittensorClient("nowhere")


async def test_a_subnet_that_does_not_exist_is_named(world: SdkWorld) -> None:
    with pytest.raises(ChainError, match="there is no subnet 77") as caught:
        await BittensorChain(world.client, 77).metagraph()
    assert caught.value.code is ChainErrorCode.NO_SUBNET


async def test_what_the_runtime_lacks_is_said_to_be_unsupported(world: SdkWorld) -> None:
    with pytest.raises(ChainError) as caught:
        await world.client.ask(lambda sdk: sdk.query(("SubtensorModule", "NoSuchItem"), [1]))
    assert caught.value.code is ChainErrorCode.UNSUPPORTED


async def test_weights_by_raw_calls_are_the_same_weights(world: SdkWorld) -> None:
    uids = [await world.register(key) for key in (MINER0, MINER1)]
    chain = world.chain_of(VALIDATOR)
    await set_weights_raw(world.client, VALIDATOR, world.netuid, {uids[0]: 3.0, uids[1]: 1.0})
    raw = await chain.weights_of(hotkey_of(VALIDATOR))
    await chain.set_weights({uids[0]: 3.0, uids[1]: 1.0})
    assert await chain.weights_of(hotkey_of(VALIDATOR)) == raw
    await world.set_rules(commit_reveal=True)
    await set_weights_raw(world.client, VALIDATOR, world.netuid, {uids[0]: 1.0})
    (commit,) = await chain.commits_of(hotkey_of(VALIDATOR))
    assert commit.reveal_round > 0


async def test_an_axons_rate_limit_is_waited_out(world: SdkWorld) -> None:
    await world.register(MINER0)
    chain = world.chain_of(MINER0)
    await chain.serve_axon("http://10.0.0.1:8000")
    served = await chain.block()
    await world.set_rules(serving_rate_limit=20)
    with pytest.raises(ChainError) as caught:
        await chain.serve_axon("http://10.0.0.1:8001")
    assert caught.value.code is ChainErrorCode.RATE_LIMITED
    assert caught.value.retry_after_blocks is not None and caught.value.retry_after_blocks <= 20
    async with asyncio.timeout(20.0):
        await publish_axon(chain, "http://10.0.0.1:8001")
    neuron = (await chain.metagraph()).neuron_of(hotkey_of(MINER0))
    assert neuron is not None and neuron.axon_url == "http://10.0.0.1:8001"
    assert await chain.block() >= served + 20


async def test_an_axon_that_the_chain_will_not_have_is_given_up(world: SdkWorld) -> None:
    await publish_axon(world.chain_of(MINER1), "http://10.0.0.1:8000")
    assert (await world.chain_of(MINER1).metagraph()).neuron_of(hotkey_of(MINER1)) is None


async def test_who_only_reads_cannot_act(world: SdkWorld) -> None:
    chain = BittensorChain(world.client, world.netuid)
    assert (await chain.metagraph()).neuron_of(hotkey_of(VALIDATOR)) is not None
    with pytest.raises(ValueError, match="opened for reading"):
        await chain.set_weights({0: 1.0})
