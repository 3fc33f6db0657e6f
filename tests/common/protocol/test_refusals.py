"""Refusals travel whole, with a status that says as much."""

import pytest
from pydantic import ValidationError

from orion.common.protocol.messages import (
    Join,
    Refusal,
    RefusalCode,
)
from orion.common.protocol.refusals import malformed, refusal_from_answer, refused, status_of


@pytest.mark.parametrize("code", RefusalCode)
def test_every_code_has_a_4xx_status_and_survives_the_way_back(code: RefusalCode) -> None:
    error = refused(code, "why", retry_after_s=1.5)
    assert 400 <= status_of(code) < 500
    answer = error.refusal.model_dump_json().encode()
    assert refusal_from_answer(status_of(code), answer) == Refusal(code=code, message="why", retry_after_s=1.5)


@pytest.mark.parametrize(
    ("status", "code"),
    [
        (404, RefusalCode.NOT_FOUND),
        (413, RefusalCode.TOO_LARGE),
        (429, RefusalCode.BUSY),
        (418, RefusalCode.MALFORMED),
    ],
)
def test_a_foreign_answer_gets_the_nearest_code(status: int, code: RefusalCode) -> None:
    refusal = refusal_from_answer(status, b"<html>no</html>")
    assert refusal.code is code
    assert refusal.retry_after_s is None


def test_long_explanations_are_cut() -> None:
    assert len(refused(RefusalCode.MALFORMED, "x" * 10_000).refusal.message) == 500


def test_a_malformed_message_names_its_field_and_not_its_value() -> None:
    with pytest.raises(ValidationError) as caught:
        Join.model_validate_json('{"url": "secret", "device": "cpu", "memory_bytes": 1}')
    refusal = malformed(caught.value).refusal
    assert refusal.code is RefusalCode.MALFORMED
    assert "url" in refusal.message
    assert "secret" not in refusal.message
