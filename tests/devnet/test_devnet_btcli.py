"""`btcli` itself against the development chain: the commands of docs/DEVNET.md, each a process of its own."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from ipaddress import ip_address
from pathlib import Path
from typing import Any

import bittensor as bt
import pytest
from devnet_kit import ALICE, succeed

from orion.devnet.config import DevnetConfig
from orion.devnet.threaded import devnet_in_thread

COMMAND_S = 100
"""A command takes about a second; this is for a machine that is very busy."""


class Btcli:
    """Runs btcli without a terminal, with wallets in a folder of the test's own."""

    def __init__(self, url: str, folder: Path) -> None:
        self._environment = {
            **os.environ,
            "BT_NETWORK": url,
            "BT_WALLET_PATH": str(folder / "wallets"),
            "BITTENSOR_RUNTIME_CACHE_DIR": str(folder / "cache"),
            "HOME": str(folder),
            "COLUMNS": "200",
            "NO_COLOR": "1",
        }
        self.url = url
        self.wallets = folder / "wallets"
        self._program = Path(sys.executable).with_name("btcli")

    def text(self, *command: str) -> str:
        """What a command prints, which must succeed."""
        done = subprocess.run(
            [self._program, *command],
            env=self._environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=COMMAND_S,
            check=False,
        )
        assert done.returncode == 0, f"btcli {' '.join(command)}:\n{done.stdout}\n{done.stderr}"
        return done.stdout

    def json(self, *command: str) -> Any:
        return json.loads(self.text(*command, "--json"))

    def submit(self, *command: str) -> Any:
        """Makes an extrinsic, which must succeed."""
        answer = self.json(*command, "--yes")
        assert answer["success"], answer
        return answer


@pytest.fixture
def btcli(tmp_path: Path) -> Iterator[Btcli]:
    with devnet_in_thread(DevnetConfig(block_ms=250, tempo=4, weights_rate_limit=2)) as url:
        yield Btcli(url, tmp_path)


async def _prepare(url: str, owner: bt.Wallet, miner_coldkey: str) -> None:
    """The owner's started subnet, and TAO for the miner; btcli does the rest."""
    async with bt.Subtensor(url) as subtensor:
        for address, amount in ((owner.coldkeypub.ss58_address, 5000), (miner_coldkey, 50)):
            succeed(await subtensor.execute(bt.Transfer(dest_ss58=address, amount_tao=amount), ALICE))
        succeed(await subtensor.execute(bt.RegisterSubnet(), owner))
        succeed(await subtensor.execute(bt.StartCall(netuid=1), owner))


@pytest.mark.slow
@pytest.mark.timeout(600)
async def test_btcli_from_a_wallet_to_weights(btcli: Btcli) -> None:
    owner = bt.Wallet("owner", "hk", path=str(btcli.wallets))
    owner.create_new_coldkey(use_password=False, suppress=True)
    owner.create_new_hotkey(use_password=False, suppress=True)
    owner_hotkey = owner.hotkey.ss58_address
    made = btcli.json("wallet", "create", "-w", "miner", "-H", "hk", "--no-password")
    await _prepare(btcli.url, owner, made["coldkey_ss58"])

    btcli.submit("subnets", "register", "--netuid", "1", "-w", "miner", "-H", "hk")
    btcli.submit("axon", "set", "--netuid", "1", "--ip", "127.0.0.5", "--port", "8091", "-w", "miner", "-H", "hk")
    stake = ("--netuid", "1", "--hotkey", owner_hotkey, "--amount", "100", "-w", "owner", "--no-mev-shield")
    btcli.submit("stake", "add", *stake)
    btcli.submit("sudo", "set", "--netuid", "1", "--name", "immunity_period", "--value", "50", "-w", "owner")
    btcli.submit("weights", "set", "--netuid", "1", "--uids", "1", "--weights", "1.0", "-w", "owner", "-H", "hk")

    graph = btcli.json("subnets", "metagraph", "1")
    assert graph["hotkeys"][0] == owner_hotkey
    assert (graph["axons"][1]["ip"], graph["axons"][1]["port"]) == (int(ip_address("127.0.0.5")), 8091)
    assert graph["immunity_period"] == 50
    assert btcli.json("query", "weights", "--netuid", "1") == {"0": {"1": 1.0}}
    assert "2 neurons" in btcli.text("subnets", "list")
    assert owner.coldkeypub.ss58_address in btcli.text("subnets", "show", "1")
    assert "immunity_period" in btcli.text("subnets", "hyperparameters", "1")
    assert "49.9" in btcli.text("wallet", "balance", "-w", "miner")
