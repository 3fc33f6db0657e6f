"""The chain's contract: one suite over every implementation of the seam."""

import math
import os
from collections.abc import AsyncIterator, Mapping
from contextlib import AsyncExitStack

import pytest
from chain_worlds import ChainWorld, devnet_world, memory_world, sdk_world

from orion.common.ids import SPEC_VERSION, Hotkey
from orion.common.net.chain import (
    REMEDIES,
    ChainError,
    ChainErrorCode,
    axon_of,
    url_of,
)
from orion.common.protocol.signing import Keypair, hotkey_of, keypair_from_uri

OWNER, VALIDATOR, MINER0, MINER1, STRANGER = (
    keypair_from_uri(f"//contract/{name}") for name in ("owner", "validator", "miner0", "miner1", "stranger")
)


CHAIN_URL = os.environ.get("ORION_TEST_CHAIN")
"""A ws:// URL of a node whose //Alice is root and has TAO; its blocks should be fast (docs/ARCHITECTURE.md)."""


@pytest.fixture(
    params=[
        "memory",
        "devnet",
        pytest.param("url", marks=pytest.mark.skipif(CHAIN_URL is None, reason="ORION_TEST_CHAIN names no node")),
    ]
)
async def world(request: pytest.FixtureRequest) -> AsyncIterator[ChainWorld]:
    async with AsyncExitStack() as stack:
        if request.param == "memory":
            yield await stack.enter_async_context(memory_world(OWNER, VALIDATOR))
        elif request.param == "devnet":
            yield await stack.enter_async_context(devnet_world(OWNER, VALIDATOR))
        else:
            yield await stack.enter_async_context(sdk_world(CHAIN_URL or "", OWNER, VALIDATOR))


async def set_weights_fault(world: ChainWorld, keypair: Keypair, weights: Mapping[int, float]) -> ChainError:
    with pytest.raises(ChainError) as caught:
        await world.chain_of(keypair).set_weights(weights)
    assert REMEDIES[caught.value.code] in str(caught.value)
    return caught.value


async def test_slots_the_owner_and_permits_can_be_read(world: ChainWorld) -> None:
    uids = {hotkey_of(key): await world.register(key) for key in (MINER0, MINER1)}
    metagraph = await world.chain_of(MINER0).metagraph()
    assert [neuron.uid for neuron in metagraph.neurons] == list(range(len(metagraph.neurons)))
    assert metagraph.owner_hotkey == hotkey_of(OWNER)
    for hotkey, uid in uids.items():
        neuron = metagraph.neuron_of(hotkey)
        assert neuron is not None and (neuron.uid, neuron.validator_permit, neuron.axon_url) == (uid, False, None)
        assert neuron.last_update_block <= metagraph.block
    validator = metagraph.neuron_of(hotkey_of(VALIDATOR))
    assert validator is not None and validator.validator_permit
    assert metagraph.neuron_of(hotkey_of(STRANGER)) is None


async def test_blocks_pass_and_epochs_come(world: ChainWorld) -> None:
    chain = world.chain_of(VALIDATOR)
    rules = await chain.hyperparameters()
    assert rules.block_s > 0
    before = await chain.block()
    await world.pass_blocks(3)
    assert await chain.block() >= before + 3
    assert (await chain.metagraph()).block >= before + 3
    left = await chain.blocks_to_epoch()
    assert left is not None and 0 <= left <= rules.tempo + 1


async def test_the_rules_are_read_as_they_are_set(world: ChainWorld) -> None:
    changes = {"weights_rate_limit_blocks": 4, "min_allowed_weights": 2, "weights_version": 7, "commit_reveal": True}
    await world.set_rules(**changes)
    rules = await world.chain_of(MINER0).hyperparameters()
    assert {name: getattr(rules, name) for name in changes} == changes


async def test_an_axon_is_published_and_moved(world: ChainWorld) -> None:
    chain = world.chain_of(MINER0)
    with pytest.raises(ChainError) as caught:
        await chain.serve_axon("http://10.0.0.1:8000")
    assert caught.value.code is ChainErrorCode.NOT_REGISTERED
    await world.register(MINER0)
    for url in ("http://10.0.0.1:8000", "http://10.0.0.1:8000", "https://127.0.0.2:65535"):
        await chain.serve_axon(url)
        neuron = (await chain.metagraph()).neuron_of(hotkey_of(MINER0))
        assert neuron is not None and neuron.axon_url == url


async def test_weights_can_be_read_back_and_become_incentive(world: ChainWorld) -> None:
    uids = [await world.register(key) for key in (MINER0, MINER1)]
    chain = world.chain_of(VALIDATOR)
    receipt = await chain.set_weights({uids[0]: 3.0, uids[1]: 1.0})
    assert not receipt.is_timelocked
    assert await chain.weights_of(hotkey_of(VALIDATOR)) == pytest.approx({uids[0]: 0.75, uids[1]: 0.25}, abs=1e-4)
    assert await chain.weights_of(hotkey_of(MINER0)) == {}
    validator = (await chain.metagraph()).neuron_of(hotkey_of(VALIDATOR))
    assert validator is not None and validator.last_update_block == receipt.block
    left = await chain.blocks_to_epoch()
    assert left is not None
    await world.pass_blocks(left + 1)
    incentives = {neuron.hotkey: neuron.incentive for neuron in (await chain.metagraph()).neurons}
    assert incentives[hotkey_of(MINER0)] > incentives[hotkey_of(MINER1)] > 0
    assert math.fsum(incentives.values()) == pytest.approx(1.0, abs=1e-3)


async def test_where_the_subnet_asks_for_it_weights_are_committed(world: ChainWorld) -> None:
    uid = await world.register(MINER0)
    await world.set_rules(commit_reveal=True)
    chain = world.chain_of(VALIDATOR)
    assert await chain.commits_of(hotkey_of(VALIDATOR)) == ()
    receipt = await chain.set_weights({uid: 1.0})
    assert receipt.is_timelocked
    assert [commit.block for commit in await chain.commits_of(hotkey_of(VALIDATOR))] == [receipt.block]
    assert await chain.commits_of(hotkey_of(MINER0)) == ()
    assert await chain.weights_of(hotkey_of(VALIDATOR)) == {}


async def test_a_refusal_says_why_what_to_do_and_when(world: ChainWorld) -> None:
    uids = [await world.register(key) for key in (MINER0, MINER1)]
    both = dict.fromkeys(uids, 1.0)
    assert (await set_weights_fault(world, STRANGER, both)).code is ChainErrorCode.NOT_REGISTERED
    assert (await set_weights_fault(world, VALIDATOR, {999: 1.0})).code is ChainErrorCode.UNKNOWN_UID
    error = await set_weights_fault(world, MINER0, both)
    assert error.code in {ChainErrorCode.NO_PERMIT, ChainErrorCode.STAKE_TOO_LOW}
    await world.set_rules(min_allowed_weights=3)
    assert (await set_weights_fault(world, VALIDATOR, both)).code is ChainErrorCode.TOO_FEW_WEIGHTS
    await world.set_rules(min_allowed_weights=1, weights_version=SPEC_VERSION + 1)
    assert (await set_weights_fault(world, VALIDATOR, both)).code is ChainErrorCode.WRONG_VERSION_KEY
    await world.set_rules(weights_version=SPEC_VERSION)
    await world.chain_of(VALIDATOR).set_weights(both)
    await world.set_rules(weights_rate_limit_blocks=50)
    error = await set_weights_fault(world, VALIDATOR, both)
    assert error.code is ChainErrorCode.RATE_LIMITED
    assert error.retry_after_blocks is not None and 0 < error.retry_after_blocks <= 50


async def test_a_rate_limit_is_over_when_it_was_said_to_be(world: ChainWorld) -> None:
    uid = await world.register(MINER0)
    chain = world.chain_of(VALIDATOR)
    await chain.set_weights({uid: 1.0})
    await world.set_rules(weights_rate_limit_blocks=8)
    error = await set_weights_fault(world, VALIDATOR, {uid: 1.0})
    assert error.retry_after_blocks is not None
    await world.pass_blocks(error.retry_after_blocks)
    await chain.set_weights({uid: 1.0})


@pytest.mark.parametrize(
    "weights", [{}, {1: 0.0}, {1: -1.0, 0: 1.0}, {1: math.nan, 0: 1.0}, {1: math.inf, 0: 1.0}], ids=repr
)
async def test_what_are_no_weights_never_reaches_the_chain(world: ChainWorld, weights: dict[int, float]) -> None:
    assert (await set_weights_fault(world, VALIDATOR, weights)).code is ChainErrorCode.INVALID_WEIGHTS


# --- axons ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("url", ["http://10.0.0.1:8000", "https://10.0.0.1:443", "http://[2001:db8::1]:80"])
def test_an_axon_comes_back_as_it_was(url: str) -> None:
    assert url_of(*axon_of(url)) == url


@pytest.mark.parametrize(
    "url",
    [
        "",
        "10.0.0.1:8000",
        "http://a/b",
        "http://" + "a" * 10_000,
        "http://example.org:80",
        "http://127.0.0.1:80",
        "http://0.0.0.0:80",
        "http://255.255.255.255:80",
        "http://10.0.0.1:99999",
    ],
)
def test_what_the_chain_cannot_keep_is_no_axon(url: str) -> None:
    with pytest.raises(ChainError) as caught:
        axon_of(url)
    assert caught.value.code is ChainErrorCode.INVALID_AXON


def test_every_error_has_a_remedy() -> None:
    assert set(REMEDIES) == set(ChainErrorCode)
    error = ChainError(ChainErrorCode.RATE_LIMITED, "too fast", 3)
    assert error.fault.remedy == REMEDIES[ChainErrorCode.RATE_LIMITED] and "too fast" in str(error)
    assert Hotkey("x" * 600) and len(ChainError(ChainErrorCode.OTHER, "x" * 600).fault.message) == 500
