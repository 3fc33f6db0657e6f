"""`orion register` against a development chain: what it shows, asks, spends, and says when it can't."""

import asyncio
import io
import json
import os
import sys
from asyncio.subprocess import PIPE
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console

from orion.cli.registration import FEE_RESERVE_RAO, RegisterOptions, check_balance, register
from orion.common.clock import SystemClock
from orion.common.errors import ConfigError
from orion.common.net.bittensor_client import BittensorClient
from orion.common.net.chain import ChainError, ChainErrorCode
from orion.common.net.coldkey import RAO, Coldkey, balance_of
from orion.common.protocol.signing import create_wallet, hotkey_of, keypair_from_uri, load_coldkey
from orion.devnet.config import DevnetConfig
from orion.devnet.server import serve_devnet

ROOT = keypair_from_uri("//Alice")
FUNDS_RAO = 10 * RAO


@pytest.fixture
async def url() -> AsyncIterator[str]:
    """A development chain with one subnet."""
    async with serve_devnet("127.0.0.1", 0, DevnetConfig(block_ms=50), SystemClock()) as running:
        async with BittensorClient(running.url) as client:
            assert await Coldkey(client, ROOT).make_subnet(hotkey_of(keypair_from_uri("//owner"))) == 1
        yield running.url


def options_for(url: str, folder: Path) -> RegisterOptions:
    return RegisterOptions(
        network=url,
        netuid=1,
        fallbacks=(),
        wallet_path=folder,
        wallet="mine",
        hotkey="hk0",
        has_password=False,
        password=None,
    )


async def fund(url: str, folder: Path) -> str:
    """Makes the wallet and gives its coldkey something; the coldkey's address."""
    create_wallet(folder, "mine", "hk0")
    address = load_coldkey(folder, "mine").ss58_address
    async with BittensorClient(url) as client:
        await Coldkey(client, ROOT).pay(address, FUNDS_RAO)
    return address


class Asked:
    """Answers a question, and remembers it."""

    def __init__(self, answer: bool) -> None:
        self.answer = answer
        self.questions: list[str] = []

    def __call__(self, question: str) -> bool:
        self.questions.append(question)
        return self.answer


async def test_a_new_wallet_is_made_and_told_what_is_missing(url: str, tmp_path: Path) -> None:
    shown, asked = io.StringIO(), Asked(True)
    with pytest.raises(ChainError) as caught:
        await register(options_for(url, tmp_path), Console(file=shown, width=300), asked)
    assert caught.value.code is ChainErrorCode.BALANCE_TOO_LOW
    assert "τ0.102000000 are missing" in str(caught.value) and "\n" not in str(caught.value)
    assert asked.questions == []
    lines = shown.getvalue().splitlines()
    assert lines[0] == f"wallet   {tmp_path / 'mine'}, hotkey hk0"
    assert sum("write its words down" in line for line in lines) == 2
    assert (tmp_path / "mine" / "coldkey").is_file() and (tmp_path / "mine" / "hotkeys" / "hk0").is_file()


async def test_the_price_is_shown_and_asked_before_it_is_spent(url: str, tmp_path: Path) -> None:
    address = await fund(url, tmp_path)
    shown, asked = io.StringIO(), Asked(False)
    options, console = options_for(url, tmp_path), Console(file=shown, width=300)
    assert await register(options, console, asked) is None
    assert "which has τ10.000000000" in shown.getvalue() and "τ0.100000000" in shown.getvalue()
    assert asked.questions == ["Spend τ0.100000000 for a slot?"]
    async with BittensorClient(url) as client:
        assert await balance_of(client, address) == FUNDS_RAO

    asked.answer = True
    done = await register(options, console, asked)
    assert done is not None
    assert (done.uid, done.was_registered, done.cost_tao, done.coldkey) == (1, False, 0.1, address)
    async with BittensorClient(url) as client:
        assert await balance_of(client, address) == FUNDS_RAO - RAO // 10

    (tmp_path / "mine" / "coldkey").unlink()
    again = await register(options, console, asked)
    assert again is not None
    assert (again.uid, again.was_registered, again.cost_tao) == (1, True, 0.0)
    assert len(asked.questions) == 2, "who has a slot is asked nothing, and needs no coldkey"


async def test_without_the_coldkey_nothing_can_be_spent(url: str, tmp_path: Path) -> None:
    await fund(url, tmp_path)
    (tmp_path / "mine" / "coldkey").unlink()
    with pytest.raises(ConfigError, match="no coldkey at"):
        await register(options_for(url, tmp_path), Console(file=io.StringIO()), Asked(True))


async def test_a_coldkey_that_is_made_with_a_password_is_encrypted(url: str, tmp_path: Path) -> None:
    options = replace(options_for(url, tmp_path), has_password=True, password="secret")
    with pytest.raises(ChainError):
        await register(options, Console(file=io.StringIO()), Asked(True))
    assert b"$NACL" in (tmp_path / "mine" / "coldkey").read_bytes()


async def test_a_subnet_that_is_not_there_is_named(url: str, tmp_path: Path) -> None:
    with pytest.raises(ChainError, match="there is no subnet 9"):
        await register(replace(options_for(url, tmp_path), netuid=9), Console(file=io.StringIO()), Asked(True))


async def test_the_command_as_a_script_runs_it(url: str, tmp_path: Path) -> None:
    await fund(url, tmp_path)
    arguments = ["register", "--netuid", "1", "--network", url, "--wallet-path", str(tmp_path), "--wallet", "mine"]
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "orion.cli.main", *arguments, "--hotkey", "hk0", "--yes", "--json"),
        stdout=PIPE,
        stderr=PIPE,
        env=dict(os.environ),
    )
    async with asyncio.timeout(60.0):
        out, err = await process.communicate()
    assert process.returncode == 0, err.decode()
    (line,) = out.decode().splitlines()
    told = json.loads(line)
    assert (told["uid"], told["was_registered"], told["netuid"], told["network"]) == (1, False, 1, url)


def test_a_balance_must_cover_the_price_and_fees() -> None:
    check_balance(RAO + FEE_RESERVE_RAO, RAO, "address")
    with pytest.raises(ChainError, match=r"τ0\.000000001 are missing on address"):
        check_balance(RAO + FEE_RESERVE_RAO - 1, RAO, "address")
