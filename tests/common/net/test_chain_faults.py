"""What the words of the chain and of its SDK are taken for."""

import pytest

from orion.common.errors import TransportError
from orion.common.net.chain import ChainError, ChainErrorCode
from orion.common.net.chain_faults import failure


@pytest.mark.parametrize(
    ("name", "kind", "message", "code"),
    [
        ("SettingWeightsTooFast", "rate_limited", "too fast", ChainErrorCode.RATE_LIMITED),
        ("CommittingWeightsTooFast", "rate_limited", "too fast", ChainErrorCode.RATE_LIMITED),
        ("NeuronNoValidatorPermit", "not_authorized", "no permit", ChainErrorCode.NO_PERMIT),
        ("NotEnoughStakeToSetWeights", "insufficient_balance", "stake", ChainErrorCode.STAKE_TOO_LOW),
        ("StakeAmountTooLow", "insufficient_balance", "stake", ChainErrorCode.STAKE_TOO_LOW),
        ("RateLimitExceeded", "rate_limited", "limit", ChainErrorCode.RATE_LIMITED),
        ("NetworkTxRateLimitExceeded", "rate_limited", "limit", ChainErrorCode.RATE_LIMITED),
        ("SomethingNew", "unknown", "whatever", ChainErrorCode.OTHER),
        (None, "rate_limited", "Retry in ~95 blocks", ChainErrorCode.RATE_LIMITED),
        (None, "not_registered", "Hotkey is not registered", ChainErrorCode.NOT_REGISTERED),
        (None, "insufficient_balance", "inability to pay some fees", ChainErrorCode.BALANCE_TOO_LOW),
        (None, "unknown", "Method not found: 'x'", ChainErrorCode.UNSUPPORTED),
        (None, "unknown", "", ChainErrorCode.OTHER),
    ],
)
def test_a_refusal_becomes_a_code(name: str | None, kind: str, message: str, code: ChainErrorCode) -> None:
    error = failure(name, kind, message)
    assert isinstance(error, ChainError)
    assert error.code is code
    assert name is None or name in str(error)


def test_a_line_that_broke_is_no_refusal() -> None:
    for text in ("RPC session closed", "Connection lost while waiting for a subscription response"):
        assert isinstance(failure(None, "unknown", text), TransportError)


@pytest.mark.parametrize("name", ["Stale", "Future", "Dropped", "Retracted", "PriorityTooLow"])
def test_a_transaction_that_got_lost_on_the_way_is_no_refusal(name: str) -> None:
    assert isinstance(failure(name, "invalid_argument", "whatever"), TransportError)
