"""Transfers of TAO."""

from orion.devnet import accounts
from orion.devnet.dispatch import Execution, Handler, Origin


def transfer_keep_alive(execution: Execution, origin: Origin, *, dest: str, value: int) -> None:
    accounts.transfer(execution, origin.signed(), dest, value, keep_alive=True)


def transfer_allow_death(execution: Execution, origin: Origin, *, dest: str, value: int) -> None:
    accounts.transfer(execution, origin.signed(), dest, value, keep_alive=False)


def transfer_all(execution: Execution, origin: Origin, *, dest: str, keep_alive: bool) -> None:
    source = origin.signed()
    value = accounts.spendable(execution, source, keep_alive=keep_alive)
    accounts.transfer(execution, source, dest, value, keep_alive=keep_alive)


def force_transfer(execution: Execution, origin: Origin, *, source: str, dest: str, value: int) -> None:
    origin.require_root()
    accounts.transfer(execution, source, dest, value, keep_alive=False)


def force_set_balance(execution: Execution, origin: Origin, *, who: str, new_free: int) -> None:
    origin.require_root()
    accounts.set_free(execution, who, new_free)


CALLS: dict[tuple[str, str], Handler] = {
    ("Balances", "transfer_keep_alive"): transfer_keep_alive,
    ("Balances", "transfer_allow_death"): transfer_allow_death,
    ("Balances", "transfer_all"): transfer_all,
    ("Balances", "force_transfer"): force_transfer,
    ("Balances", "force_set_balance"): force_set_balance,
}
