"""What the chain's and the SDK's words for a failure mean here. Pure.

The chain names its errors (`SettingWeightsTooFast`); the SDK sorts them into a dozen kinds, and is all there is when a
transaction never got into a block. A name decides where there is one.
"""

from types import MappingProxyType
from typing import Final

from orion.common.errors import TransportError
from orion.common.net.chain import ChainError, ChainErrorCode

_BY_NAME: Final = MappingProxyType(
    {
        "HotKeyNotRegisteredInSubNet": ChainErrorCode.NOT_REGISTERED,
        "HotKeyNotRegisteredInNetwork": ChainErrorCode.NOT_REGISTERED,
        "HotKeyAccountNotExists": ChainErrorCode.NOT_REGISTERED,
        "HotKeyAlreadyRegisteredInSubNet": ChainErrorCode.ALREADY_REGISTERED,
        "SubNetRegistrationDisabled": ChainErrorCode.REGISTRATION_CLOSED,
        "NoNeuronIdAvailable": ChainErrorCode.SUBNET_FULL,
        "SubnetNotExists": ChainErrorCode.NO_SUBNET,
        "MechanismDoesNotExist": ChainErrorCode.NO_SUBNET,
        "UidVecContainInvalidOne": ChainErrorCode.UNKNOWN_UID,
        "UidsLengthExceedUidsInSubNet": ChainErrorCode.UNKNOWN_UID,
        "NotEnoughStakeToSetWeights": ChainErrorCode.STAKE_TOO_LOW,
        "StakeAmountTooLow": ChainErrorCode.STAKE_TOO_LOW,
        "NotEnoughBalanceToStake": ChainErrorCode.BALANCE_TOO_LOW,
        "ZeroBalanceAfterWithdrawn": ChainErrorCode.BALANCE_TOO_LOW,
        "IncorrectWeightVersionKey": ChainErrorCode.WRONG_VERSION_KEY,
        "SettingWeightsTooFast": ChainErrorCode.RATE_LIMITED,
        "CommittingWeightsTooFast": ChainErrorCode.RATE_LIMITED,
        "ServingRateLimitExceeded": ChainErrorCode.RATE_LIMITED,
        "TooManyUnrevealedCommits": ChainErrorCode.TOO_MANY_COMMITS,
        "NeuronNoValidatorPermit": ChainErrorCode.NO_PERMIT,
        "DuplicateUids": ChainErrorCode.INVALID_WEIGHTS,
        "WeightVecNotEqualSize": ChainErrorCode.INVALID_WEIGHTS,
        "WeightVecLengthIsLow": ChainErrorCode.TOO_FEW_WEIGHTS,
        "MaxWeightExceeded": ChainErrorCode.WEIGHT_TOO_LARGE,
        "InvalidIpType": ChainErrorCode.INVALID_AXON,
        "InvalidIpAddress": ChainErrorCode.INVALID_AXON,
        "InvalidPort": ChainErrorCode.INVALID_AXON,
        "NotSubnetOwner": ChainErrorCode.NOT_OWNER,
        "BadOrigin": ChainErrorCode.NOT_OWNER,
    }
)
"""The chain's own names."""

_NOT_THROUGH: Final = frozenset(
    {
        "AlreadyImported",
        "AncientBirthBlock",
        "Dropped",
        "ExhaustsResources",
        "FinalityTimeout",
        "Future",
        "Invalid",
        "PriorityTooLow",
        "Retracted",
        "Stale",
        "Usurped",
    }
)
"""What befalls a transaction on its way: two at a time, a full pool, a fork. It may or may not be in a block; made anew
it may well get through."""

_BY_KIND: Final = MappingProxyType(
    {
        "insufficient_balance": ChainErrorCode.BALANCE_TOO_LOW,
        "rate_limited": ChainErrorCode.RATE_LIMITED,
        "not_registered": ChainErrorCode.NOT_REGISTERED,
        "subnet_not_exists": ChainErrorCode.NO_SUBNET,
    }
)
"""The SDK's kinds, where one says enough."""

_LOST: Final = ("connection", "session closed", "not connected")
"""In the text of what the SDK raises, or reports as a failed transaction, when the line broke."""


def failure(name: str | None, kind: str, message: str) -> ChainError | TransportError:
    """The error to raise for a failure that has this name on the chain (None: it never got that far), and this kind and
    text in the SDK."""
    text = " ".join(message.split()) or "no reason was given"
    if name in _NOT_THROUGH:
        return TransportError(f"chain: {text} ({name})")
    if name is not None and name in _BY_NAME:
        return ChainError(_BY_NAME[name], f"{text} ({name})")
    if name is None:
        lowered = text.lower()
        if "method not found" in lowered or "is not found" in lowered:
            return ChainError(ChainErrorCode.UNSUPPORTED, text)
        if kind == "unknown" and any(words in lowered for words in _LOST):
            return TransportError(f"chain: {text}")
        if "weights; only" in lowered:  # what the SDK says before it signs anything
            return ChainError(ChainErrorCode.TOO_FEW_WEIGHTS, text)
    code = _BY_KIND.get(kind, ChainErrorCode.OTHER)
    return ChainError(code, text if name is None else f"{text} ({name})")
