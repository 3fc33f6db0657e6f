"""The JSON-RPC surface over a real websocket: answers, errors, subscriptions, bounds."""

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from itertools import count
from typing import Any

import pytest
from chain_kit import Lab, address
from websockets.asyncio.client import ClientConnection, connect
from websockets.exceptions import ConnectionClosed

from orion.common.clock import SystemClock
from orion.common.errors import ConfigError
from orion.devnet.config import DevnetConfig
from orion.devnet.rpc import METHODS, RpcError, answer
from orion.devnet.runtime_api import _METHODS
from orion.devnet.server import BATCH_MAX, SUBSCRIPTIONS_MAX, DevnetServer, serve_devnet

HOUR = DevnetConfig(block_ms=3_600_000)
"""Makes no block during a test but those that the test makes."""


class Peer:
    """A bare JSON-RPC client."""

    def __init__(self, connection: ClientConnection) -> None:
        self.connection = connection
        self._ids = count(1)

    async def ask(self, method: str, *params: object) -> Any:
        """The answer's result; raises what the server answered as an error."""
        request_id = next(self._ids)
        message = {"jsonrpc": "2.0", "id": request_id, "method": method, "params": list(params)}
        await self.connection.send(json.dumps(message))
        response = await self.next()
        assert response["id"] == request_id
        if "error" in response:
            raise RpcError(response["error"]["code"], response["error"]["message"], response["error"].get("data"))
        return response["result"]

    async def next(self) -> Any:
        return json.loads(await asyncio.wait_for(self.connection.recv(), 10))


@asynccontextmanager
async def _serving() -> AsyncIterator[tuple[DevnetServer, Peer]]:
    async with (
        serve_devnet("127.0.0.1", 0, HOUR, SystemClock(), new_seed=bytes) as running,
        connect(running.url) as connection,
    ):
        yield running.server, Peer(connection)


async def test_heads_follow_their_subscription() -> None:
    async with _serving() as (server, peer):
        subscription = await peer.ask("chain_subscribeNewHeads")
        numbers = [(await peer.next())["params"]]
        final = await peer.ask("chain_subscribeFinalizedHeads")
        first_final = await peer.next()
        assert first_final["method"] == "chain_finalizedHead"
        assert first_final["params"]["subscription"] == final
        for _ in range(2):
            server.produce_block()
            numbers.append((await peer.next())["params"])
            assert (await peer.next())["params"]["subscription"] == final
        assert [each["subscription"] for each in numbers] == [subscription] * 3
        assert [int(each["result"]["number"], 16) for each in numbers] == [0, 1, 2]
        assert await peer.ask("chain_unsubscribeNewHeads", subscription) is True
        assert await peer.ask("chain_unsubscribeNewHeads", subscription) is False
        assert await peer.ask("chain_unsubscribeFinalizedHeads", final) is True


async def test_an_extrinsic_is_followed_from_the_pool_into_a_block() -> None:
    async with _serving() as (server, peer):
        lab = Lab()
        lab.chain = server.chain
        call = lab.call("Balances", "transfer_keep_alive", dest=address("//Bob"), value=10**9)
        raw = "0x" + lab.extrinsic("//Alice", call).hex()
        subscription = await peer.ask("author_submitAndWatchExtrinsic", raw)
        assert (await peer.next())["params"] == {"subscription": subscription, "result": "ready"}
        assert await peer.ask("author_pendingExtrinsics") == [raw]
        assert await peer.ask("account_nextIndex", address("//Alice")) == 1
        with pytest.raises(RpcError) as twice:
            await peer.ask("author_submitExtrinsic", raw)
        assert twice.value.code == 1013
        server.produce_block()
        block_hash = _head(server)
        assert (await peer.next())["params"]["result"] == {"inBlock": block_hash}
        assert (await peer.next())["params"]["result"] == {"finalized": block_hash}
        block = (await peer.ask("chain_getBlock", block_hash))["block"]
        assert block["extrinsics"][1] == raw
        with pytest.raises(RpcError, match="Invalid Transaction") as stale:
            await peer.ask("author_submitExtrinsic", raw)
        assert (stale.value.code, stale.value.data) == (1010, "Transaction is outdated")


def _head(server: DevnetServer) -> str:
    return "0x" + server.chain.blocks.head_hash.hex()


async def test_batches_and_broken_requests() -> None:
    async with _serving() as (_, peer):
        batch = [
            {"jsonrpc": "2.0", "id": 1, "method": "chain_getHead", "params": []},
            {"jsonrpc": "2.0", "id": 2, "method": "chain_nothing"},
            {"jsonrpc": "2.0", "id": 3},
            "what",
        ]
        await peer.connection.send(json.dumps(batch))
        answers = await peer.next()
        assert answers[0]["result"].startswith("0x")
        assert [each["error"]["code"] for each in answers[1:]] == [-32601, -32600, -32600]
        assert answers[1]["error"]["message"] == "Method not found: chain_nothing"
        for message, code in (("{", -32700), ("[]", -32600), (json.dumps([1] * (BATCH_MAX + 1)), -32600)):
            await peer.connection.send(message)
            assert (await peer.next())["error"]["code"] == code
        assert (await peer.ask("system_properties"))["ss58Format"] == 42


async def test_subscriptions_are_bounded() -> None:
    async with _serving() as (_, peer):
        for _ in range(SUBSCRIPTIONS_MAX):
            await peer.ask("chain_subscribeNewHeads")
            await peer.next()
        with pytest.raises(RpcError, match="Too many subscriptions"):
            await peer.ask("chain_subscribeNewHeads")


async def test_who_does_not_read_is_cut_off_and_others_are_served(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("orion.devnet.server.QUEUE_MAX", 10)
    async with serve_devnet("127.0.0.1", 0, HOUR, SystemClock()) as running, connect(running.url) as reading:
        async with connect(running.url) as silent:
            peer = Peer(silent)
            for _ in range(20):
                await peer.ask("chain_subscribeNewHeads")
                await peer.next()
            running.server.produce_block()  # twenty messages at once, where ten may wait
            with pytest.raises(ConnectionClosed):
                for _ in range(20):
                    await peer.next()
        assert await Peer(reading).ask("chain_getHead") == _head(running.server)


async def test_a_taken_port_is_said() -> None:
    async with serve_devnet("127.0.0.1", 0, HOUR, SystemClock()) as running:
        port = int(running.url.rpartition(":")[2])
        with pytest.raises(ConfigError, match="choose another --port"):
            async with serve_devnet("127.0.0.1", port, HOUR, SystemClock()):
                pass


@pytest.mark.parametrize(
    ("method", "params", "code"),
    [
        ("state_getStorageAt", ["no hex"], -32602),
        ("state_getStorageAt", [], -32602),
        ("state_getStorageAt", ["0x00", "0x" + "11" * 32], 4003),
        ("state_call", ["Core_nothing", "0x"], 4003),
        ("state_call", ["SubnetInfoRuntimeApi_get_metagraph", "0x"], -32602),
        ("chain_getBlockHash", [[[]]], -32602),
        ("account_nextIndex", ["nobody"], -32602),
        ("author_submitExtrinsic", ["0x00"], 1010),
    ],
)
def test_bad_parameters_are_said(method: str, params: list[object], code: int) -> None:
    with pytest.raises(RpcError) as refused:
        answer(Lab().chain, method, params)
    assert refused.value.code == code


def test_blocks_and_keys_are_listed() -> None:
    lab = Lab()
    lab.subnet("//Bob")
    chain = lab.chain
    head = answer(chain, "chain_getHead", [])
    assert answer(chain, "chain_getBlockHash", []) == head
    assert answer(chain, "chain_getBlockHash", [chain.head.number]) == head
    assert answer(chain, "chain_getBlockHash", [10_000]) is None
    assert answer(chain, "chain_getHeader", ["0x" + "11" * 32]) is None
    prefix = "0x" + chain.runtime.storage_key("Keys", 1).hex()
    page = answer(chain, "state_getKeysPaged", [prefix, 1, prefix, head])
    rest = answer(chain, "state_getKeysPaged", [prefix, 10, page[0], head])  # type: ignore[index]
    assert len(page) == 1  # type: ignore[arg-type]
    assert len(rest) == 1  # type: ignore[arg-type]
    (answered,) = answer(chain, "state_queryStorageAt", [[page[0], "0x0011"], head])  # type: ignore[index,misc]
    assert [value is None for _, value in answered["changes"]] == [False, True]
    assert set(answer(chain, "rpc_methods", [])["methods"]) == set(METHODS)  # type: ignore[index]


@pytest.mark.parametrize(("api", "method"), sorted(_METHODS))
def test_every_runtime_api_answers_in_its_shape(api: str, method: str) -> None:
    """With a staked, validating neuron on the chain, so that nothing is empty that could be filled."""
    lab = Lab()
    netuid = lab.subnet("//Bob")
    lab.stake("//Bob", netuid, 5)
    lab.blocks(6)
    shape = lab.chain.runtime.apis[api][method]
    hotkey, coldkey = address("//Bob//hotkey"), address("//Bob")
    values = {"netuid": netuid, "uid": 1, "hotkey": hotkey, "hotkey_account": hotkey, "delegate_account": hotkey}
    data = b""
    for name, kind in shape["inputs"]:
        for value in (values.get(name, coldkey), netuid, [coldkey], None, (), b"x", {"ref_time": 0, "proof_size": 0}):
            try:
                data += lab.chain.runtime.encode(kind, value)
                break
            except (TypeError, ValueError):
                continue
    encoded = answer(lab.chain, "state_call", [f"{api}_{method}", "0x" + data.hex()])
    assert isinstance(encoded, str)
    lab.chain.runtime.decode(shape["output"], bytes.fromhex(encoded[2:]))
