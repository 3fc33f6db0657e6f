"""Who sent a request: the Bittensor SDK's btauth/1 signatures, and the hotkeys that make them.

A thin layer over `bittensor.http_auth`; beside the chain, the only module that imports the SDK. Time comes in as an
argument. Invariant: within the window in which a signature is fresh, no (hotkey, nonce) pair passes twice.
"""

import heapq
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Protocol, cast

import bittensor
from bittensor import http_auth, sp_core
from pydantic import ValidationError

from orion.common.errors import ConfigError
from orion.common.ids import Hotkey
from orion.common.protocol.entries import Proof
from orion.common.protocol.messages import Message, RefusalCode
from orion.common.protocol.refusals import malformed, refused

_NS = 1_000_000_000


class Keypair(Protocol):
    """What signing needs of an SDK keypair (sr25519)."""

    @property
    def ss58_address(self) -> str: ...

    @property
    def crypto_type(self) -> int: ...

    def sign(self, message: bytes) -> bytes: ...


def hotkey_of(keypair: Keypair) -> Hotkey:
    """The identity that a keypair signs as."""
    return Hotkey(keypair.ss58_address)


# --- signing ----------------------------------------------------------------------------------------------------------


class NonceSource:
    """Nonces of one sender: the time in ns, moved on where the clock is too coarse or stepped back a little."""

    def __init__(self) -> None:
        self._last_ns = 0

    def next_ns(self, now_s: float) -> int:
        """A nonce that is above every earlier one of this source."""
        self._last_ns = max(int(now_s * _NS), self._last_ns + 1)
        return self._last_ns


def sign_request(
    keypair: Keypair, method: str, path_and_query: str, body: bytes, receiver: Hotkey, *, nonce_ns: int
) -> dict[str, str]:
    """Headers that prove who sends this request, to whom and with which body.

    `path_and_query` is the request target exactly as it will be sent (percent-encoded). Each request, also a repeated
    one, needs a nonce of its own: the time in ns, see `NonceSource`.
    """
    headers = http_auth.sign(
        keypair, method=method, path=path_and_query, body=body, receiver_ss58=receiver, nonce_ns=nonce_ns
    )
    return cast(dict[str, str], headers)


# --- verifying --------------------------------------------------------------------------------------------------------


class NonceStore(Protocol):
    """Remembers which requests were taken. A persistent one keeps replays out across a restart."""

    def check_and_store(self, hotkey: Hotkey, nonce_ns: int, oldest_ns: int) -> bool:
        """Whether the pair is new; it is remembered from then on. What is below `oldest_ns` may be forgotten: the
        verifier no longer takes it. Raises RefusedError BUSY when nothing more can be remembered."""
        ...


class MemoryNonceStore:
    """A bounded `NonceStore` in memory. When full it refuses: forgetting early would let replays through."""

    def __init__(self, nonces_max: int = 500_000, nonces_per_hotkey_max: int = 100_000) -> None:
        """Bounds are per window: 500,000 in 12 s is more than one core can verify, and takes about 100 MB."""
        self._nonces_max = nonces_max
        self._nonces_per_hotkey_max = nonces_per_hotkey_max
        self._seen: defaultdict[Hotkey, set[int]] = defaultdict(set)
        self._by_age: list[tuple[int, Hotkey]] = []

    def check_and_store(self, hotkey: Hotkey, nonce_ns: int, oldest_ns: int) -> bool:
        while self._by_age and self._by_age[0][0] < oldest_ns:
            self._forget(*heapq.heappop(self._by_age))
        if nonce_ns in self._seen.get(hotkey, ()):
            return False
        num_of_hotkey = len(self._seen.get(hotkey, ()))
        if len(self._by_age) >= self._nonces_max or num_of_hotkey >= self._nonces_per_hotkey_max:
            raise refused(RefusalCode.BUSY, "too many requests within the replay window", retry_after_s=1.0)
        self._seen[hotkey].add(nonce_ns)
        heapq.heappush(self._by_age, (nonce_ns, hotkey))
        return True

    def _forget(self, nonce_ns: int, hotkey: Hotkey) -> None:
        nonces = self._seen[hotkey]
        nonces.remove(nonce_ns)
        if not nonces:
            del self._seen[hotkey]


class Verifier:
    """Checks the signatures of requests to one receiver."""

    def __init__(
        self,
        self_hotkey: Hotkey,
        *,
        age_s_max: float = http_auth.DEFAULT_MAX_AGE,
        skew_s_max: float = http_auth.DEFAULT_ALLOWED_SKEW,
        nonces: NonceStore | None = None,
        succeeds_at_s: float | None = None,
    ) -> None:
        """`age_s_max` back and `skew_s_max` ahead of the receiver's clock is the window in which a request is fresh.

        `succeeds_at_s` is given where an earlier process may have served under the same hotkey, with another store: a
        time at which that one had ended. What it took had nonces up to then and the skew; none of these is taken again.
        """
        self.self_hotkey = self_hotkey
        self._age_s_max = age_s_max
        self._skew_s_max = skew_s_max
        self._floor_ns = -1 if succeeds_at_s is None else int((succeeds_at_s + skew_s_max) * _NS)
        self._nonces = nonces if nonces is not None else MemoryNonceStore()

    def verify(self, headers: Mapping[str, str], body: bytes, method: str, path_and_query: str, now_ns: int) -> Hotkey:
        """Who sent the request. `path_and_query` is the request target as received, `body` the raw bytes.

        Raises RefusedError: BAD_SIGNATURE for anything that is missing or wrong (of a replay with `retry_after_s`,
        because signing anew helps), BUSY when the nonce store is full or an earlier process may have taken the nonce.
        """
        window = _Window(self._nonces, oldest_ns=now_ns - int(self._age_s_max * _NS), floor_ns=self._floor_ns)
        try:
            caller = http_auth.verify(
                headers,
                body,
                method=method,
                path=path_and_query,
                self_hotkey_ss58=self.self_hotkey,
                max_age=self._age_s_max,
                allowed_skew=self._skew_s_max,
                nonce_store=window,
                now_ns=now_ns,
            )
        except http_auth.ReplayedRequest as error:
            raise refused(RefusalCode.BAD_SIGNATURE, str(error), retry_after_s=0.0) from error
        except http_auth.AuthError as error:
            raise refused(RefusalCode.BAD_SIGNATURE, f"{type(error).__name__}: {error}") from error
        return Hotkey(caller.hotkey_ss58)


# --- proofs -----------------------------------------------------------------------------------------------------------


def proof_of(headers: Mapping[str, str], target: str) -> Proof:
    """What of a verified request must be kept so that others can verify it too. Raises RefusedError MALFORMED for a
    scheme other than sr25519, or a target that is too long."""
    lowered = {key.lower(): value for key, value in headers.items()}
    try:
        return Proof(
            nonce_ns=int(lowered[http_auth.HEADER_NONCE.lower()]),
            signature=lowered[http_auth.HEADER_SIGNATURE.lower()].lower(),
            target=target,
        )
    except ValidationError as error:
        raise malformed(error) from error


def is_proven(proof: Proof, sender: Hotkey, receiver: Hotkey, message: Message) -> bool:
    """Whether `sender` signed this message for `receiver`, at whatever time, as a request to the proof's target.

    What the target must be (route, protocol, run) is the caller's to check.
    """
    headers = {
        http_auth.HEADER_VERSION: http_auth.VERSION,
        http_auth.HEADER_HOTKEY: sender,
        http_auth.HEADER_RECEIVER: receiver,
        http_auth.HEADER_NONCE: str(proof.nonce_ns),
        http_auth.HEADER_SIGNATURE: proof.signature,
    }
    try:
        http_auth.verify(
            headers,
            message.model_dump_json().encode(),
            method="POST",
            path=proof.target,
            self_hotkey_ss58=receiver,
            nonce_store=_Anew(),
            now_ns=proof.nonce_ns,
        )
    except http_auth.AuthError:
        return False
    return True


class _Anew:
    """Takes every nonce: a proof may be looked at as often as anybody likes."""

    def check_and_store(self, hotkey_ss58: str, nonce_ns: int) -> bool:
        return True


class _Window:
    """The SDK's view of a `NonceStore`: it passes no time along, and asks once the signature holds."""

    def __init__(self, nonces: NonceStore, oldest_ns: int, floor_ns: int) -> None:
        self._nonces = nonces
        self._oldest_ns = oldest_ns
        self._floor_ns = floor_ns

    def check_and_store(self, hotkey_ss58: str, nonce_ns: int) -> bool:
        if nonce_ns <= self._floor_ns:
            # By then the sender's own clock, whatever it says, is past the floor.
            retry_after_s = (self._floor_ns - nonce_ns + 1) / _NS
            raise refused(RefusalCode.BUSY, "just started again: sign anew in a moment", retry_after_s)
        return self._nonces.check_and_store(Hotkey(hotkey_ss58), nonce_ns, self._oldest_ns)


# --- hotkeys ----------------------------------------------------------------------------------------------------------


def keypair_from_uri(uri: str) -> Keypair:
    """A development key such as `//Alice` or `//orion/miner/3`; anyone who knows the name can sign with it."""
    return cast(Keypair, sp_core.Keypair.create_from_uri(uri))


def create_wallet(wallet_path: Path, wallet_name: str, hotkey_name: str) -> Hotkey:
    """Makes a wallet's coldkey and hotkey files, without password, where they do not exist yet; returns the hotkey.

    The layout on disk is the SDK's: `<path>/<name>/coldkey`, `<path>/<name>/hotkeys/<hotkey>`. Blocks on file I/O.
    """
    wallet = bittensor.Wallet(name=wallet_name, hotkey=hotkey_name, path=str(wallet_path))
    folder = wallet_path / wallet_name
    if not (folder / "coldkeypub.txt").exists():
        wallet.create_new_coldkey(n_words=12, use_password=False, overwrite=False, suppress=True)
    if not (folder / "hotkeys" / hotkey_name).exists():
        wallet.create_new_hotkey(n_words=12, use_password=False, overwrite=False, suppress=True)
    return hotkey_of(load_hotkey(wallet_path, wallet_name, hotkey_name))


def load_coldkey(wallet_path: Path, wallet_name: str) -> Keypair:
    """The coldkey of a wallet that has no password, as `create_wallet` makes them. Blocks."""
    wallet = bittensor.Wallet(name=wallet_name, path=str(wallet_path))
    return cast(Keypair, wallet.coldkey)


def load_hotkey(wallet_path: Path, wallet_name: str, hotkey_name: str) -> Keypair:
    """The signing key of an existing wallet; needs no coldkey. Raises ConfigError when there is none. Blocks."""
    file = wallet_path / wallet_name / "hotkeys" / hotkey_name
    if not file.exists():
        raise ConfigError(
            f"no hotkey at {file}; make one with `btcli wallet create -w {wallet_name} -H {hotkey_name} "
            f"--wallet-path {wallet_path} --no-password` or name another wallet"
        )
    wallet = bittensor.Wallet(name=wallet_name, hotkey=hotkey_name, path=str(wallet_path))
    return cast(Keypair, wallet.hotkey)
