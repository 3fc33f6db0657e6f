"""What the chain checks before it takes an extrinsic, and how extrinsics wait."""

import pytest
from chain_kit import Lab, address

from orion.devnet.config import DevnetConfig
from orion.devnet.extrinsics import Era, InvalidTransaction
from orion.devnet.pool import PoolRefusal


def _transfer(lab: Lab) -> bytes:
    return lab.call("Balances", "transfer_keep_alive", dest=address("//Bob"), value=10**9)


@pytest.mark.parametrize("period", [0, 4, 32, 2048])
def test_a_good_extrinsic_is_taken_and_applied(period: int) -> None:
    lab = Lab()
    lab.blocks(7)
    before = lab.free("//Bob")
    lab.chain.submit(lab.extrinsic("//Alice", _transfer(lab), period=period))
    assert len(lab.chain.pool) == 1
    lab.blocks()
    assert lab.outcomes() == ["ok"]
    assert lab.free("//Bob") - before == 10**9


def test_every_byte_of_an_extrinsic_is_covered() -> None:
    lab = Lab()
    good = lab.extrinsic("//Alice", _transfer(lab))
    for index in range(len(good)):
        bad = bytearray(good)
        bad[index] ^= 0x01
        with pytest.raises(InvalidTransaction):
            lab.chain.submit(bytes(bad))
    lab.chain.submit(good)


def test_an_extrinsic_of_another_chain_is_refused() -> None:
    lab = Lab()
    with pytest.raises(InvalidTransaction, match="bad signature"):
        lab.chain.submit(lab.extrinsic("//Alice", _transfer(lab), genesis=bytes(32)))


def test_a_long_payload_is_signed_by_its_hash() -> None:
    lab = Lab()
    remark = lab.call("System", "remark", remark=b"x" * 400)
    lab.chain.submit(lab.extrinsic("//Alice", remark))
    lab.blocks()
    assert lab.outcomes() == ["CallFiltered"]


def test_an_extrinsic_is_good_once() -> None:
    lab = Lab()
    raw = lab.extrinsic("//Alice", _transfer(lab))
    lab.chain.submit(raw)
    with pytest.raises(PoolRefusal) as twice:
        lab.chain.submit(raw)
    assert twice.value.code == 1013
    lab.blocks()
    with pytest.raises(InvalidTransaction, match="outdated"):
        lab.chain.submit(raw)


def test_nonces_count_what_waits_and_order_it() -> None:
    lab = Lab()
    assert lab.chain.next_nonce(address("//Alice")) == 0
    late = lab.extrinsic("//Alice", _transfer(lab), nonce=1)
    lab.chain.submit(late)
    lab.blocks()
    assert lab.outcomes() == [], "nonce 1 waits for nonce 0"
    lab.chain.submit(lab.extrinsic("//Alice", _transfer(lab), nonce=0))
    assert lab.chain.next_nonce(address("//Alice")) == 2
    with pytest.raises(PoolRefusal) as same:
        lab.chain.submit(lab.extrinsic("//Alice", lab.call("System", "remark", remark=b"other"), nonce=1))
    assert same.value.code == 1014
    lab.blocks()
    assert lab.outcomes() == ["ok", "ok"]


def test_an_extrinsic_outlives_its_era_nowhere() -> None:
    lab = Lab()
    raw = lab.extrinsic("//Alice", _transfer(lab), nonce=5, period=4)
    lab.chain.submit(raw)
    lab.blocks(4)
    assert len(lab.chain.pool) == 0
    dropped = [number for sealed in lab.sealed for number in sealed.dropped]
    assert len(dropped) == 1
    with pytest.raises(InvalidTransaction):
        lab.chain.submit(raw)


def test_the_pool_and_a_block_are_bounded() -> None:
    lab = Lab(DevnetConfig(pool_size=3, block_size=2))
    for _ in range(3):
        lab.send("//Alice", "Balances", "transfer_keep_alive", dest=address("//Bob"), value=10**9)
    with pytest.raises(PoolRefusal) as full:
        lab.send("//Bob", "Balances", "transfer_keep_alive", dest=address("//Alice"), value=10**9)
    assert full.value.code == 1016
    lab.blocks()
    assert lab.outcomes() == ["ok", "ok"]
    lab.blocks()
    assert lab.outcomes() == ["ok"]


@pytest.mark.parametrize("raw", [b"", b"\x00", b"\x04\x84", b"\xff" * 40, b"\x10\x84\x00\x00\x00"])
def test_garbage_is_refused(raw: bytes) -> None:
    lab = Lab()
    with pytest.raises(InvalidTransaction):
        lab.chain.submit(raw)


def test_an_era_begins_where_its_phase_says() -> None:
    era = Era(period=8, phase=3)
    assert [era.birth(block) for block in (3, 10, 11, 18, 19)] == [3, 3, 11, 11, 19]
