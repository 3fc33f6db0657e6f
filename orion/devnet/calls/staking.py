"""Staking TAO and taking it back. One alpha is one TAO, in every subnet and always, without fees."""

from typing import Any

from orion.devnet import accounts, stakes, subnets
from orion.devnet.config import RAO
from orion.devnet.dispatch import Execution, Handler, Origin, require

_PRICE = RAO
"""Rao for one alpha."""


def add_stake(execution: Execution, origin: Origin, *, hotkey: str, netuid: int, amount_staked: int) -> None:
    """TAO of the signer becomes alpha on a hotkey."""
    coldkey = origin.signed()
    state = execution.state
    _check_place(execution, hotkey, netuid)
    require(amount_staked >= int(state.runtime.constant("SubtensorModule", "InitialMinStake")), "AmountTooLow")
    require(accounts.can_pay(execution, coldkey, amount_staked), "NotEnoughBalanceToStake")
    accounts.withdraw(execution, coldkey, amount_staked)
    stakes.add(state, hotkey, coldkey, netuid, amount_staked)
    _move_reserve(execution, netuid, amount_staked)
    execution.emit("StakeAdded", coldkey, hotkey, amount_staked, amount_staked, netuid, 0)


def add_stake_limit(
    execution: Execution,
    origin: Origin,
    *,
    hotkey: str,
    netuid: int,
    amount_staked: int,
    limit_price: int,
    allow_partial: bool,
) -> None:
    """As `add_stake`, unless alpha costs more than the limit."""
    require(limit_price >= _PRICE, "SlippageTooHigh")
    add_stake(execution, origin, hotkey=hotkey, netuid=netuid, amount_staked=amount_staked)


def remove_stake(execution: Execution, origin: Origin, *, hotkey: str, netuid: int, amount_unstaked: int) -> None:
    """Alpha of the signer on a hotkey becomes TAO."""
    coldkey = origin.signed()
    state = execution.state
    _check_place(execution, hotkey, netuid)
    held = stakes.stake_of(state, hotkey, coldkey, netuid)
    require(0 < amount_unstaked <= held, "NotEnoughStakeToWithdraw")
    stakes.remove(state, hotkey, coldkey, netuid, amount_unstaked)
    _draw_reserve(execution, netuid, amount_unstaked)
    accounts.credit(execution, coldkey, amount_unstaked)
    execution.emit("StakeRemoved", coldkey, hotkey, amount_unstaked, amount_unstaked, netuid, 0)


def remove_stake_limit(
    execution: Execution,
    origin: Origin,
    *,
    hotkey: str,
    netuid: int,
    amount_unstaked: int,
    limit_price: int,
    allow_partial: bool,
) -> None:
    """As `remove_stake`, unless alpha brings less than the limit."""
    require(limit_price <= _PRICE, "SlippageTooHigh")
    remove_stake(execution, origin, hotkey=hotkey, netuid=netuid, amount_unstaked=amount_unstaked)


def remove_stake_full_limit(
    execution: Execution, origin: Origin, *, hotkey: str, netuid: int, limit_price: int | None
) -> None:
    """Takes back all that the signer holds on a hotkey in a subnet."""
    require(limit_price is None or limit_price <= _PRICE, "SlippageTooHigh")
    held = stakes.stake_of(execution.state, hotkey, origin.signed(), netuid)
    remove_stake(execution, origin, hotkey=hotkey, netuid=netuid, amount_unstaked=held)


def unstake_all(execution: Execution, origin: Origin, *, hotkey: str) -> None:
    """Takes back all that the signer holds on a hotkey in all subnets."""
    for netuid in subnets.netuids(execution.state):
        held = stakes.stake_of(execution.state, hotkey, origin.signed(), netuid)
        if held:
            remove_stake(execution, origin, hotkey=hotkey, netuid=netuid, amount_unstaked=held)


def move_stake(
    execution: Execution,
    origin: Origin,
    *,
    origin_hotkey: str,
    destination_hotkey: str,
    origin_netuid: int,
    destination_netuid: int,
    alpha_amount: int,
) -> None:
    """Alpha of the signer goes to another hotkey, or subnet, or both."""
    coldkey = origin.signed()
    _check_place(execution, origin_hotkey, origin_netuid)
    _check_place(execution, destination_hotkey, destination_netuid)
    held = stakes.stake_of(execution.state, origin_hotkey, coldkey, origin_netuid)
    require(0 < alpha_amount <= held, "NotEnoughStakeToWithdraw")
    stakes.remove(execution.state, origin_hotkey, coldkey, origin_netuid, alpha_amount)
    stakes.add(execution.state, destination_hotkey, coldkey, destination_netuid, alpha_amount)
    if origin_netuid != destination_netuid:
        _draw_reserve(execution, origin_netuid, alpha_amount)
        _move_reserve(execution, destination_netuid, alpha_amount)
    execution.emit(
        "StakeMoved", coldkey, origin_hotkey, origin_netuid, destination_hotkey, destination_netuid, alpha_amount
    )


def swap_stake(
    execution: Execution,
    origin: Origin,
    *,
    hotkey: str,
    origin_netuid: int,
    destination_netuid: int,
    alpha_amount: int,
) -> None:
    """Alpha of the signer goes to another subnet, on the same hotkey."""
    move_stake(
        execution,
        origin,
        origin_hotkey=hotkey,
        destination_hotkey=hotkey,
        origin_netuid=origin_netuid,
        destination_netuid=destination_netuid,
        alpha_amount=alpha_amount,
    )


def swap_stake_limit(
    execution: Execution, origin: Origin, *, limit_price: int, allow_partial: bool, **swap: Any
) -> None:
    """As `swap_stake`, unless the subnets' prices stand worse to each other than the limit."""
    require(limit_price <= _PRICE, "SlippageTooHigh")
    swap_stake(execution, origin, **swap)


def move_stake_limit(
    execution: Execution, origin: Origin, *, limit_price: int, allow_partial: bool, **move: Any
) -> None:
    """As `move_stake`, unless the subnets' prices stand worse to each other than the limit."""
    require(limit_price <= _PRICE, "SlippageTooHigh")
    move_stake(execution, origin, **move)


def _check_place(execution: Execution, hotkey: str, netuid: int) -> None:
    state = execution.state
    require(subnets.exists(state, netuid), "SubnetNotExists")
    require(bool(state.get("SubtokenEnabled", netuid)), "SubtokenDisabled")
    require(subnets.coldkey_of(state, hotkey) is not None, "HotKeyAccountNotExists")


def _draw_reserve(execution: Execution, netuid: int, rao: int) -> None:
    """Takes TAO out of a subnet for alpha. What the subnet was paid may be less than that, because epochs make alpha;
    the difference is made here, where the real chain's price would fall."""
    state = execution.state
    missing = max(0, rao - int(state.get("SubnetTAO", netuid)))
    if missing:
        state.put("Balances.TotalIssuance", value=state.get("Balances.TotalIssuance") + missing)
        state.put("TotalIssuance", value=state.get("TotalIssuance") + missing)
    _move_reserve(execution, netuid, -rao)


def _move_reserve(execution: Execution, netuid: int, rao: int) -> None:
    state = execution.state
    for name, pallet_wide in (("SubnetTAO", False), ("SubnetAlphaOut", False), ("TotalStake", True)):
        params = () if pallet_wide else (netuid,)
        state.put(name, *params, value=max(0, state.get(name, *params) + rao))


_P = "SubtensorModule"
CALLS: dict[tuple[str, str], Handler] = {
    (_P, "add_stake"): add_stake,
    (_P, "add_stake_limit"): add_stake_limit,
    (_P, "remove_stake"): remove_stake,
    (_P, "remove_stake_limit"): remove_stake_limit,
    (_P, "remove_stake_full_limit"): remove_stake_full_limit,
    (_P, "unstake_all"): unstake_all,
    (_P, "move_stake"): move_stake,
    (_P, "move_stake_limit"): move_stake_limit,
    (_P, "swap_stake"): swap_stake,
    (_P, "swap_stake_limit"): swap_stake_limit,
}
