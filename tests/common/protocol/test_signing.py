"""Signatures: only the signed request, for its receiver, within its window, once."""

from collections.abc import Mapping
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orion.common.errors import ConfigError
from orion.common.ids import Hotkey
from orion.common.protocol.messages import RefusalCode
from orion.common.protocol.refusals import RefusedError
from orion.common.protocol.signing import (
    MemoryNonceStore,
    NonceSource,
    Verifier,
    create_wallet,
    hotkey_of,
    keypair_from_uri,
    load_hotkey,
    sign_request,
)

ALICE, BOB = keypair_from_uri("//Alice"), keypair_from_uri("//Bob")
NOW_S = 1_800_000_000.0
NOW_NS = int(NOW_S * 1e9)
TARGET = "/v1/forward?protocol=1&run=ab%20c"


def signed(nonce_ns: int = NOW_NS, body: bytes = b"body") -> dict[str, str]:
    return sign_request(ALICE, "POST", TARGET, body, hotkey_of(BOB), nonce_ns=nonce_ns)


def refusal_of(
    verifier: Verifier,
    headers: Mapping[str, str],
    *,
    body: bytes = b"body",
    method: str = "POST",
    target: str = TARGET,
    now_ns: int = NOW_NS,
) -> RefusalCode | None:
    try:
        assert verifier.verify(headers, body, method, target, now_ns) == hotkey_of(ALICE)
    except RefusedError as error:
        return error.code
    return None


def test_the_signed_request_is_taken_from_its_sender() -> None:
    assert refusal_of(Verifier(hotkey_of(BOB)), signed()) is None


@pytest.mark.parametrize(
    "changed",
    [{"body": b"other"}, {"method": "PUT"}, {"target": TARGET + "&x=1"}, {"target": "/v1/forward"}],
    ids=["body", "method", "query", "no query"],
)
def test_anything_changed_on_the_way_is_refused(changed: dict[str, object]) -> None:
    assert refusal_of(Verifier(hotkey_of(BOB)), signed(), **changed) is RefusalCode.BAD_SIGNATURE  # type: ignore[arg-type]


def test_a_request_for_somebody_else_is_refused() -> None:
    assert refusal_of(Verifier(hotkey_of(ALICE)), signed()) is RefusalCode.BAD_SIGNATURE


@pytest.mark.parametrize("header", ["Version", "Hotkey", "Receiver", "Nonce", "Signature"])
def test_every_header_is_needed_and_must_be_well_formed(header: str) -> None:
    name = f"X-Bittensor-{header}"
    without = {key: value for key, value in signed().items() if key != name}
    assert refusal_of(Verifier(hotkey_of(BOB)), without) is RefusalCode.BAD_SIGNATURE
    for value in ("", "x", "9" * 6000, "0x00"):
        broken = {**signed(), name: value}
        assert refusal_of(Verifier(hotkey_of(BOB)), broken) is RefusalCode.BAD_SIGNATURE


@given(st.integers(-20_000, 20_000))
def test_the_window_is_ten_seconds_back_and_two_ahead(offset_ms: int) -> None:
    fresh = -10_000 <= offset_ms <= 2_000
    code = refusal_of(Verifier(hotkey_of(BOB)), signed(NOW_NS + offset_ms * 1_000_000))
    assert code is (None if fresh else RefusalCode.BAD_SIGNATURE)


def test_a_replay_is_refused_throughout_the_window() -> None:
    verifier = Verifier(hotkey_of(BOB))
    ahead = signed(NOW_NS + 2_000_000_000)
    assert refusal_of(verifier, ahead) is None
    for age_s in (0, 5, 11, 12, 100):
        with pytest.raises(RefusedError) as caught:
            verifier.verify(ahead, b"body", "POST", TARGET, NOW_NS + age_s * 1_000_000_000)
        assert caught.value.code is RefusalCode.BAD_SIGNATURE


def test_a_successor_takes_nothing_that_its_predecessor_may_have_taken() -> None:
    """It began at NOW; the one before took what was at most two seconds ahead of that."""
    verifier = Verifier(hotkey_of(BOB), succeeds_at_s=NOW_S)
    for offset_s in (-9.0, 0.0, 2.0):
        with pytest.raises(RefusedError) as caught:
            nonce_ns = NOW_NS + int(offset_s * 1e9)
            verifier.verify(signed(nonce_ns), b"body", "POST", TARGET, NOW_NS + int(0.5e9))
        assert caught.value.code is RefusalCode.BUSY
        assert caught.value.retry_after_s == pytest.approx(2.0 - offset_s, abs=1e-6)
    later_ns = NOW_NS + 2_000_000_001
    assert verifier.verify(signed(later_ns), b"body", "POST", TARGET, later_ns) == hotkey_of(ALICE)
    with pytest.raises(RefusedError) as forged:
        verifier.verify(signed(), b"other", "POST", TARGET, NOW_NS)
    assert forged.value.code is RefusalCode.BAD_SIGNATURE


def test_only_a_replay_says_that_signing_anew_helps() -> None:
    verifier = Verifier(hotkey_of(BOB))
    verifier.verify(signed(), b"body", "POST", TARGET, NOW_NS)
    with pytest.raises(RefusedError) as replayed:
        verifier.verify(signed(), b"body", "POST", TARGET, NOW_NS)
    with pytest.raises(RefusedError) as forged:
        verifier.verify(signed(), b"other", "POST", TARGET, NOW_NS)
    assert replayed.value.retry_after_s == 0
    assert forged.value.retry_after_s is None


def test_a_forged_request_does_not_use_up_the_nonce() -> None:
    verifier = Verifier(hotkey_of(BOB))
    assert refusal_of(verifier, signed(), body=b"forged") is RefusalCode.BAD_SIGNATURE
    assert refusal_of(verifier, signed()) is None


@given(st.lists(st.tuples(st.sampled_from("ab"), st.integers(0, 30), st.integers(0, 5)), max_size=60))
def test_nonces_are_remembered_exactly_within_the_window(calls: list[tuple[str, int, int]]) -> None:
    store, seen, oldest_ns = MemoryNonceStore(), set(), 0
    for hotkey, nonce_ns, step_ns in calls:
        oldest_ns += step_ns
        if nonce_ns < oldest_ns:  # the verifier refuses it before it asks
            continue
        assert store.check_and_store(Hotkey(hotkey), nonce_ns, oldest_ns) is ((hotkey, nonce_ns) not in seen)
        seen.add((hotkey, nonce_ns))


@pytest.mark.parametrize(("nonces_max", "per_hotkey_max"), [(3, 10), (10, 3)])
def test_a_full_nonce_store_refuses_until_the_window_moved_on(nonces_max: int, per_hotkey_max: int) -> None:
    store = MemoryNonceStore(nonces_max, per_hotkey_max)
    for nonce_ns in range(3):
        assert store.check_and_store(Hotkey("a"), nonce_ns, 0)
    with pytest.raises(RefusedError) as caught:
        store.check_and_store(Hotkey("a"), 3, 0)
    assert caught.value.code is RefusalCode.BUSY
    assert not store.check_and_store(Hotkey("a"), 2, 0)
    assert store.check_and_store(Hotkey("a"), 3, 1)


@given(st.lists(st.floats(0, 2e9), min_size=1, max_size=50))
def test_nonces_rise_whatever_the_clock_does(times_s: list[float]) -> None:
    source = NonceSource()
    nonces = [source.next_ns(now_s) for now_s in times_s]
    assert nonces == sorted(set(nonces))


def test_a_wallet_is_made_once_and_loaded_again(tmp_path: Path) -> None:
    hotkey = create_wallet(tmp_path, "miner", "hk0")
    assert create_wallet(tmp_path, "miner", "hk0") == hotkey
    assert create_wallet(tmp_path, "miner", "hk1") != hotkey
    keypair = load_hotkey(tmp_path, "miner", "hk0")
    headers = sign_request(keypair, "GET", "/", b"", hotkey_of(BOB), nonce_ns=NOW_NS)
    assert Verifier(hotkey_of(BOB)).verify(headers, b"", "GET", "/", NOW_NS) == hotkey


def test_a_missing_wallet_says_how_to_make_one(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="btcli wallet create"):
        load_hotkey(tmp_path, "miner", "hk0")
