"""The ledger that stands in for the chain: its rules, and that it never contradicts itself."""

import math
from collections.abc import Mapping

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from orion.common.ids import Hotkey
from orion.common.net.chain import ChainError, ChainErrorCode, Hyperparameters, Metagraph
from orion.common.net.memory_chain import COMMITS_MAX, ChainLedger
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


@pytest.fixture
def ledger() -> ChainLedger:
    return new_ledger()


def pass_blocks(ledger: ChainLedger, count: int) -> None:
    ledger.advance_to(ledger.block + count)


def fault(ledger: ChainLedger, hotkey: Hotkey, weights: Mapping[int, float], version_key: int = 3) -> ChainError:
    with pytest.raises(ChainError) as caught:
        ledger.set_weights(hotkey, weights, version_key)
    return caught.value


def test_registration_gives_uids_in_order_and_repeats_its_answer(ledger: ChainLedger) -> None:
    for _ in range(2):
        assert [ledger.register(hotkey) for hotkey in (VALIDATOR, MINER0, MINER1)] == [1, 2, 3]
    metagraph = ledger.metagraph()
    assert [neuron.hotkey for neuron in metagraph.neurons] == [OWNER, VALIDATOR, MINER0, MINER1]
    assert metagraph.owner_hotkey == OWNER
    assert metagraph.neuron_of(MINER1) == metagraph.neurons[3]
    assert metagraph.neuron_of(MINER2) is None


def test_weights_become_incentive_at_the_next_epoch(ledger: ChainLedger) -> None:
    for hotkey in (VALIDATOR, MINER0, MINER1):
        ledger.register(hotkey)
    error = fault(ledger, VALIDATOR, {2: 1.0, 3: 1.0})
    assert (error.code, error.retry_after_blocks) == (ChainErrorCode.RATE_LIMITED, 5)
    pass_blocks(ledger, 5)
    error = fault(ledger, VALIDATOR, {2: 1.0, 3: 1.0})
    assert (error.code, error.retry_after_blocks) == (ChainErrorCode.NO_PERMIT, 5)
    pass_blocks(ledger, 5)
    ledger.set_weights(VALIDATOR, {2: 0.75, 3: 0.25}, 3)
    assert [neuron.incentive for neuron in ledger.metagraph().neurons] == [0, 0, 0, 0]
    assert fault(ledger, VALIDATOR, {2: 1.0, 3: 1.0}).code is ChainErrorCode.RATE_LIMITED
    pass_blocks(ledger, 25)
    metagraph = ledger.metagraph()
    assert [neuron.incentive for neuron in metagraph.neurons] == pytest.approx([0, 0, 0.75, 0.25], abs=1e-4)
    assert metagraph.neurons[1].last_update_block == 10
    assert [neuron.validator_permit for neuron in metagraph.neurons] == [False, True, False, False]


def test_weights_are_checked_as_the_chain_checks_them(ledger: ChainLedger) -> None:
    for hotkey in (VALIDATOR, POOR, MINER0):
        ledger.register(hotkey)
    pass_blocks(ledger, 10)
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
    ]
    for hotkey, weights, version_key, code in cases:
        error = fault(ledger, hotkey, weights, version_key)
        assert (error.code, weights) == (code, weights)
    ledger.set_weights(VALIDATOR, {1: 0.8, 3: 0.2}, 3)


def test_a_full_subnet_replaces_who_earned_least_once_immunity_is_over(ledger: ChainLedger) -> None:
    for hotkey in (VALIDATOR, MINER0, MINER1, MINER2):
        ledger.register(hotkey)
    with pytest.raises(ChainError) as caught:
        ledger.register(POOR)
    assert caught.value.code is ChainErrorCode.SUBNET_FULL
    pass_blocks(ledger, 10)
    ledger.set_weights(VALIDATOR, {2: 0.7, 4: 0.3}, 3)
    pass_blocks(ledger, 10)
    ledger.serve_axon(MINER1, "http://10.0.0.1:8000")
    assert ledger.register(POOR) == 3
    metagraph = ledger.metagraph()
    assert metagraph.neuron_of(MINER1) is None
    newcomer = metagraph.neurons[3]
    assert (newcomer.hotkey, newcomer.axon_url, newcomer.incentive) == (POOR, None, 0)
    assert newcomer.last_update_block == 20


def test_only_so_many_timelocked_weights_wait(ledger: ChainLedger) -> None:
    ledger.hyperparameters = RULES.model_copy(update={"commit_reveal": True, "weights_rate_limit_blocks": 0})
    for hotkey in (VALIDATOR, MINER0, MINER1):
        ledger.register(hotkey)
    pass_blocks(ledger, 10)
    for _ in range(COMMITS_MAX):
        assert ledger.set_weights(VALIDATOR, {2: 0.6, 3: 0.4}, 3).is_timelocked
    error = fault(ledger, VALIDATOR, {2: 0.6, 3: 0.4})
    assert (error.code, error.retry_after_blocks) == (ChainErrorCode.TOO_MANY_COMMITS, 10)
    assert ledger.weights_of(VALIDATOR) == {}


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
