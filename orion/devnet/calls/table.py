"""Every call that the chain carries out, and those that carry out others.

Owns the one table from (pallet, call) to what is done. Must not hold rules of single subjects. Invariant: nesting is
bounded; a call that isn't in the table fails with `System.CallFiltered`.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from orion.devnet.calls import balances, hyperparameters, registration, serving, shield, staking, weights
from orion.devnet.dispatch import (
    ROOT,
    ArithmeticFailure,
    Call,
    CallFiltered,
    DispatchError,
    Execution,
    Handler,
    Origin,
    require,
)
from orion.devnet.state import DoesNotFit

NESTING_MAX = 8
"""Calls in calls; the SDK nests three at most."""

BATCH_MAX = 1024
"""Calls in one batch."""

CALLS: dict[tuple[str, str], Handler] = {
    **balances.CALLS,
    **hyperparameters.CALLS,
    **registration.CALLS,
    **serving.CALLS,
    **shield.CALLS,
    **staking.CALLS,
    **weights.CALLS,
}


def carry_out(execution: Execution, origin: Origin, call: Call, depth: int = 0) -> None:
    """Carries out a call, or leaves no trace of it and raises DispatchError."""
    if depth > NESTING_MAX:
        raise CallFiltered
    pallet, function = call["call_module"], call["call_function"]
    args = {argument["name"]: argument["value"] for argument in call["call_args"]}
    with execution.transaction(), _sums_that_fit():
        nesting = _NESTING.get((pallet, function))
        if nesting is not None:
            nesting(execution, origin, args, depth + 1)
            return
        handler = CALLS.get((pallet, function))
        if handler is None:
            raise CallFiltered
        handler(execution, origin, **args)


@contextmanager
def _sums_that_fit() -> Iterator[None]:
    """What leads to a number out of range fails as the chain's own arithmetic does."""
    try:
        yield
    except DoesNotFit as error:
        raise ArithmeticFailure from error


def _sudo(execution: Execution, origin: Origin, args: dict[str, Any], depth: int) -> None:
    """Carries out a call as the root. Its failure is an event, not an error of this call."""
    require(origin.signed() == execution.state.get("Sudo.Key"), "RequireSudo", "Sudo")
    result: dict[str, object] = {"Ok": ()}
    try:
        carry_out(execution, ROOT, args["call"], depth)
    except DispatchError as error:
        result = {"Err": execution.encode_error(error)}
    execution.emit("Sudid", pallet="Sudo", sudo_result=result)


def _batch_all(execution: Execution, origin: Origin, args: dict[str, Any], depth: int) -> None:
    """All calls or none."""
    require(len(args["calls"]) <= BATCH_MAX, "TooManyCalls", "Utility")
    for call in args["calls"]:
        carry_out(execution, origin, call, depth)
        execution.emit("ItemCompleted", pallet="Utility")
    execution.emit("BatchCompleted", pallet="Utility")


def _batch(execution: Execution, origin: Origin, args: dict[str, Any], depth: int) -> None:
    """Calls up to the first that fails."""
    require(len(args["calls"]) <= BATCH_MAX, "TooManyCalls", "Utility")
    for index, call in enumerate(args["calls"]):
        try:
            carry_out(execution, origin, call, depth)
        except DispatchError as error:
            execution.emit("BatchInterrupted", pallet="Utility", index=index, error=execution.encode_error(error))
            return
        execution.emit("ItemCompleted", pallet="Utility")
    execution.emit("BatchCompleted", pallet="Utility")


def _force_batch(execution: Execution, origin: Origin, args: dict[str, Any], depth: int) -> None:
    """All calls that don't fail."""
    require(len(args["calls"]) <= BATCH_MAX, "TooManyCalls", "Utility")
    failed = False
    for call in args["calls"]:
        try:
            carry_out(execution, origin, call, depth)
        except DispatchError as error:
            failed = True
            execution.emit("ItemFailed", pallet="Utility", error=execution.encode_error(error))
        else:
            execution.emit("ItemCompleted", pallet="Utility")
    execution.emit("BatchCompletedWithErrors" if failed else "BatchCompleted", pallet="Utility")


_NESTING = {
    ("Sudo", "sudo"): _sudo,
    ("Sudo", "sudo_unchecked_weight"): _sudo,
    ("Utility", "batch"): _batch,
    ("Utility", "batch_all"): _batch_all,
    ("Utility", "force_batch"): _force_batch,
}
