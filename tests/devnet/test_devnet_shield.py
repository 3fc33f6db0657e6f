"""What is sealed with the chain's key is opened; anything else is left out and stops nothing."""

import bittensor_core
import pytest
from chain_kit import Lab, address

from orion.devnet import shield

TAO = 10**9


def _sealed(lab: Lab, inner: bytes) -> bytes:
    """What the SDK sends for an extrinsic that is to be sealed."""
    key = bytes.fromhex(lab.get("MevShield.NextKey").removeprefix("0x"))
    return bytes(bittensor_core.encrypt_mlkem768(key, inner, include_key_hash=True))


def _carry(lab: Lab, blob: bytes) -> list[str]:
    lab.send("//Bob", "MevShield", "submit_encrypted", ciphertext=blob)
    lab.blocks()
    return lab.outcomes()


def _transfer(lab: Lab, nonce: int) -> bytes:
    call = lab.call("Balances", "transfer_keep_alive", dest=address("//Eve"), value=TAO)
    return lab.extrinsic("//Bob", call, nonce=nonce)


def test_what_is_sealed_follows_its_carrier() -> None:
    lab = Lab()
    before = lab.free("//Eve")
    inner = _transfer(lab, nonce=1)
    assert _carry(lab, _sealed(lab, inner)) == ["ok", "ok"]
    assert lab.free("//Eve") - before == TAO
    assert lab.chain.head.extrinsics[-1] == inner
    assert lab.chain.next_nonce(address("//Bob")) == 2


def test_what_is_not_good_is_left_out() -> None:
    lab = Lab()
    blob = _sealed(lab, _transfer(lab, nonce=1))
    damaged = blob[:-1] + bytes([blob[-1] ^ 1])
    for bad in (damaged, blob[:40], b"", _sealed(lab, b"no extrinsic"), _sealed(lab, _transfer(lab, nonce=9))):
        assert _carry(lab, bad) == ["ok"], "only the carrier is applied"


def test_sealed_messages_are_checked_for_their_shape() -> None:
    for length in (0, 17, 18, 57):
        with pytest.raises(ValueError, match="ends before it should"):
            shield.open_sealed(bytes(length))
