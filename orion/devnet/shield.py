"""The MEV shield's form: opens what the SDK sealed with the chain's key.

The SDK and `btcli` send some calls (a registration, above all) only sealed for the block's author. This chain's key is
the same for every chain and its secret stands here, so nothing is hidden from anybody: what is kept is the form, so
that unmodified tools work. Owns the key and the format. Must not know what is inside.
"""

from functools import cache
from hashlib import blake2b

from Crypto.Cipher import ChaCha20_Poly1305
from cryptography.hazmat.primitives.asymmetric.mlkem import MLKEM768PrivateKey

_SEED = blake2b(b"the shield of orion's development chains, which hides nothing", digest_size=64).digest()

# A sealed message is: hash of the key (16 bytes), length of the encapsulated secret (2, little endian), that secret,
# a nonce (24), the XChaCha20-Poly1305 ciphertext with its tag (16) at the end.
_KEY_HASH_BYTES, _LENGTH_BYTES, _NONCE_BYTES, _TAG_BYTES = 16, 2, 24, 16


@cache
def _private_key() -> MLKEM768PrivateKey:
    return MLKEM768PrivateKey.from_seed_bytes(_SEED)


@cache
def public_key() -> bytes:
    """What the SDK seals with: an ML-KEM-768 key, 1184 bytes."""
    return _private_key().public_key().public_bytes_raw()


def open_sealed(sealed: bytes) -> bytes:
    """What was sealed. Raises ValueError when it was sealed for another key, or is damaged."""
    secret_at = _KEY_HASH_BYTES + _LENGTH_BYTES
    nonce_at = secret_at + int.from_bytes(sealed[_KEY_HASH_BYTES:secret_at], "little")
    text_at = nonce_at + _NONCE_BYTES
    if len(sealed) < text_at + _TAG_BYTES:
        raise ValueError("a sealed message ends before it should")
    shared = _private_key().decapsulate(sealed[secret_at:nonce_at])
    cipher = ChaCha20_Poly1305.new(key=shared, nonce=sealed[nonce_at:text_at])
    opened: bytes = cipher.decrypt_and_verify(sealed[text_at:-_TAG_BYTES], sealed[-_TAG_BYTES:])
    return opened
