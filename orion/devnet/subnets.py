"""Subnets and their slots: facts about them, and how a slot is filled, cleared and looked up.

Owns the vectors that have one entry a uid and the maps between uids and hotkeys. Must not check who may do what: calls
do. Invariants: uids are 0..n-1, one hotkey each; every vector of a subnet has n entries; a slot that changes hands
brings nothing of its last owner along.
"""

from typing import Any

from orion.devnet.accounts import NOBODY
from orion.devnet.dispatch import Execution
from orion.devnet.state import Reader, State

ROOT_NETUID = 0
MAX_SUBNETS = 4096
"""The real chain's stride from one mechanism's storage index to the next."""

VECTORS: dict[str, object] = {
    "Active": True,
    "ValidatorPermit": False,
    "Consensus": 0,
    "Dividends": 0,
    "Emission": 0,
    "ValidatorTrust": 0,
}
"""The items that hold one entry a uid, and the entry of a fresh slot."""

MECHANISM_VECTORS: dict[str, object] = {"Incentive": 0}
"""The same, one a mechanism; `LastUpdate` besides, whose fresh entry is the block."""


def storage_index(netuid: int, mechanism: int) -> int:
    """Under which number a mechanism's weights and bonds are kept."""
    return mechanism * MAX_SUBNETS + netuid


def exists(state: Reader, netuid: int) -> bool:
    return bool(state.get("NetworksAdded", netuid))


def netuids(state: Reader) -> list[int]:
    """All subnets, the root among them."""
    return sorted(params[0] for params, added in state.items("NetworksAdded") if added)


def num_uids(state: Reader, netuid: int) -> int:
    return int(state.get("SubnetworkN", netuid))


def uid_of(state: Reader, netuid: int, hotkey: str) -> int | None:
    """The slot of a hotkey, None when it has none there."""
    found = state.get("Uids", netuid, hotkey)
    return None if found is None else int(found)


def hotkeys(state: Reader, netuid: int) -> list[str]:
    """By uid."""
    return [state.get("Keys", netuid, uid) for uid in range(num_uids(state, netuid))]


def coldkey_of(state: Reader, hotkey: str) -> str | None:
    """Who owns a hotkey; None when the chain has never seen it."""
    owner = str(state.get("Owner", hotkey))
    return None if owner == NOBODY else owner


def vector(state: Reader, name: str, index: int, size: int) -> list[Any]:
    """An item with one entry a uid, filled up to `size` where it is shorter."""
    values = list(state.get(name, index) or ())
    fresh = VECTORS.get(name, 0)
    return values[:size] + [fresh] * (size - len(values))


def set_entry(state: State, name: str, index: int, uid: int, value: object) -> None:
    """Sets the entry of one uid; the item grows to it where it is shorter."""
    values = vector(state, name, index, max(uid + 1, len(state.get(name, index) or ())))
    values[uid] = value
    state.put(name, index, value=values)


def num_mechanisms(state: Reader, netuid: int) -> int:
    return int(state.get("MechanismCountCurrent", netuid))


def last_update(state: Reader, netuid: int, mechanism: int, uid: int) -> int:
    """The block in which a uid last set weights, or was registered."""
    values = state.get("LastUpdate", storage_index(netuid, mechanism)) or ()
    return int(values[uid]) if uid < len(values) else 0


def touch(execution: Execution, netuid: int, mechanism: int, uid: int) -> None:
    """A uid has set or committed weights."""
    set_entry(execution.state, "LastUpdate", storage_index(netuid, mechanism), uid, execution.block)


def adopt(state: State, hotkey: str, coldkey: str) -> None:
    """The coldkey owns a hotkey that nobody owned."""
    if coldkey_of(state, hotkey) is not None:
        return
    state.put("Owner", hotkey, value=coldkey)
    state.put("OwnedHotkeys", coldkey, value=[*state.get("OwnedHotkeys", coldkey), hotkey])
    state.put("Delegates", hotkey, value=0)


def append(execution: Execution, netuid: int, hotkey: str) -> int:
    """Gives a hotkey the next free slot; returns its uid."""
    state = execution.state
    uid = num_uids(state, netuid)
    state.put("SubnetworkN", netuid, value=uid + 1)
    _fill(execution, netuid, uid, hotkey)
    return uid


def replace(execution: Execution, netuid: int, uid: int, hotkey: str) -> None:
    """Takes a slot from its hotkey and gives it to another."""
    state = execution.state
    old = state.get("Keys", netuid, uid)
    state.remove("Uids", netuid, old)
    state.remove("IsNetworkMember", old, netuid)
    state.remove("Axons", netuid, old)
    state.remove("Prometheus", netuid, old)
    for mechanism in range(num_mechanisms(state, netuid)):
        index = storage_index(netuid, mechanism)
        state.remove("Weights", index, uid)
        state.remove("Bonds", index, uid)
        for validator in range(num_uids(state, netuid)):
            _without_target(state, index, validator, uid)
    _fill(execution, netuid, uid, hotkey)


def _without_target(state: State, index: int, validator: int, uid: int) -> None:
    """Bonds in a neuron end with it. Weights for it don't: the epoch leaves out what is older than its registration."""
    bonds = state.get("Bonds", index, validator)
    kept = [(target, value) for target, value in bonds if target != uid]
    if len(kept) != len(bonds):
        state.put("Bonds", index, validator, value=kept)


def _fill(execution: Execution, netuid: int, uid: int, hotkey: str) -> None:
    state = execution.state
    state.put("Keys", netuid, uid, value=hotkey)
    state.put("Uids", netuid, hotkey, value=uid)
    state.put("IsNetworkMember", hotkey, netuid, value=True)
    state.put("BlockAtRegistration", netuid, uid, value=execution.block)
    for name, fresh in VECTORS.items():
        set_entry(state, name, netuid, uid, fresh)
    for mechanism in range(num_mechanisms(state, netuid)):
        index = storage_index(netuid, mechanism)
        set_entry(state, "LastUpdate", index, uid, execution.block)
        for name, fresh in MECHANISM_VECTORS.items():
            set_entry(state, name, index, uid, fresh)


def slot_to_reuse(execution: Execution, netuid: int) -> int | None:
    """The slot that the next registration takes in a full subnet: the neuron that earns least, of these the one that
    registered first, of these the lowest uid. Neurons still immune and the owner's are left alone; None = all are."""
    state = execution.state
    size = num_uids(state, netuid)
    immunity = int(state.get("ImmunityPeriod", netuid))
    owner = state.get("SubnetOwnerHotkey", netuid)
    emission = vector(state, "Emission", netuid, size)
    candidates: list[tuple[int, int, int]] = []
    for uid in range(size):
        registered = int(state.get("BlockAtRegistration", netuid, uid))
        if execution.block - registered >= immunity and state.get("Keys", netuid, uid) != owner:
            candidates.append((int(emission[uid]), registered, uid))
    return min(candidates)[2] if candidates else None


def activity_cutoff(state: Reader, netuid: int) -> int:
    """After how many blocks without weights a validator no longer counts."""
    factor = int(state.get("ActivityCutoffFactorMilli", netuid)) * int(state.get("Tempo", netuid)) // 1000
    return max(int(state.get("MinActivityCutoff")), factor)


def next_epoch(state: Reader, netuid: int) -> int | None:
    """The block at whose end the next epoch runs; None where none ever does."""
    tempo = int(state.get("Tempo", netuid))
    if netuid == ROOT_NETUID or tempo == 0:
        return None
    regular = int(state.get("LastEpochBlock", netuid)) + tempo
    pending = int(state.get("PendingEpochAt", netuid))
    return min(regular, pending) if pending else regular
