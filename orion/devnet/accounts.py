"""Accounts and balances: the development accounts, and the moving of TAO.

Owns `System.Account` and the total issuance. Must not know subnets. Invariant: the issuance is the sum of all free
balances and of what subnets hold; no balance is negative or, once an account exists, below the existential deposit
unless it is 0.
"""

from typing import Any

import bittensor_core

from orion.devnet.dispatch import Execution, TokenError
from orion.devnet.state import Reader, State

DEVELOPMENT_URIS = ("//Alice", "//Bob", "//Charlie", "//Dave", "//Eve", "//Ferdie")
"""Secret URIs of the accounts that own TAO in the first block. The first is also the root's key."""

NOBODY = bittensor_core.ss58_encode(bytes(32))
"""The account that the chain has where nobody is set."""


def development_address(uri: str) -> str:
    """The ss58 address of a development account."""
    address: str = bittensor_core.Keypair.create_from_uri(uri).ss58_address
    return address


def free_balance(state: Reader, address: str) -> int:
    """Rao that an account may spend."""
    return int(state.get("System.Account", address)["data"]["free"])


def nonce_of(state: Reader, address: str) -> int:
    return int(state.get("System.Account", address)["nonce"])


def count_nonce(state: State, address: str) -> None:
    """An extrinsic of the account is in a block."""
    account = state.get("System.Account", address)
    account["nonce"] += 1
    state.put("System.Account", address, value=account)


def endow(state: State, address: str, rao: int) -> None:
    """Creates TAO in the first block."""
    account = state.get("System.Account", address)
    account["data"]["free"] += rao
    account["providers"] = 1
    state.put("System.Account", address, value=account)
    _change_issuance(state, rao)


def transfer(execution: Execution, source: str, target: str, rao: int, *, keep_alive: bool) -> None:
    """Moves TAO. Raises TokenError when the source has too little, or would have too little left."""
    deposit = _existential_deposit(execution)
    if free_balance(execution.state, source) < rao:
        raise TokenError("FundsUnavailable")
    if free_balance(execution.state, target) + rao < deposit:
        raise TokenError("BelowMinimum")
    _debit(execution, source, rao, keep_alive=keep_alive)
    credit(execution, target, rao)
    execution.emit("Transfer", pallet="Balances", **{"from": source, "to": target, "amount": rao})


def withdraw(execution: Execution, source: str, rao: int, *, keep_alive: bool = True) -> None:
    """Takes TAO out of an account. Raises TokenError when it has too little, or would have too little left."""
    if free_balance(execution.state, source) < rao:
        raise TokenError("FundsUnavailable")
    _debit(execution, source, rao, keep_alive=keep_alive)
    execution.emit("Withdraw", pallet="Balances", who=source, amount=rao)


def credit(execution: Execution, target: str, rao: int) -> None:
    """Adds TAO to an account, which begins to exist with it."""
    state = execution.state
    account = state.get("System.Account", target)
    if not account["providers"]:
        account["providers"] = 1
        execution.emit("NewAccount", pallet="System", account=target)
        execution.emit("Endowed", pallet="Balances", account=target, free_balance=rao)
    account["data"]["free"] += rao
    state.put("System.Account", target, value=account)


def burn(execution: Execution, source: str, rao: int) -> None:
    """Takes TAO out of an account and out of the world."""
    withdraw(execution, source, rao)
    _change_issuance(execution.state, -rao)


def set_free(execution: Execution, target: str, rao: int) -> None:
    """Gives an account exactly this balance."""
    before = free_balance(execution.state, target)
    if rao > before:
        credit(execution, target, rao - before)
    elif rao < before:
        _debit(execution, target, before - rao, keep_alive=False)
    _change_issuance(execution.state, rao - before)
    execution.emit("BalanceSet", pallet="Balances", who=target, free=rao)


def can_pay(execution: Execution, source: str, rao: int) -> bool:
    """Whether an account has this much and stays alive without it."""
    return free_balance(execution.state, source) - rao >= _existential_deposit(execution)


def spendable(execution: Execution, source: str, *, keep_alive: bool) -> int:
    """All that an account can send away."""
    kept = _existential_deposit(execution) if keep_alive else 0
    return max(0, free_balance(execution.state, source) - kept)


def _debit(execution: Execution, source: str, rao: int, *, keep_alive: bool) -> None:
    account: dict[str, Any] = execution.state.get("System.Account", source)
    left = account["data"]["free"] - rao
    if left < _existential_deposit(execution):
        if keep_alive:
            raise TokenError("NotExpendable")
        # What is left of an account that ends is too little to keep, and lost. Its nonce stays, so that no old
        # extrinsic of it becomes good again.
        _change_issuance(execution.state, -left)
        account["providers"] = 0
        left = 0
        execution.emit("KilledAccount", pallet="System", account=source)
    account["data"]["free"] = left
    execution.state.put("System.Account", source, value=account)


def _existential_deposit(execution: Execution) -> int:
    return int(execution.state.runtime.constant("Balances", "ExistentialDeposit"))


def _change_issuance(state: State, rao: int) -> None:
    state.put("Balances.TotalIssuance", value=state.get("Balances.TotalIssuance") + rao)
    state.put("TotalIssuance", value=state.get("TotalIssuance") + rao)
