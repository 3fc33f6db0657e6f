"""Stake: alpha that coldkeys hold on hotkeys, and what it counts for.

Owns the share pools: a hotkey's alpha in a subnet belongs to its stakers by their shares, so that one credit to the
hotkey pays all of them. Must not check who may do what. One alpha costs one TAO, always: there is no market.
Invariants: a hotkey's alpha is 0 exactly when its shares are; no operation makes alpha other than `reward`.
"""

from orion.devnet.state import Reader, State
from orion.devnet.subnets import ROOT_NETUID, coldkey_of

ONE = 1 << 64
"""1.0 as the chain keeps fixed-point numbers with 64 fractional bits."""

U64_MAX = (1 << 64) - 1


def hotkey_alpha(state: Reader, hotkey: str, netuid: int) -> int:
    """All that is staked on a hotkey in a subnet, by whomever."""
    return int(state.get("TotalHotkeyAlpha", hotkey, netuid))


def stake_of(state: Reader, hotkey: str, coldkey: str, netuid: int) -> int:
    """What one coldkey holds on a hotkey in a subnet."""
    shares = int(state.get("Alpha", hotkey, coldkey, netuid)["bits"])
    total_shares = int(state.get("TotalHotkeyShares", hotkey, netuid)["bits"])
    return hotkey_alpha(state, hotkey, netuid) * shares // total_shares if total_shares else 0


def add(state: State, hotkey: str, coldkey: str, netuid: int, alpha: int) -> None:
    """The coldkey holds more on the hotkey."""
    total = hotkey_alpha(state, hotkey, netuid)
    total_shares = int(state.get("TotalHotkeyShares", hotkey, netuid)["bits"])
    shares = alpha * total_shares // total if total else alpha * ONE
    _set_shares(state, hotkey, coldkey, netuid, int(state.get("Alpha", hotkey, coldkey, netuid)["bits"]) + shares)
    state.put("TotalHotkeyShares", hotkey, netuid, value={"bits": total_shares + shares})
    _set_total(state, hotkey, netuid, total + alpha)
    staking = state.get("StakingHotkeys", coldkey)
    if hotkey not in staking:
        state.put("StakingHotkeys", coldkey, value=[*staking, hotkey])


def remove(state: State, hotkey: str, coldkey: str, netuid: int, alpha: int) -> None:
    """The coldkey holds less on the hotkey, which must be at most what it has there."""
    held = stake_of(state, hotkey, coldkey, netuid)
    assert 0 <= alpha <= held, "callers check what is there"
    total = hotkey_alpha(state, hotkey, netuid)
    total_shares = int(state.get("TotalHotkeyShares", hotkey, netuid)["bits"])
    own_shares = int(state.get("Alpha", hotkey, coldkey, netuid)["bits"])
    if total == alpha:
        taken, own_shares, total_shares = 0, 0, 0
    elif alpha == held:
        taken = own_shares
    else:
        taken = -(-alpha * total_shares // total)
    _set_shares(state, hotkey, coldkey, netuid, own_shares - taken)
    state.put("TotalHotkeyShares", hotkey, netuid, value={"bits": total_shares - taken})
    _set_total(state, hotkey, netuid, total - alpha)


def reward(state: State, hotkey: str, netuid: int, alpha: int) -> None:
    """New alpha for all who stake on a hotkey; for its owner where nobody does. Nothing where it has no owner."""
    if alpha == 0:
        return
    if hotkey_alpha(state, hotkey, netuid):
        _set_total(state, hotkey, netuid, hotkey_alpha(state, hotkey, netuid) + alpha)
    else:
        owner = coldkey_of(state, hotkey)
        if owner is None:
            return
        add(state, hotkey, owner, netuid, alpha)
    state.put("SubnetAlphaOut", netuid, value=state.get("SubnetAlphaOut", netuid) + alpha)


def root_weight(state: Reader, hotkey: str) -> int:
    """What a hotkey's stake in the root counts for in any subnet."""
    return hotkey_alpha(state, hotkey, ROOT_NETUID) * int(state.get("TaoWeight")) // U64_MAX


def total_weight(state: Reader, hotkey: str, netuid: int) -> int:
    """What a hotkey's stake counts for in a subnet."""
    return hotkey_alpha(state, hotkey, netuid) + root_weight(state, hotkey)


def _set_shares(state: State, hotkey: str, coldkey: str, netuid: int, bits: int) -> None:
    if bits:
        state.put("Alpha", hotkey, coldkey, netuid, value={"bits": bits})
    else:
        state.remove("Alpha", hotkey, coldkey, netuid)


def _set_total(state: State, hotkey: str, netuid: int, alpha: int) -> None:
    before = hotkey_alpha(state, hotkey, netuid)
    state.put("TotalHotkeyAlpha", hotkey, netuid, value=alpha)
    state.put("TotalAlphaStaked", netuid, value=max(0, state.get("TotalAlphaStaked", netuid) + alpha - before))
