"""The chain: the seam the roles use, and a ledger of one subnet that stands in for it.

`ChainLedger` is pure and driven by block numbers from outside; `MemoryChain` puts it behind the seam for the simulator
and for tests, `chain_server` behind HTTP for several processes. It follows the real chain's rules for slots, permits,
rate limits and weights in a simple form: no fees, no delegation, no commit-reveal, and incentive is the mean of the
validators' weights by stake. Invariants: uids are 0..n-1, one hotkey each; a slot that changes hands brings nothing of
its last owner along; at every epoch incentives add up to 1 or are all 0.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Annotated, Protocol

from pydantic import Field, TypeAdapter, ValidationError

from orion.common.errors import OrionError
from orion.common.ids import Hotkey
from orion.common.protocol.fields import Count, Ss58, Text, Url
from orion.common.protocol.messages import Message

U16_MAX = 65_535
"""What the chain stores for the largest of a row of weights."""

Share = Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)]
Amount = Annotated[float, Field(ge=0, allow_inf_nan=False)]

_URL = TypeAdapter(Url)


class Neuron(Message):
    """A slot of the subnet."""

    uid: Count
    hotkey: Ss58
    stake: Amount
    validator_permit: bool
    last_update_block: Count
    """When it last set weights; before that, when it was registered."""
    incentive: Share
    axon_url: Url | None


class Metagraph(Message):
    """The subnet at one block."""

    block: Count
    tempo: Count
    """Blocks from epoch to epoch."""
    owner_hotkey: Ss58 | None
    """Of the subnet; its slot may be given weight that is not paid to anyone."""
    neurons: tuple[Neuron, ...]
    """By uid."""

    def neuron_of(self, hotkey: Hotkey) -> Neuron | None:
        """The slot of a hotkey, None when it is not registered."""
        return next((neuron for neuron in self.neurons if neuron.hotkey == hotkey), None)


class Hyperparameters(Message):
    """The subnet's rules."""

    tempo: Annotated[int, Field(ge=1)] = 20
    """Blocks from epoch to epoch: permits and incentives change then."""
    weights_rate_limit_blocks: Count = 10
    """Blocks between two sets of weights of one neuron."""
    min_allowed_weights: Count = 1
    max_weight: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Largest share of one uid in a set of weights."""
    weights_version: Count = 0
    """Lowest version key that is taken; 0 takes all."""
    max_uids: Annotated[int, Field(ge=1, le=65_536)] = 256
    max_validators: Annotated[int, Field(ge=1)] = 64
    min_validator_stake: Amount = 1.0
    immunity_blocks: Count = 100
    """A new neuron keeps its slot for this long, whatever it earns."""
    block_s: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 1.0
    """Seconds from block to block."""


class ChainErrorCode(StrEnum):
    NOT_REGISTERED = "not_registered"
    SUBNET_FULL = "subnet_full"
    UNKNOWN_UID = "unknown_uid"
    STAKE_TOO_LOW = "stake_too_low"
    WRONG_VERSION_KEY = "wrong_version_key"
    RATE_LIMITED = "rate_limited"
    NO_PERMIT = "no_permit"
    INVALID_WEIGHTS = "invalid_weights"
    TOO_FEW_WEIGHTS = "too_few_weights"
    WEIGHT_TOO_LARGE = "weight_too_large"
    INVALID_AXON = "invalid_axon"


class ChainFault(Message):
    """Why the chain did not do what it was asked to."""

    code: ChainErrorCode
    message: Text
    retry_after_blocks: Count | None = None
    """When it would; None = not without a change."""


class ChainError(OrionError):
    """The chain refused an extrinsic."""

    def __init__(self, code: ChainErrorCode, message: str, retry_after_blocks: int | None = None) -> None:
        super().__init__(f"{code}: {message}")
        self.fault = ChainFault(code=code, message=message, retry_after_blocks=retry_after_blocks)

    @property
    def code(self) -> ChainErrorCode:
        return self.fault.code

    @property
    def retry_after_blocks(self) -> int | None:
        return self.fault.retry_after_blocks


class Chain(Protocol):
    """What the roles need of the chain. Methods raise ChainError for a refusal, TransportError when it is not reached.

    Where a method takes the hotkey that acts, the implementation must be able to sign for it.
    """

    async def block(self) -> int:
        """The newest block."""
        ...

    async def metagraph(self) -> Metagraph: ...

    async def hyperparameters(self) -> Hyperparameters: ...

    async def register(self, hotkey: Hotkey) -> int:
        """The hotkey's uid, which it gets where it has none yet. Raises ChainError SUBNET_FULL."""
        ...

    async def set_weights(self, hotkey: Hotkey, weights: Mapping[int, float], version_key: int) -> None:
        """Sets uid → weight (any non-negative scale) as the validator `hotkey`."""
        ...

    async def weights_of(self, hotkey: Hotkey) -> dict[int, float]:
        """The weights that a validator has last set: uid to its share, which sum to 1; empty when it never did."""
        ...

    async def serve_axon(self, hotkey: Hotkey, url: str) -> None:
        """Publishes where `hotkey` can be reached."""
        ...


# --- the ledger -------------------------------------------------------------------------------------------------------


@dataclass(slots=True)
class _Slot:
    hotkey: Hotkey
    registered_block: int
    last_update_block: int
    validator_permit: bool = False
    incentive: float = 0.0
    axon_url: str | None = None
    weights: dict[int, int] = field(default_factory=dict)
    """uid to u16, as set at `last_update_block`."""


class ChainLedger:
    """One subnet's state. Not for several threads."""

    def __init__(
        self,
        hyperparameters: Hyperparameters | None = None,
        *,
        owner: Hotkey | None = None,
        stakes: Mapping[Hotkey, float] | None = None,
    ) -> None:
        """`stakes` are there from the start, whether or not their hotkeys register. The owner has uid 0."""
        self.hyperparameters = hyperparameters if hyperparameters is not None else Hyperparameters()
        self.block = 0
        self._owner = owner
        self._stakes: dict[Hotkey, float] = dict(stakes or {})
        self._slots: list[_Slot] = []
        self._uids: dict[Hotkey, int] = {}
        if owner is not None:
            self.register(owner)

    def advance_to(self, block: int) -> None:
        """Blocks pass. Numbers that are not above the newest block change nothing."""
        tempo = self.hyperparameters.tempo
        num_epochs = block // tempo - self.block // tempo
        self.block = max(self.block, block)
        if num_epochs > 0:
            # Between two epochs without an extrinsic nothing changes: however many passed, one tells the result.
            self._run_epoch()

    def set_stake(self, hotkey: Hotkey, stake: float) -> None:
        """Gives a hotkey its stake; it counts for permits from the next epoch on."""
        if not (math.isfinite(stake) and stake >= 0):
            raise ValueError(f"stake {stake} is negative or not finite")
        self._stakes[hotkey] = stake

    def register(self, hotkey: Hotkey) -> int:
        """The hotkey's uid: the one it has, the next free one, or that of whom it replaces. Raises ChainError."""
        if hotkey in self._uids:
            return self._uids[hotkey]
        slot = _Slot(hotkey, registered_block=self.block, last_update_block=self.block)
        uid = len(self._slots)
        if uid < self.hyperparameters.max_uids:
            self._slots.append(slot)
        else:
            uid = self._uid_to_replace()
            del self._uids[self._slots[uid].hotkey]
            self._slots[uid] = slot
            for other in self._slots:
                other.weights.pop(uid, None)
        self._uids[hotkey] = uid
        return uid

    def set_weights(self, hotkey: Hotkey, weights: Mapping[int, float], version_key: int) -> None:
        """Checks in the chain's order, then stores the row as u16. Raises ChainError."""
        rules = self.hyperparameters
        if unknown := [uid for uid in weights if not 0 <= uid < len(self._slots)]:
            raise ChainError(ChainErrorCode.UNKNOWN_UID, f"there are no uids {sorted(unknown)[:8]}")
        slot = self._slot_of(hotkey)
        if self._stakes.get(hotkey, 0.0) < rules.min_validator_stake:
            raise ChainError(
                ChainErrorCode.STAKE_TOO_LOW, f"setting weights takes a stake of {rules.min_validator_stake:g}"
            )
        if version_key < rules.weights_version:
            raise ChainError(
                ChainErrorCode.WRONG_VERSION_KEY, f"version key {version_key} is below {rules.weights_version}"
            )
        blocks_left = slot.last_update_block + rules.weights_rate_limit_blocks - self.block
        if blocks_left > 0:
            raise ChainError(ChainErrorCode.RATE_LIMITED, "weights were set too recently", blocks_left)
        if not slot.validator_permit and set(weights) != {self._uids[hotkey]}:
            epoch_blocks = rules.tempo - self.block % rules.tempo
            raise ChainError(ChainErrorCode.NO_PERMIT, "no validator permit; they change at epochs", epoch_blocks)
        row = _as_u16(weights)
        if len(row) < rules.min_allowed_weights:
            raise ChainError(ChainErrorCode.TOO_FEW_WEIGHTS, f"{rules.min_allowed_weights} are the least")
        if len(row) > 1 and max(row.values()) > rules.max_weight * sum(row.values()) + 1:
            raise ChainError(ChainErrorCode.WEIGHT_TOO_LARGE, f"no uid may have more than {rules.max_weight:g} of all")
        slot.weights = row
        slot.last_update_block = self.block

    def serve_axon(self, hotkey: Hotkey, url: str) -> None:
        """Raises ChainError."""
        check_axon_url(url)
        self._slot_of(hotkey).axon_url = url

    def weights_of(self, hotkey: Hotkey) -> dict[int, int]:
        """The row that a hotkey set: uid to u16. Raises ChainError NOT_REGISTERED."""
        return dict(self._slot_of(hotkey).weights)

    def weight_shares_of(self, hotkey: Hotkey) -> dict[int, float]:
        """The same row as shares of 1."""
        row = self.weights_of(hotkey)
        total = sum(row.values())
        return {uid: units / total for uid, units in row.items()}

    def metagraph(self) -> Metagraph:
        """The subnet as it is."""
        return Metagraph(
            block=self.block,
            tempo=self.hyperparameters.tempo,
            owner_hotkey=self._owner,
            neurons=tuple(
                Neuron(
                    uid=uid,
                    hotkey=slot.hotkey,
                    stake=self._stakes.get(slot.hotkey, 0.0),
                    validator_permit=slot.validator_permit,
                    last_update_block=slot.last_update_block,
                    incentive=slot.incentive,
                    axon_url=slot.axon_url,
                )
                for uid, slot in enumerate(self._slots)
            ),
        )

    def check_invariants(self) -> None:
        """Raises AssertionError when the ledger contradicts itself."""
        assert {slot.hotkey: uid for uid, slot in enumerate(self._slots)} == self._uids
        assert len(self._uids) == len(self._slots) <= self.hyperparameters.max_uids
        total = math.fsum(slot.incentive for slot in self._slots)
        assert total <= 1 + 1e-9
        for slot in self._slots:
            assert all(0 <= uid < len(self._slots) and 0 < u16 <= U16_MAX for uid, u16 in slot.weights.items())

    def _slot_of(self, hotkey: Hotkey) -> _Slot:
        if hotkey not in self._uids:
            raise ChainError(ChainErrorCode.NOT_REGISTERED, f"{hotkey} is not registered on the subnet")
        return self._slots[self._uids[hotkey]]

    def _uid_to_replace(self) -> int:
        """Who earned least of those that are neither new nor validators nor the owner; the oldest among equals."""
        oldest_immune_block = self.block - self.hyperparameters.immunity_blocks
        candidates = [
            (slot.incentive, slot.registered_block, uid)
            for uid, slot in enumerate(self._slots)
            if slot.registered_block <= oldest_immune_block and not slot.validator_permit and slot.hotkey != self._owner
        ]
        if not candidates:
            raise ChainError(ChainErrorCode.SUBNET_FULL, "every slot is taken and immune")
        return min(candidates)[2]

    def _run_epoch(self) -> None:
        rules = self.hyperparameters
        eligible = [
            (-self._stakes.get(slot.hotkey, 0.0), uid)
            for uid, slot in enumerate(self._slots)
            if self._stakes.get(slot.hotkey, 0.0) >= rules.min_validator_stake
        ]
        permitted = {uid for _, uid in sorted(eligible)[: rules.max_validators]}
        earned = [0.0] * len(self._slots)
        for uid, slot in enumerate(self._slots):
            slot.validator_permit = uid in permitted
            row_total = sum(slot.weights.values())
            if slot.validator_permit and row_total > 0:
                for target, u16 in slot.weights.items():
                    earned[target] += self._stakes[slot.hotkey] * u16 / row_total
        total = math.fsum(earned)
        for slot, amount in zip(self._slots, earned, strict=True):
            slot.incentive = min(1.0, amount / total) if total > 0 else 0.0


def check_weights(weights: Mapping[int, float]) -> None:
    """Raises ChainError INVALID_WEIGHTS unless all are finite, none is negative and one is above zero."""
    if not all(math.isfinite(weight) and weight >= 0 for weight in weights.values()):
        raise ChainError(ChainErrorCode.INVALID_WEIGHTS, "weights must be finite and not negative")
    if not any(weight > 0 for weight in weights.values()):
        raise ChainError(ChainErrorCode.INVALID_WEIGHTS, "no weight is above zero")


def check_axon_url(url: str) -> None:
    """Raises ChainError INVALID_AXON for what is no base URL."""
    try:
        _URL.validate_python(url)
    except ValidationError:
        raise ChainError(ChainErrorCode.INVALID_AXON, "an axon is http(s)://host:port") from None


def _as_u16(weights: Mapping[int, float]) -> dict[int, int]:
    """The largest becomes 65,535, the others keep their proportion to it; what rounds to zero is dropped."""
    check_weights(weights)
    largest = max(weights.values())
    units = {uid: round(weight / largest * U16_MAX) for uid, weight in weights.items()}
    return {uid: unit for uid, unit in units.items() if unit > 0}


class MemoryChain:
    """A ledger behind the seam, in the same process. Whoever holds the ledger lets blocks pass."""

    def __init__(self, ledger: ChainLedger) -> None:
        self._ledger = ledger

    async def block(self) -> int:
        return self._ledger.block

    async def metagraph(self) -> Metagraph:
        return self._ledger.metagraph()

    async def hyperparameters(self) -> Hyperparameters:
        return self._ledger.hyperparameters

    async def register(self, hotkey: Hotkey) -> int:
        return self._ledger.register(hotkey)

    async def set_weights(self, hotkey: Hotkey, weights: Mapping[int, float], version_key: int) -> None:
        self._ledger.set_weights(hotkey, weights, version_key)

    async def weights_of(self, hotkey: Hotkey) -> dict[int, float]:
        return self._ledger.weight_shares_of(hotkey)

    async def serve_axon(self, hotkey: Hotkey, url: str) -> None:
        self._ledger.serve_axon(hotkey, url)
