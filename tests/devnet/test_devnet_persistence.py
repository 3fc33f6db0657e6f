"""A chain in a file goes on where it was, also after its process was killed."""

import asyncio
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import bittensor as bt
import pytest
from chain_kit import CONFIG, Lab, address
from devnet_kit import ALICE, BOB, start_subnet, succeed

from orion.common.errors import ConfigError, DataError
from orion.devnet.config import DevnetConfig
from orion.devnet.persistence import ChainFile


def _kept(lab: Lab, path: Path) -> ChainFile:
    """The lab's whole chain, written block by block."""
    file = ChainFile(path)
    file.create(CONFIG, lab.genesis)
    for sealed in lab.sealed[1:]:
        file.append(sealed, max(0, sealed.block.number - CONFIG.history_blocks))
    return file


def test_a_loaded_chain_is_the_same(tmp_path: Path) -> None:
    lab = Lab()
    lab.subnet("//Bob")
    lab.blocks(2 * CONFIG.history_blocks)
    _kept(lab, tmp_path / "chain.db").close()
    loaded = ChainFile(tmp_path / "chain.db").load(CONFIG)
    assert loaded is not None
    ours, theirs = lab.chain, loaded
    assert theirs.blocks.genesis_hash == ours.blocks.genesis_hash
    assert list(theirs.blocks.kept()) == list(ours.blocks.kept())
    assert (theirs.state.head, theirs.state.first) == (ours.state.head, ours.state.first)
    for number in range(ours.state.first, ours.state.head + 1):
        keys = ours.state.keys_at(b"", number)
        assert theirs.state.keys_at(b"", number) == keys
        assert [theirs.state.raw_at(key, number) for key in keys] == [ours.state.raw_at(key, number) for key in keys]
    # Both take the same extrinsics and make the same next block.
    raw = lab.extrinsic("//Alice", lab.call("Balances", "transfer_keep_alive", dest=address("//Bob"), value=10**9))
    ours.submit(raw)
    theirs.submit(raw)
    assert ours.produce_block(10**10).block.hash == theirs.produce_block(10**10).block.hash


def test_the_file_stays_small(tmp_path: Path) -> None:
    lab = Lab()
    lab.blocks(5 * CONFIG.history_blocks)
    file = _kept(lab, tmp_path / "chain.db")
    (versions,) = file._connection.execute("SELECT count(*) FROM versions").fetchone()
    (blocks,) = file._connection.execute("SELECT count(*) FROM blocks").fetchone()
    held = sum(len(each) for each in lab.chain.state._versions.values())
    assert blocks == CONFIG.history_blocks + 2
    assert versions == held
    file.close()


def test_a_file_belongs_to_one_process_and_one_block_time(tmp_path: Path) -> None:
    path = tmp_path / "chain.db"
    file = _kept(Lab(), path)
    with pytest.raises(DataError, match="another `orion devnet`"):
        ChainFile(path)
    with pytest.raises(ConfigError, match="block_ms = 1000, not 500"):
        file.load(DevnetConfig(block_ms=500, history_blocks=CONFIG.history_blocks))
    file.close()


def test_what_is_no_chain_is_said(tmp_path: Path) -> None:
    path = tmp_path / "chain.db"
    path.write_bytes(b"something else" * 100)
    with pytest.raises(DataError, match="can't be opened"):
        ChainFile(path)


@contextmanager
def _process(path: Path) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """`orion devnet` in a process of its own, and its URL."""
    command = [sys.executable, "-m", "orion.cli.main", "devnet", "--port", "0", "--block-seconds", "0.1"]
    process = subprocess.Popen(
        [*command, "--state", str(path), "--stop-with-stdin"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert process.stdout is not None
        url = process.stdout.readline().strip()
        assert url.startswith("ws://127.0.0.1:"), url
        yield process, url
    finally:
        process.kill()
        process.communicate()


async def _genesis(subtensor: bt.Client) -> str:
    """The first block's hash, which every signature covers."""
    found = str(await subtensor.query(bt.storage.System.BlockHash, [0]))
    assert int(found, 16), "a hash, not the default"
    return found


async def _facts(subtensor: bt.Client) -> dict[str, object]:
    """What must survive."""
    return {
        "genesis": await _genesis(subtensor),
        "balance": (await subtensor.balances.balance(ALICE.coldkey.ss58_address)).rao,
        "nonce": (await subtensor.query(bt.storage.System.Account, [ALICE.coldkey.ss58_address]))["nonce"],
        "uid": await subtensor.neurons.uid(hotkey_ss58=BOB.hotkey.ss58_address, netuid=1),
    }


async def test_a_killed_process_loses_no_block(tmp_path: Path) -> None:
    path = tmp_path / "chain.db"
    with _process(path) as (process, url):
        async with bt.Subtensor(url) as subtensor:
            await start_subnet(subtensor)
            before = await _facts(subtensor)
            result = await subtensor.execute(bt.Transfer(dest_ss58=BOB.coldkey.ss58_address, amount_tao=1), BOB)
            succeed(result)
            head = await subtensor.block()
            block = await subtensor.block_info(head)
            process.send_signal(signal.SIGKILL)
        await asyncio.to_thread(process.wait)
    with _process(path) as (_, url):
        async with bt.Subtensor(url) as subtensor:
            assert await subtensor.block() >= head
            assert (await subtensor.block_info(head)).hash == block.hash
            assert await _facts(subtensor) == before
            # The chain goes on: nonces are those of before, and so is the chain that signatures are for.
            succeed(await subtensor.execute(bt.Transfer(dest_ss58=BOB.coldkey.ss58_address, amount_tao=1), ALICE))


async def test_it_stops_with_its_launcher(tmp_path: Path) -> None:
    with _process(tmp_path / "chain.db") as (process, _):
        assert process.stdin is not None
        process.stdin.close()
        await asyncio.wait_for(asyncio.to_thread(process.wait), 20)
        process.stdin = None
        assert process.returncode == 130
