"""The chain's seam over both implementations, and the rules of the ledger behind them."""

import math
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import AsyncExitStack
from dataclasses import dataclass

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from net_loopback import ManualClock

from orion.common.errors import TransportError
from orion.common.ids import Hotkey
from orion.common.net.chain import (
    Chain,
    ChainError,
    ChainErrorCode,
    ChainLedger,
    Hyperparameters,
    MemoryChain,
    Metagraph,
)
from orion.common.net.chain_server import CHAIN_HOTKEY, HttpChain, serve_chain
from orion.common.net.rpc import RpcClient
from orion.common.protocol.refusals import RefusedError
from orion.common.protocol.signing import Keypair, hotkey_of, keypair_from_uri

KEYS = {name: keypair_from_uri(f"//{name}") for name in ("owner", "validator", "poor", "miner0", "miner1", "miner2")}
OWNER, VALIDATOR, POOR, MINER0, MINER1, MINER2 = map(hotkey_of, KEYS.values())
RULES = Hyperparameters(
    tempo=10,
    weights_rate_limit_blocks=5,
    min_allowed_weights=2,
    max_weight=0.8,
    weights_version=3,
    max_uids=5,
    max_validators=1,
    immunity_blocks=8,
    block_s=2.0,
)


def new_ledger() -> ChainLedger:
    return ChainLedger(RULES, owner=OWNER, stakes={VALIDATOR: 100.0, POOR: 0.5, MINER0: 10.0})


@dataclass
class World:
    """A chain as each hotkey reaches it, and what lets blocks pass."""

    chain_of: Callable[[Hotkey], Chain]
    pass_blocks: Callable[[int], None]


def memory_world() -> World:
    ledger = new_ledger()
    return World(lambda hotkey: MemoryChain(ledger), lambda count: ledger.advance_to(ledger.block + count))


async def http_world(stack: AsyncExitStack) -> World:
    clock = ManualClock(1.8e9)
    port = await stack.enter_async_context(serve_chain("127.0.0.1", 0, new_ledger(), clock))
    chains: dict[Hotkey, Chain] = {}
    for keypair in KEYS.values():
        rpc = await stack.enter_async_context(RpcClient(keypair, None, clock))
        chains[hotkey_of(keypair)] = HttpChain(rpc, f"http://127.0.0.1:{port}")

    def pass_blocks(count: int) -> None:
        clock.time_s += count * RULES.block_s

    return World(chains.__getitem__, pass_blocks)


@pytest.fixture(params=["memory", "http"])
async def world(request: pytest.FixtureRequest) -> AsyncIterator[World]:
    async with AsyncExitStack() as stack:
        yield memory_world() if request.param == "memory" else await http_world(stack)


async def fault(chain: Chain, hotkey: Hotkey, weights: Mapping[int, float], version_key: int = 3) -> ChainError:
    with pytest.raises(ChainError) as caught:
        await chain.set_weights(hotkey, weights, version_key)
    return caught.value


async def test_registration_gives_uids_in_order_and_repeats_its_answer(world: World) -> None:
    for _ in range(2):
        uids = [await world.chain_of(hotkey).register(hotkey) for hotkey in (VALIDATOR, MINER0, MINER1)]
        assert uids == [1, 2, 3]
    metagraph = await world.chain_of(MINER0).metagraph()
    assert [neuron.hotkey for neuron in metagraph.neurons] == [OWNER, VALIDATOR, MINER0, MINER1]
    assert metagraph.owner_hotkey == OWNER
    assert metagraph.neuron_of(MINER1) == metagraph.neurons[3]
    assert metagraph.neuron_of(MINER2) is None


async def test_the_rules_can_be_read_and_blocks_pass(world: World) -> None:
    chain = world.chain_of(VALIDATOR)
    assert await chain.hyperparameters() == RULES
    assert await chain.block() == 0
    world.pass_blocks(7)
    assert await chain.block() == 7
    assert (await chain.metagraph()).block == 7


async def test_an_axon_is_published(world: World) -> None:
    chain = world.chain_of(MINER0)
    with pytest.raises(ChainError) as caught:
        await chain.serve_axon(MINER0, "http://10.0.0.1:8000")
    assert caught.value.code is ChainErrorCode.NOT_REGISTERED
    await chain.register(MINER0)
    await chain.serve_axon(MINER0, "http://10.0.0.1:8000")
    neuron = (await chain.metagraph()).neuron_of(MINER0)
    assert neuron is not None
    assert neuron.axon_url == "http://10.0.0.1:8000"
    for url in ("", "10.0.0.1:8000", "http://a/b", "http://" + "a" * 10_000):
        with pytest.raises(ChainError) as caught:
            await chain.serve_axon(MINER0, url)
        assert caught.value.code is ChainErrorCode.INVALID_AXON


async def test_weights_become_incentive_at_the_next_epoch(world: World) -> None:
    chain = world.chain_of(VALIDATOR)
    for hotkey in (VALIDATOR, MINER0, MINER1):
        await chain.register(hotkey)
    error = await fault(chain, VALIDATOR, {2: 1.0, 3: 1.0})
    assert (error.code, error.retry_after_blocks) == (ChainErrorCode.RATE_LIMITED, 5)
    world.pass_blocks(5)
    error = await fault(chain, VALIDATOR, {2: 1.0, 3: 1.0})
    assert (error.code, error.retry_after_blocks) == (ChainErrorCode.NO_PERMIT, 5)
    world.pass_blocks(5)
    await chain.set_weights(VALIDATOR, {2: 0.75, 3: 0.25}, 3)
    assert [neuron.incentive for neuron in (await chain.metagraph()).neurons] == [0, 0, 0, 0]
    error = await fault(chain, VALIDATOR, {2: 1.0, 3: 1.0})
    assert error.code is ChainErrorCode.RATE_LIMITED
    world.pass_blocks(25)
    metagraph = await chain.metagraph()
    assert [neuron.incentive for neuron in metagraph.neurons] == pytest.approx([0, 0, 0.75, 0.25], abs=1e-4)
    assert metagraph.neurons[1].last_update_block == 10
    assert [neuron.validator_permit for neuron in metagraph.neurons] == [False, True, False, False]


async def test_weights_are_checked_as_the_chain_checks_them(world: World) -> None:
    for hotkey in (VALIDATOR, POOR, MINER0):
        await world.chain_of(hotkey).register(hotkey)
    world.pass_blocks(10)
    chain = world.chain_of(VALIDATOR)
    both = {1: 1.0, 3: 1.0}
    cases: list[tuple[Hotkey, Mapping[int, float], int, ChainErrorCode]] = [
        (VALIDATOR, {9: 1.0}, 3, ChainErrorCode.UNKNOWN_UID),
        (VALIDATOR, {-1: 1.0}, 3, ChainErrorCode.UNKNOWN_UID),
        (MINER1, both, 3, ChainErrorCode.NOT_REGISTERED),
        (POOR, both, 3, ChainErrorCode.STAKE_TOO_LOW),
        (VALIDATOR, both, 2, ChainErrorCode.WRONG_VERSION_KEY),
        (MINER0, both, 3, ChainErrorCode.NO_PERMIT),
        (VALIDATOR, {1: 1.0}, 3, ChainErrorCode.TOO_FEW_WEIGHTS),
        (VALIDATOR, {1: 1.0, 3: 1e-9}, 3, ChainErrorCode.TOO_FEW_WEIGHTS),
        (VALIDATOR, {1: 0.9, 3: 0.1}, 3, ChainErrorCode.WEIGHT_TOO_LARGE),
        (VALIDATOR, {}, 3, ChainErrorCode.INVALID_WEIGHTS),
        (VALIDATOR, {1: 0.0, 3: 0.0}, 3, ChainErrorCode.INVALID_WEIGHTS),
        (VALIDATOR, {1: -1.0, 3: 1.0}, 3, ChainErrorCode.INVALID_WEIGHTS),
        (VALIDATOR, {1: math.nan, 3: 1.0}, 3, ChainErrorCode.INVALID_WEIGHTS),
        (VALIDATOR, {1: math.inf, 3: 1.0}, 3, ChainErrorCode.INVALID_WEIGHTS),
    ]
    for hotkey, weights, version_key, code in cases:
        error = await fault(world.chain_of(hotkey), hotkey, weights, version_key)
        assert (error.code, weights) == (code, weights)
    await chain.set_weights(VALIDATOR, {1: 0.8, 3: 0.2}, 3)


async def test_a_full_subnet_replaces_who_earned_least_once_immunity_is_over(world: World) -> None:
    chain = world.chain_of(VALIDATOR)
    for hotkey in (VALIDATOR, MINER0, MINER1, MINER2):
        await chain.register(hotkey)
    with pytest.raises(ChainError) as caught:
        await chain.register(POOR)
    assert caught.value.code is ChainErrorCode.SUBNET_FULL
    world.pass_blocks(10)
    await chain.set_weights(VALIDATOR, {2: 0.7, 4: 0.3}, 3)
    world.pass_blocks(10)
    await world.chain_of(MINER1).serve_axon(MINER1, "http://10.0.0.1:8000")
    assert await chain.register(POOR) == 3
    metagraph = await chain.metagraph()
    assert metagraph.neuron_of(MINER1) is None
    newcomer = metagraph.neurons[3]
    assert (newcomer.hotkey, newcomer.axon_url, newcomer.incentive) == (POOR, None, 0)
    assert newcomer.last_update_block == 20


# --- only over HTTP ---------------------------------------------------------------------------------------------------


async def test_nobody_acts_for_another() -> None:
    async with AsyncExitStack() as stack:
        world = await http_world(stack)
        chain = world.chain_of(MINER0)
        await chain.register(VALIDATOR)
        with pytest.raises(ValueError, match="signs as"):
            await chain.set_weights(VALIDATOR, {1: 1.0, 0: 1.0}, 3)
        with pytest.raises(ValueError, match="signs as"):
            await chain.serve_axon(VALIDATOR, "http://10.0.0.1:8000")


async def test_requests_are_signed(unused_tcp_port: int) -> None:
    clock = ManualClock(1.8e9)
    async with serve_chain("127.0.0.1", 0, new_ledger(), clock) as port:
        late = ManualClock(1.8e9 - 60)
        async with RpcClient(KEYS["miner0"], None, late) as rpc:
            with pytest.raises(RefusedError):
                await HttpChain(rpc, f"http://127.0.0.1:{port}").block()
            with pytest.raises(TransportError):
                await HttpChain(rpc, f"http://127.0.0.1:{unused_tcp_port}").block()


def test_the_stand_ins_hotkey_is_the_development_key_it_says() -> None:
    assert hotkey_of(keypair_from_uri("//orion/chain")) == CHAIN_HOTKEY


# --- the ledger -------------------------------------------------------------------------------------------------------

names = st.sampled_from(["a", "b", "c", "d", "e", "f", "g", "h"])
DEVELOPMENT_KEYS: dict[str, Keypair] = {name: keypair_from_uri(f"//{name}") for name in "abcdefgh"}
actions = st.one_of(
    st.tuples(st.just("register"), names),
    st.tuples(st.just("blocks"), st.integers(1, 30)),
    st.tuples(st.just("stake"), names, st.floats(0, 100)),
    st.tuples(st.just("weights"), names, st.dictionaries(st.integers(0, 6), st.floats(0, 10), max_size=5)),
)


@settings(max_examples=150)
@given(st.lists(actions, max_size=40))
def test_whatever_happens_the_ledger_agrees_with_itself(steps: list[tuple[object, ...]]) -> None:
    rules = RULES.model_copy(update={"min_allowed_weights": 1, "max_weight": 1.0, "weights_version": 0})
    ledger = ChainLedger(rules, stakes={hotkey_of(DEVELOPMENT_KEYS["a"]): 50.0})
    for step in steps:
        before = ledger.metagraph()
        try:
            act(ledger, step)
        except ChainError as error:
            assert ledger.metagraph() == before
            assert error.retry_after_blocks is None or error.retry_after_blocks > 0
        ledger.check_invariants()
        check_history(before, ledger.metagraph())


def act(ledger: ChainLedger, step: tuple[object, ...]) -> None:
    match step:
        case ("register", str(name)):
            ledger.register(hotkey_of(DEVELOPMENT_KEYS[name]))
        case ("blocks", int(count)):
            ledger.advance_to(ledger.block + count)
        case ("stake", str(name), float(stake)):
            ledger.set_stake(hotkey_of(DEVELOPMENT_KEYS[name]), stake)
        case ("weights", str(name), dict(weights)):
            ledger.set_weights(hotkey_of(DEVELOPMENT_KEYS[name]), weights, 0)


def check_history(before: Metagraph, after: Metagraph) -> None:
    """Slots are never lost, permits change only at epochs, and incentives sum to one or to nothing."""
    assert len(after.neurons) >= len(before.neurons)
    if before.block // RULES.tempo == after.block // RULES.tempo:
        for old, new in zip(before.neurons, after.neurons, strict=False):
            assert old.hotkey != new.hotkey or old.validator_permit == new.validator_permit
    elif any(neuron.incentive for neuron in after.neurons):
        assert math.fsum(neuron.incentive for neuron in after.neurons) == pytest.approx(1)


@given(st.lists(st.integers(1, 40), min_size=1, max_size=6))
def test_it_does_not_matter_in_how_many_steps_blocks_pass(counts: list[int]) -> None:
    ledgers = []
    for steps in (counts, [sum(counts)]):
        ledger = new_ledger()
        for hotkey in (VALIDATOR, MINER0, MINER1):
            ledger.register(hotkey)
        ledger.advance_to(10)
        ledger.set_weights(VALIDATOR, {2: 0.6, 3: 0.4}, 3)
        for count in steps:
            ledger.advance_to(ledger.block + count)
        ledgers.append(ledger)
    assert ledgers[0].metagraph() == ledgers[1].metagraph()
    assert ledgers[0].weights_of(VALIDATOR) == {2: 65_535, 3: 43_690}
