"""The subnet that a local swarm runs on: everybody registered, one permit, weights that become incentive."""

from collections.abc import AsyncIterator

import pytest

from orion.cli.chain_access import Subnet, open_chain
from orion.cli.local_subnet import (
    NETUID,
    SubnetError,
    after_next_epoch,
    answers,
    register_more,
    set_up,
    weights_by_hotkey,
)
from orion.common.clock import SystemClock
from orion.common.protocol.signing import hotkey_of, keypair_from_uri
from orion.devnet.config import DevnetConfig
from orion.devnet.server import serve_devnet

OWNER, OWNER_HOTKEY, VALIDATOR, MINER0, MINER1, NEWCOMER = (
    keypair_from_uri(f"//local/{name}") for name in ("owner", "hotkey", "validator", "miner0", "miner1", "newcomer")
)


@pytest.fixture
async def subnet() -> AsyncIterator[Subnet]:
    async with serve_devnet("127.0.0.1", 0, DevnetConfig(block_ms=50), SystemClock()) as running:
        subnet = Subnet(running.url, NETUID)
        await make(subnet)
        yield subnet


async def make(subnet: Subnet) -> None:
    await set_up(
        subnet,
        owner=OWNER,
        owner_hotkey=hotkey_of(OWNER_HOTKEY),
        validator=hotkey_of(VALIDATOR),
        others=[hotkey_of(MINER0), hotkey_of(MINER1)],
    )


async def test_what_the_validator_sets_is_paid_after_an_epoch(subnet: Subnet) -> None:
    async with open_chain(subnet, VALIDATOR) as chain:
        metagraph = await after_next_epoch(chain)
        permitted = [neuron.hotkey for neuron in metagraph.neurons if neuron.validator_permit]
        assert permitted == [hotkey_of(VALIDATOR)]
        uids = {neuron.hotkey: neuron.uid for neuron in metagraph.neurons}
        assert uids.keys() == {hotkey_of(key) for key in (OWNER_HOTKEY, VALIDATOR, MINER0, MINER1)}
        assert metagraph.owner_hotkey == hotkey_of(OWNER_HOTKEY)
        await chain.set_weights({uids[hotkey_of(MINER0)]: 3.0, uids[hotkey_of(MINER1)]: 1.0})
        weights = await weights_by_hotkey(chain, hotkey_of(VALIDATOR))
        assert weights == pytest.approx({hotkey_of(MINER0): 0.75, hotkey_of(MINER1): 0.25}, abs=1e-4)
        paid = {neuron.hotkey: neuron.incentive for neuron in (await after_next_epoch(chain)).neurons}
        assert {hotkey: paid[hotkey] for hotkey in weights} == pytest.approx(weights, abs=1e-3)


async def test_one_more_can_be_registered(subnet: Subnet) -> None:
    assert await register_more(subnet, OWNER, hotkey_of(NEWCOMER)) == 4


async def test_a_chain_that_is_not_fresh_is_not_taken(subnet: Subnet) -> None:
    with pytest.raises(SubnetError, match="not fresh"):
        await make(subnet)


async def test_a_chain_that_is_not_there_does_not_answer(subnet: Subnet, unused_tcp_port: int) -> None:
    assert await answers(subnet)
    assert not await answers(Subnet(f"ws://127.0.0.1:{unused_tcp_port}", NETUID))
