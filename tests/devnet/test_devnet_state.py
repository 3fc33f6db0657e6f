"""The state's typing, transactions and history; the metadata's changes; blocks and their hashes."""

import pytest
from chain_kit import Lab, address
from hypothesis import given, settings
from hypothesis import strategies as st

from orion.common.errors import ConfigError
from orion.devnet.blocks import Block, BlockLog
from orion.devnet.config import DevnetConfig
from orion.devnet.metadata import Runtime, compact, development_metadata, read_compact, real_metadata
from orion.devnet.state import State

RUNTIME = Runtime(development_metadata(700))


@given(st.integers(0, (1 << 30) - 1))
def test_compact_numbers_come_back(number: int) -> None:
    encoded = compact(number)
    assert read_compact(b"x" + encoded + b"y", 1) == (number, 1 + len(encoded))


def test_the_metadata_is_the_real_one_but_for_two_entries() -> None:
    real, ours = real_metadata(), development_metadata(250)
    entry = len(compact(len("SubnetEpochConsensus")) + b"SubnetEpochConsensus")
    assert 0 < len(ours) - len(real) < entry + 20
    assert RUNTIME.constant("Aura", "SlotDuration") == 700
    assert Runtime(real).constant("Aura", "SlotDuration") == 250
    state = State(RUNTIME, 4)
    assert state.get("SubnetEpochConsensus", 1) == 0
    with pytest.raises(KeyError):
        Runtime(real).item("SubnetEpochConsensus")


def test_defaults_are_the_metadatas() -> None:
    state = State(RUNTIME, 4)
    assert state.get("Kappa", 1) == 32_767
    assert state.get("Uids", 1, address("//Bob")) is None
    assert not state.has("Kappa", 1)
    assert state.items("Kappa") == []


def test_a_failed_transaction_is_undone() -> None:
    state = State(RUNTIME, 4)
    state.put("Kappa", 1, value=5)
    with pytest.raises(RuntimeError), state.transaction():
        state.put("Kappa", 1, value=6)
        with state.transaction():
            state.put("Rho", 1, value=7)
        assert (state.get("Kappa", 1), state.get("Rho", 1)) == (6, 7)
        raise RuntimeError
    assert (state.get("Kappa", 1), state.get("Rho", 1)) == (5, 10)
    state.seal(0)
    assert state.get("Kappa", 1) == 5


def test_maps_give_their_keys() -> None:
    state = State(RUNTIME, 4)
    bob, eve = address("//Bob"), address("//Eve")
    state.put("Uids", 1, bob, value=3)
    state.put("Uids", 2, eve, value=4)
    state.seal(0)
    state.put("Uids", 1, eve, value=5)
    state.remove("Uids", 1, bob)
    assert state.items("Uids", 1) == [((1, eve), 5)]
    assert sorted(state.items("Uids")) == [((1, eve), 5), ((2, eve), 4)]
    state.seal(1)
    assert state.at(0).items("Uids", 1) == [((1, bob), 3)]


_writes = st.lists(
    st.dictionaries(st.integers(0, 5), st.one_of(st.none(), st.integers(0, 9)), max_size=4), min_size=1, max_size=20
)


@settings(max_examples=60)
@given(_writes, st.integers(0, 6))
def test_old_values_are_there_within_the_history_and_forgotten_beyond(
    blocks: list[dict[int, int | None]], history: int
) -> None:
    state, model, models = State(RUNTIME, history), dict[int, int](), list[dict[int, int]]()
    kept = []
    for number, writes in enumerate(blocks):
        for key, value in writes.items():
            if value is None:
                state.remove("Rho", key)
                model.pop(key, None)
            else:
                state.put("Rho", key, value=value)
                model[key] = value
        kept.append((number, state.seal(number)))
        models.append(dict(model))
    for number in range(len(blocks)):
        if number < state.first:
            with pytest.raises(LookupError, match="is not kept"):
                state.at(number)
        else:
            assert {params[0]: value for params, value in state.at(number).items("Rho")} == models[number]
    # A state that is loaded from all changes is the same.
    loaded = State(RUNTIME, history)
    loaded.load(kept)
    assert loaded.items("Rho") == state.items("Rho")
    held = sum(len(versions) for versions in state._versions.values())
    assert held <= 6 * (history + 1), "versions that nobody can ask for are dropped"


def test_blocks_are_found_within_the_history() -> None:
    log = BlockLog(history_blocks=3)
    parent = bytes(32)
    for number in range(10):
        log.append(Block(number, parent, bytes(32), ()))
        parent = log.head_hash
    assert [number for number in range(10) if log.by_number(number)] == [0, 6, 7, 8, 9]
    assert log.by_hash(log.head_hash) == log.head
    assert log.genesis_hash == log.hash_of(0)
    assert [block.number for block in log.kept()] == [0, 6, 7, 8, 9]


def test_a_blocks_hash_covers_it() -> None:
    block = Block(5, bytes(32), bytes(32), (b"a",))
    others = [Block(6, bytes(32), bytes(32), (b"a",)), Block(5, bytes(32), b"\x01" * 32, (b"a",))]
    others += [Block(5, b"\x01" * 32, bytes(32), (b"a",)), Block(5, bytes(32), bytes(32), (b"b",))]
    assert len({each.hash for each in [block, *others]}) == 5


def test_a_chain_links_its_blocks_and_keeps_time() -> None:
    lab = Lab()
    lab.blocks(3)
    late = lab.chain.produce_block(5).block
    log = lab.chain.blocks
    assert late.parent == log.hash_of(3)
    assert lab.get("Timestamp.Now") == 1_003_001, "time only grows"
    assert lab.get("System.Number") == 4


def test_settings_out_of_range_are_refused() -> None:
    with pytest.raises(ConfigError, match="block_ms is 1"):
        DevnetConfig(block_ms=1)
