"""Proofs: whoever has one and the message can tell who said it, years later, and nobody can make one up."""

import pytest

from orion.common.ids import Digest
from orion.common.protocol.entries import Proof
from orion.common.protocol.messages import Commitment, Message, RefusalCode, Report
from orion.common.protocol.refusals import RefusedError
from orion.common.protocol.signing import hotkey_of, is_proven, keypair_from_uri, proof_of, sign_request

ALICE, BOB, CAROL = (keypair_from_uri(f"//{name}") for name in ("Alice", "Bob", "Carol"))
TARGET = "/v1/report?protocol=1&run=abc"
COMMITMENT = Commitment(
    outer_step=1,
    num_entries=4,
    num_applied=2,
    num_contributed=2,
    num_kept=4,
    root=Digest("a" * 64),
    is_final=True,
)
REPORT = Report(sequence=3, commitment=COMMITMENT)


def proof(message: Message = REPORT) -> Proof:
    body = message.model_dump_json().encode()
    headers = sign_request(ALICE, "POST", TARGET, body, hotkey_of(BOB), nonce_ns=1_800_000_000_000_000_000)
    return proof_of(headers, TARGET)


def test_a_proof_holds_for_its_sender_receiver_and_message_alone() -> None:
    made = proof()
    assert is_proven(made, hotkey_of(ALICE), hotkey_of(BOB), REPORT)
    assert not is_proven(made, hotkey_of(CAROL), hotkey_of(BOB), REPORT)
    assert not is_proven(made, hotkey_of(ALICE), hotkey_of(CAROL), REPORT)
    assert not is_proven(made, hotkey_of(ALICE), hotkey_of(BOB), REPORT.model_copy(update={"sequence": 4}))


@pytest.mark.parametrize(
    "change",
    [{"nonce_ns": 1}, {"signature": "0x" + "1b" * 64}, {"target": TARGET.replace("abc", "abd")}],
)
def test_a_proof_that_was_changed_proves_nothing(change: dict[str, object]) -> None:
    assert not is_proven(proof().model_copy(update=change), hotkey_of(ALICE), hotkey_of(BOB), REPORT)


def test_what_cannot_be_kept_is_refused() -> None:
    headers = sign_request(ALICE, "POST", TARGET, b"", hotkey_of(BOB), nonce_ns=1)
    with pytest.raises(RefusedError) as refused:
        proof_of(headers, "/" + "x" * 3_000)
    assert refused.value.code is RefusalCode.MALFORMED
