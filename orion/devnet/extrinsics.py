"""Signed extrinsics: decoding, and the real check of their signature.

Owns what is checked before an extrinsic may wait in the pool and again before it is applied: shape, mortal era,
signature over the rebuilt payload (call, era, nonce, tip, versions, genesis and era block), nonce. Must not know
calls. Only sr25519 signatures are taken, as the SDK makes them.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import bittensor_core

from orion.devnet.blocks import digest
from orion.devnet.metadata import Runtime, compact, read_compact

EXTRINSIC_BYTES_MAX = 1 << 20
"""Above any call that this chain carries out; the real chain's blocks hold several of that size."""

_SIGNED_V4 = 0x84
_ACCOUNT_ID = 0x00
_SR25519 = 0x01
_ADDRESS_END = 1 + 1 + 32
_SIGNATURE_END = _ADDRESS_END + 1 + 64
_IMMORTAL = "00"
_PAYLOAD_BYTES_MAX = 256
"""Longer payloads are signed by their hash."""


class InvalidTransaction(Exception):
    """An extrinsic that no block takes. The text is what the real node says for the same fault."""


@dataclass(frozen=True)
class Era:
    """Blocks in which an extrinsic is good: `period` of them, beginning where number mod period is `phase`."""

    period: int
    phase: int

    def birth(self, block: int) -> int:
        """The block at which the era that contains `block` began."""
        return (max(block, self.phase) - self.phase) // self.period * self.period + self.phase


@dataclass(frozen=True)
class Signed:
    """A decoded extrinsic whose signature was found good."""

    raw: bytes
    hash: bytes
    signer: str
    nonce: int
    era: Era | None
    """None = good for ever."""
    birth: int
    """The block whose hash its signature covers."""
    call: dict[str, Any]

    def is_alive(self, block: int) -> bool:
        """Whether `block` may still contain it."""
        return self.era is None or self.era.birth(block) == self.birth


def decode_signed(runtime: Runtime, raw: bytes, block: int, hash_of: Callable[[int], bytes | None]) -> Signed:
    """Decodes and checks an extrinsic that is to go into `block`. Raises InvalidTransaction.

    `hash_of` gives the hash of a block by its number; 0 is the first.
    """
    if len(raw) > EXTRINSIC_BYTES_MAX:
        raise InvalidTransaction("Transaction would exhaust the block limits")
    body = _body(raw)
    if len(body) < _SIGNATURE_END or body[0] != _SIGNED_V4 or body[1] != _ACCOUNT_ID or body[_ADDRESS_END] != _SR25519:
        raise InvalidTransaction("Transaction is not a version 4 extrinsic with an sr25519 signature")
    try:
        decoded = runtime.decode_extrinsic(raw)
    except ValueError as error:
        raise InvalidTransaction(f"Transaction can't be decoded: {error}") from error
    era = None if decoded["era"] == _IMMORTAL else Era(*decoded["era"])
    nonce, tip = int(decoded["nonce"]), int(decoded["tip"])
    birth = 0 if era is None else era.birth(block)
    genesis, birth_hash = hash_of(0), hash_of(birth)
    if genesis is None or birth_hash is None:
        raise InvalidTransaction("Transaction is outdated")
    era_value: object = _IMMORTAL if era is None else {"period": era.period, "phase": era.phase}
    carried, covered = runtime.signed_parts(era_value, nonce, tip, genesis, birth_hash)
    call_start = _SIGNATURE_END + len(carried)
    if body[_SIGNATURE_END:call_start] != carried:
        raise InvalidTransaction("Transaction has signed extensions that this chain doesn't know")
    payload = body[call_start:] + carried + covered
    if len(payload) > _PAYLOAD_BYTES_MAX:
        payload = digest(payload)
    signature = body[_ADDRESS_END + 1 : _SIGNATURE_END]
    if not bittensor_core.verify(payload, signature, decoded["address"], bittensor_core.CRYPTO_SR25519):
        raise InvalidTransaction("Transaction has a bad signature")
    return Signed(raw, digest(raw), decoded["address"], nonce, era, birth, decoded["call"])


def unsigned(call: bytes) -> bytes:
    """The extrinsic that carries a call of the block's own, such as the timestamp."""
    body = b"\x04" + call
    return compact(len(body)) + body


def _body(raw: bytes) -> bytes:
    """The extrinsic without the length in front of it."""
    try:
        size, offset = read_compact(raw, 0)
    except ValueError as error:
        raise InvalidTransaction(f"Transaction can't be decoded: {error}") from error
    if len(raw) - offset != size:
        raise InvalidTransaction("Transaction can't be decoded: its length is not what it says")
    return raw[offset:]
