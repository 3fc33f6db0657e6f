"""A chain in memory: one subnet, for the simulator and for tests.

`ChainLedger` is pure and driven by block numbers from outside; `MemoryChain` puts it behind the seam. It follows the
real chain's rules for slots, permits, rate limits and weights in a simple form: no fees, no delegation, timelocked
weights are never revealed, and incentive is the mean of the validators' weights by stake. Invariants: uids are 0..n-1,
one hotkey each; a slot that changes hands brings nothing of its last owner along; at every epoch incentives add up to 1
or are all 0.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

from orion.common.ids import SPEC_VERSION, Hotkey
from orion.common.net.chain import (
    U16_MAX,
    ChainError,
    ChainErrorCode,
    Hyperparameters,
    Metagraph,
    Neuron,
    WeightsCommit,
    WeightsReceipt,
    as_u16,
    axon_of,
    check_weights,
    shares_of,
    url_of,
)

COMMITS_MAX = 10
"""Timelocked weights of one validator that may wait, as on the real chain."""


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
    commits: list[int] = field(default_factory=list)
    """Blocks at which timelocked weights were committed."""


class ChainLedger:
    """One subnet's state. Not for several threads."""

    def __init__(
        self,
        hyperparameters: Hyperparameters | None = None,
        *,
        owner: Hotkey | None = None,
        stakes: Mapping[Hotkey, float] | None = None,
        min_validator_stake: float = 1.0,
    ) -> None:
        """`stakes` are there from the start, whether or not their hotkeys register. The owner has uid 0."""
        self.hyperparameters = hyperparameters if hyperparameters is not None else Hyperparameters()
        if self.hyperparameters.tempo < 1:
            raise ValueError("a ledger without epochs is not supported")
        self.block = 0
        self._owner = owner
        self._min_validator_stake = min_validator_stake
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

    def set_weights(self, hotkey: Hotkey, weights: Mapping[int, float], version_key: int) -> WeightsReceipt:
        """Checks in the chain's order, then stores the row as u16, or that it was committed. Raises ChainError."""
        check_weights(weights)
        rules = self.hyperparameters
        if unknown := [uid for uid in weights if not 0 <= uid < len(self._slots)]:
            raise ChainError(ChainErrorCode.UNKNOWN_UID, f"there are no uids {sorted(unknown)[:8]}")
        slot = self._slot_of(hotkey)
        if self._stakes.get(hotkey, 0.0) < self._min_validator_stake:
            raise ChainError(
                ChainErrorCode.STAKE_TOO_LOW, f"setting weights takes a stake of {self._min_validator_stake:g}"
            )
        if version_key < rules.weights_version:
            raise ChainError(
                ChainErrorCode.WRONG_VERSION_KEY, f"version key {version_key} is below {rules.weights_version}"
            )
        blocks_left = slot.last_update_block + rules.weights_rate_limit_blocks - self.block
        if blocks_left > 0:
            raise ChainError(ChainErrorCode.RATE_LIMITED, "weights were set too recently", blocks_left)
        if not slot.validator_permit and set(weights) != {self._uids[hotkey]}:
            raise ChainError(ChainErrorCode.NO_PERMIT, "no validator permit", self.blocks_to_epoch())
        row = as_u16(weights)
        if len(row) < rules.min_allowed_weights:
            raise ChainError(ChainErrorCode.TOO_FEW_WEIGHTS, f"{rules.min_allowed_weights} are the least")
        if len(row) > 1 and max(row.values()) > rules.max_weight * sum(row.values()) + 1:
            raise ChainError(ChainErrorCode.WEIGHT_TOO_LARGE, f"no uid may have more than {rules.max_weight:g} of all")
        if rules.commit_reveal:
            if len(slot.commits) >= COMMITS_MAX:
                raise ChainError(ChainErrorCode.TOO_MANY_COMMITS, f"{COMMITS_MAX} commits wait", self.blocks_to_epoch())
            slot.commits.append(self.block)
        else:
            slot.weights = row
        slot.last_update_block = self.block
        return WeightsReceipt(block=self.block, is_timelocked=rules.commit_reveal)

    def serve_axon(self, hotkey: Hotkey, url: str) -> None:
        """Raises ChainError."""
        axon = axon_of(url)
        self._slot_of(hotkey).axon_url = url_of(*axon)

    def weights_of(self, hotkey: Hotkey) -> dict[int, int]:
        """The row that a hotkey set: uid to u16. Raises ChainError NOT_REGISTERED."""
        return dict(self._slot_of(hotkey).weights)

    def commits_of(self, hotkey: Hotkey) -> tuple[WeightsCommit, ...]:
        """What a hotkey has committed to. Raises ChainError NOT_REGISTERED."""
        return tuple(WeightsCommit(block=block, reveal_round=0) for block in self._slot_of(hotkey).commits)

    def blocks_to_epoch(self) -> int:
        """Blocks until the next epoch."""
        return self.hyperparameters.tempo - self.block % self.hyperparameters.tempo

    def metagraph(self) -> Metagraph:
        """The subnet as it is."""
        return Metagraph(
            block=self.block,
            owner_hotkey=self._owner,
            neurons=tuple(
                Neuron(
                    uid=uid,
                    hotkey=slot.hotkey,
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
            if self._stakes.get(slot.hotkey, 0.0) >= self._min_validator_stake
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


class MemoryChain:
    """A ledger behind the seam, in the same process. Whoever holds the ledger lets blocks pass."""

    def __init__(self, ledger: ChainLedger, hotkey: Hotkey | None = None) -> None:
        """`hotkey` is who acts; reading needs none."""
        self._ledger = ledger
        self._hotkey = hotkey

    async def block(self) -> int:
        return self._ledger.block

    async def metagraph(self) -> Metagraph:
        return self._ledger.metagraph()

    async def hyperparameters(self) -> Hyperparameters:
        return self._ledger.hyperparameters

    async def blocks_to_epoch(self) -> int | None:
        return self._ledger.blocks_to_epoch()

    async def set_weights(self, weights: Mapping[int, float]) -> WeightsReceipt:
        return self._ledger.set_weights(self._actor, weights, SPEC_VERSION)

    async def weights_of(self, hotkey: Hotkey) -> dict[int, float]:
        return shares_of(self._ledger.weights_of(hotkey))

    async def commits_of(self, hotkey: Hotkey) -> tuple[WeightsCommit, ...]:
        return self._ledger.commits_of(hotkey)

    async def serve_axon(self, url: str) -> None:
        self._ledger.serve_axon(self._actor, url)

    @property
    def _actor(self) -> Hotkey:
        if self._hotkey is None:
            raise ValueError("this chain was opened for reading")
        return self._hotkey
