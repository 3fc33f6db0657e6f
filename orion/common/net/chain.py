"""The chain: the seam the roles use. What they may ask of it, and what it can answer.

Owns the words and the errors; knows no implementation. `bittensor_chain` is the real one, through the Bittensor SDK;
`memory_chain` stands in for it in the simulator and in tests. Pure.
"""

import ipaddress
import math
from collections.abc import Mapping
from enum import StrEnum
from types import MappingProxyType
from typing import Annotated, Final, Protocol
from urllib.parse import urlsplit

from pydantic import Field, TypeAdapter, ValidationError

from orion.common.errors import OrionError
from orion.common.ids import Hotkey
from orion.common.protocol.fields import Count, Ss58, Text, Url
from orion.common.protocol.messages import Message

U16_MAX: Final = 65_535
"""What the chain stores for the largest of a row of weights, and for a share of all."""

Share = Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)]

_URL = TypeAdapter(Url)
_REFUSED_ADDRESSES: Final = frozenset(
    map(ipaddress.ip_address, ("0.0.0.0", "127.0.0.1", "255.255.255.255", "::", "::1"))
)


class Neuron(Message):
    """A slot of the subnet."""

    uid: Count
    hotkey: Ss58
    validator_permit: bool
    last_update_block: Count
    """When it last set or committed weights; before that, when it was registered."""
    incentive: Share
    """Its share of what miners get, as of the last epoch."""
    axon_url: Url | None
    """Where it says that it can be reached."""


class Metagraph(Message):
    """The subnet at one block."""

    block: Count
    owner_hotkey: Ss58 | None
    """Of the subnet; its slot may be given weight that is not paid to anyone."""
    neurons: tuple[Neuron, ...]
    """By uid."""

    def neuron_of(self, hotkey: Hotkey) -> Neuron | None:
        """The slot of a hotkey, None when it is not registered."""
        return next((neuron for neuron in self.neurons if neuron.hotkey == hotkey), None)


class Hyperparameters(Message):
    """The subnet's rules."""

    tempo: Annotated[int, Field(ge=0)] = 20
    """Blocks from epoch to epoch, as a rule: permits and incentives change then. When the next one comes is asked
    (`blocks_to_epoch`), never computed from this. 0 = there are none."""
    weights_rate_limit_blocks: Count = 10
    """Blocks between two sets of weights of one neuron."""
    min_allowed_weights: Count = 1
    max_weight: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Largest share of one uid in a set of weights."""
    weights_version: Count = 0
    """Lowest version key that is taken; 0 takes all."""
    commit_reveal: bool = False
    """Whether weights are set as timelocked commits, which the chain reveals later."""
    max_uids: Annotated[int, Field(ge=1, le=65_536)] = 256
    max_validators: Annotated[int, Field(ge=1)] = 64
    immunity_blocks: Count = 100
    """A new neuron keeps its slot for this long, whatever it earns."""
    block_s: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 1.0
    """Seconds from block to block."""


class WeightsReceipt(Message):
    """That a set of weights was taken."""

    block: Count
    """Whose state holds it."""
    is_timelocked: bool
    """Whether it was committed, to be revealed later, instead of written openly."""


class WeightsCommit(Message):
    """A timelocked set of weights that has not been revealed."""

    block: Count
    """When it was committed."""
    reveal_round: Count
    """Of the randomness beacon that opens it."""


class ChainErrorCode(StrEnum):
    NOT_REGISTERED = "not_registered"
    ALREADY_REGISTERED = "already_registered"
    REGISTRATION_CLOSED = "registration_closed"
    SUBNET_FULL = "subnet_full"
    NO_SUBNET = "no_subnet"
    UNKNOWN_UID = "unknown_uid"
    STAKE_TOO_LOW = "stake_too_low"
    BALANCE_TOO_LOW = "balance_too_low"
    WRONG_VERSION_KEY = "wrong_version_key"
    RATE_LIMITED = "rate_limited"
    TOO_MANY_COMMITS = "too_many_commits"
    NO_PERMIT = "no_permit"
    INVALID_WEIGHTS = "invalid_weights"
    TOO_FEW_WEIGHTS = "too_few_weights"
    WEIGHT_TOO_LARGE = "weight_too_large"
    INVALID_AXON = "invalid_axon"
    NOT_OWNER = "not_owner"
    UNSUPPORTED = "unsupported"
    """This chain's runtime has no such call or storage."""
    OTHER = "other"
    """What the chain said is in the message."""


REMEDIES: Final = MappingProxyType(
    {
        ChainErrorCode.NOT_REGISTERED: "register the hotkey: `orion register --netuid N --network NETWORK`",
        ChainErrorCode.ALREADY_REGISTERED: "nothing to do",
        ChainErrorCode.REGISTRATION_CLOSED: "the subnet's owner has closed registration; ask them, or come again later",
        ChainErrorCode.SUBNET_FULL: "every slot is taken and immune; come again when an immunity period is over",
        ChainErrorCode.NO_SUBNET: "check --netuid and --network; `btcli subnets list` shows the subnets",
        ChainErrorCode.UNKNOWN_UID: "read the metagraph again: slots have changed",
        ChainErrorCode.STAKE_TOO_LOW: "stake more to the validator's hotkey: `btcli stake add`",
        ChainErrorCode.BALANCE_TOO_LOW: "send TAO to the coldkey",
        ChainErrorCode.WRONG_VERSION_KEY: "the subnet asks for a newer Orion: update and restart",
        ChainErrorCode.RATE_LIMITED: "wait until the chain's rate limit has passed",
        ChainErrorCode.TOO_MANY_COMMITS: "wait until earlier commits are revealed",
        ChainErrorCode.NO_PERMIT: "wait for the next epoch; if that does not help, the hotkey needs more stake",
        ChainErrorCode.INVALID_WEIGHTS: "this is a mistake of ours: please report it",
        ChainErrorCode.TOO_FEW_WEIGHTS: "wait until more miners have earned something",
        ChainErrorCode.WEIGHT_TOO_LARGE: "spread the weight over more uids",
        ChainErrorCode.INVALID_AXON: "the chain keeps http(s)://IP:PORT with a public IP (127.0.0.1 is refused, "
        "127.0.0.2 is not)",
        ChainErrorCode.NOT_OWNER: "sign with the coldkey that owns the subnet",
        ChainErrorCode.UNSUPPORTED: "this chain's runtime lacks it; update Orion, or use another network",
        ChainErrorCode.OTHER: "see what the chain said",
    }
)
"""What a person, or the process, should do about it."""


class ChainFault(Message):
    """Why the chain did not do what it was asked to."""

    code: ChainErrorCode
    message: Text
    retry_after_blocks: Count | None = None
    """When it would; None = not without a change."""

    @property
    def remedy(self) -> str:
        """What to do about it."""
        return REMEDIES[self.code]


class ChainError(OrionError):
    """The chain refused."""

    def __init__(self, code: ChainErrorCode, message: str, retry_after_blocks: int | None = None) -> None:
        super().__init__(f"{code}: {message}; {REMEDIES[code]}")
        self.fault = ChainFault(code=code, message=message[:500], retry_after_blocks=retry_after_blocks)

    @property
    def code(self) -> ChainErrorCode:
        return self.fault.code

    @property
    def retry_after_blocks(self) -> int | None:
        return self.fault.retry_after_blocks


class Chain(Protocol):
    """What the roles need of one subnet. Methods raise ChainError for a refusal, TransportError when the chain is not
    reached in time. Who acts is the hotkey that the implementation was made for; reading needs none."""

    async def block(self) -> int:
        """The newest block."""
        ...

    async def metagraph(self) -> Metagraph: ...

    async def hyperparameters(self) -> Hyperparameters: ...

    async def blocks_to_epoch(self) -> int | None:
        """Blocks until the next epoch, as the chain says; None where there are no epochs."""
        ...

    async def set_weights(self, weights: Mapping[int, float]) -> WeightsReceipt:
        """Sets uid → weight (any non-negative scale), plainly or as a timelocked commit, as the subnet asks."""
        ...

    async def weights_of(self, hotkey: Hotkey) -> dict[int, float]:
        """The weights of a validator that are in force: uid to its share, which sum to 1; empty when there are none."""
        ...

    async def commits_of(self, hotkey: Hotkey) -> tuple[WeightsCommit, ...]:
        """The validator's timelocked weights that are not revealed yet, oldest first."""
        ...

    async def serve_axon(self, url: str) -> None:
        """Publishes where this hotkey can be reached; does nothing when that stands there already."""
        ...


def check_weights(weights: Mapping[int, float]) -> None:
    """Raises ChainError INVALID_WEIGHTS unless all are finite, none is negative and one is above zero."""
    if not all(math.isfinite(weight) and weight >= 0 for weight in weights.values()):
        raise ChainError(ChainErrorCode.INVALID_WEIGHTS, "weights must be finite and not negative")
    if not any(weight > 0 for weight in weights.values()):
        raise ChainError(ChainErrorCode.INVALID_WEIGHTS, "no weight is above zero")


def as_u16(weights: Mapping[int, float]) -> dict[int, int]:
    """What the chain is given: the largest becomes 65,535, the others keep their proportion to it; what rounds to zero
    is dropped. `weights` must have passed `check_weights`."""
    largest = max(weights.values())
    units = {uid: round(weight / largest * U16_MAX) for uid, weight in weights.items()}
    return {uid: unit for uid, unit in units.items() if unit > 0}


def axon_of(url: str) -> tuple[str, int, bool]:
    """Address, port and whether TLS is spoken there. Raises ChainError INVALID_AXON for what the chain cannot keep."""
    try:
        parts = urlsplit(_URL.validate_python(url))
        address = ipaddress.ip_address(parts.hostname or "")
        port = parts.port or (443 if parts.scheme == "https" else 80)
    except (ValidationError, ValueError):
        raise ChainError(ChainErrorCode.INVALID_AXON, f"{url[:200]!r} is not http(s)://IP:PORT") from None
    if address in _REFUSED_ADDRESSES:
        raise ChainError(ChainErrorCode.INVALID_AXON, f"the chain takes no {address}")
    return str(address), port, parts.scheme == "https"


def url_of(address: str, port: int, is_tls: bool) -> str:
    """What `axon_of` takes apart."""
    host = f"[{address}]" if ":" in address else address
    return f"{'https' if is_tls else 'http'}://{host}:{port}"


def shares_of(row: Mapping[int, int]) -> dict[int, float]:
    """A row of u16 weights as shares of 1."""
    total = sum(row.values())
    return {uid: units / total for uid, units in sorted(row.items()) if units > 0}
