"""A development chain without a network: extrinsics signed as the SDK signs them, blocks made by hand."""

from typing import Any

import bittensor_core
from bittensor.sp_core import Keypair

from orion.devnet.blocks import Block
from orion.devnet.chain import DevChain, Sealed
from orion.devnet.config import DevnetConfig

CONFIG = DevnetConfig(block_ms=1000, history_blocks=64, tempo=5, weights_rate_limit=3, immunity_period=4, max_uids=4)


def key(uri: str) -> Keypair:
    """The pair of a development URI such as //Alice."""
    return Keypair.create_from_uri(uri)


def address(uri: str) -> str:
    return str(key(uri).ss58_address)


class Lab:
    """A new chain and what a test does with it. One second passes from block to block."""

    def __init__(self, config: DevnetConfig = CONFIG) -> None:
        self.chain, self.genesis = DevChain.begin(config, b"a test's chain", 1_000_000)
        self.sealed: list[Sealed] = [self.genesis]
        self._sdk_runtime = bittensor_core.Runtime(self.chain.runtime.metadata, 461, 1, 42)

    def blocks(self, num_blocks: int = 1) -> Block:
        """Makes blocks; returns the last."""
        for _ in range(num_blocks):
            self.sealed.append(self.chain.produce_block(1_000_000 + 1000 * (self.chain.head.number + 1)))
        return self.chain.head

    def extrinsic(
        self, uri: str, call: bytes, *, nonce: int | None = None, period: int = 32, genesis: bytes | None = None
    ) -> bytes:
        """A signed extrinsic as the SDK would send it now; `period` 0 = good for ever."""
        runtime, pair = self._sdk_runtime, key(uri)
        nonce = self.chain.next_nonce(pair.ss58_address) if nonce is None else nonce
        head = self.chain.head.number
        era: Any = {"period": period, "current": head} if period else "00"
        birth = head // period * period + head % period if period else 0
        era_hash = self.chain.blocks.hash_of(birth)
        genesis_hash = genesis or self.chain.blocks.genesis_hash
        payload = runtime.signature_payload(
            call, era=era, nonce=nonce, tip=0, tip_asset_id=None, genesis_hash=genesis_hash, era_block_hash=era_hash
        )
        data, _ = runtime.encode_signed_extrinsic(
            call,
            public_key=pair.public_key,
            signature=pair.sign(bytes(payload)),
            signature_version=1,
            era=era,
            nonce=nonce,
            tip=0,
            tip_asset_id=None,
        )
        return bytes(data)

    def call(self, pallet: str, function: str, **args: object) -> bytes:
        return self.chain.runtime.compose_call(pallet, function, **args)

    def send(self, uri: str, pallet: str, function: str, **args: object) -> None:
        """Puts a call into the pool."""
        self.chain.submit(self.extrinsic(uri, self.call(pallet, function, **args)))

    def run(self, uri: str, function: str, pallet: str = "SubtensorModule", **args: object) -> str:
        """Makes a call in a block of its own. Returns "ok", or the name of the error."""
        self.send(uri, pallet, function, **args)
        self.blocks()
        return self.outcomes()[-1]

    def root(self, function: str, pallet: str = "AdminUtils", **args: object) -> str:
        """Makes a call as the root, in a block of its own."""
        self.send("//Alice", "Sudo", "sudo", call=self.call(pallet, function, **args))
        self.blocks()
        (result,) = [e["attributes"]["sudo_result"] for e in self.events() if e["event_id"] == "Sudid"]
        return "ok" if "Ok" in result else self._name_of(result["Err"])

    def outcomes(self) -> list[str]:
        """Of the signed extrinsics of the newest block, in order: "ok", or the name of the error."""
        found = []
        for event in self.events()[1:]:
            if event["event_id"] == "ExtrinsicSuccess":
                found.append("ok")
            elif event["event_id"] == "ExtrinsicFailed":
                found.append(self._name_of(event["attributes"]["dispatch_error"]))
        return found

    def events(self) -> list[dict[str, Any]]:
        """Of the newest block, as the SDK decodes them."""
        return list(self.chain.state.get("System.Events"))

    def get(self, name: str, *params: object) -> Any:
        return self.chain.state.get(name, *params)

    def free(self, uri: str) -> int:
        return int(self.get("System.Account", address(uri))["data"]["free"])

    def subnet(self, *miners: str) -> int:
        """Alice's started subnet, with a slot for //Alice//hotkey and for the hotkey of each miner."""
        assert self.run("//Alice", "register_network", hotkey=address("//Alice//hotkey")) == "ok"
        netuid = max(netuid for (netuid,), _ in self.chain.state.items("NetworksAdded"))
        assert self.run("//Alice", "start_call", netuid=netuid) == "ok"
        for miner in miners:
            assert self.run(miner, "burned_register", netuid=netuid, hotkey=address(f"{miner}//hotkey")) == "ok"
        return int(netuid)

    def stake(self, uri: str, netuid: int, tao: int) -> str:
        hotkey = address(f"{uri}//hotkey")
        return self.run(uri, "add_stake", hotkey=hotkey, netuid=netuid, amount_staked=tao * 10**9)

    def _name_of(self, error: Any) -> str:
        if not isinstance(error, dict):
            return str(error)
        ((kind, value),) = error.items()
        if kind != "Module":
            return str(value or kind)
        number = value["error"]
        first = bytes.fromhex(number[2:])[0] if isinstance(number, str) else number[0]
        return str(self._sdk_runtime.module_error(value["index"], first)[0])
