"""What a call is carried out with: its origin, the state, its events, and the errors it may end with.

Owns the vocabulary that the calls under `orion/devnet/calls` share, and how errors and events are encoded. Must not
know any single call. Invariant: a call that raises leaves neither state nor events behind.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from orion.devnet.config import DevnetConfig
from orion.devnet.metadata import PALLET
from orion.devnet.state import State


class DispatchError(Exception):
    """A call failed; its extrinsic is in the block all the same. Carries the name that the chain reports."""

    def __init__(self, name: str, pallet: str = PALLET) -> None:
        super().__init__(f"{pallet}.{name}")
        self.name = name
        self.pallet = pallet


class BadOrigin(DispatchError):
    """The signer may not make this call."""

    def __init__(self) -> None:
        super().__init__("BadOrigin", "")


class TokenError(DispatchError):
    """A balance doesn't allow it: `FundsUnavailable`, `BelowMinimum`, `NotExpendable`."""

    def __init__(self, name: str) -> None:
        super().__init__(name, "Token")


class ArithmeticFailure(DispatchError):
    """A sum would not fit what the chain keeps it in."""

    def __init__(self) -> None:
        super().__init__("Overflow", "Arithmetic")


class CallFiltered(DispatchError):
    """The development chain doesn't carry out this call; the real chain uses the same name for calls it filters."""

    def __init__(self) -> None:
        super().__init__("CallFiltered", "System")


def require(condition: bool, name: str, pallet: str = PALLET) -> None:
    """Raises the pallet's error `name` unless the condition holds."""
    if not condition:
        raise DispatchError(name, pallet)


@dataclass(frozen=True)
class Origin:
    """Who makes a call."""

    signer: str | None
    """The account that signed; None for the root."""

    @property
    def is_root(self) -> bool:
        return self.signer is None

    def signed(self) -> str:
        """The signer. Raises BadOrigin for the root."""
        if self.signer is None:
            raise BadOrigin
        return self.signer

    def require_root(self) -> None:
        if self.signer is not None:
            raise BadOrigin


ROOT = Origin(None)


def argument_bytes(value: str) -> bytes:
    """A call's bytes, which the decoder hands over as text where they are text, else in hexadecimal."""
    return bytes.fromhex(value[2:]) if value.startswith("0x") else value.encode()


Call = Mapping[str, Any]
"""A decoded call: `call_module`, `call_function`, `call_args` with `name` and `value`."""


class Execution:
    """One block being executed: what a call sees, and where it leaves its traces."""

    def __init__(self, state: State, block: int, config: DevnetConfig) -> None:
        self.state = state
        self.block = block
        """The number of the block that is being built."""
        self.config = config
        self.events: list[dict[str, object]] = []
        self.sealed: list[bytes] = []
        """Extrinsics that calls brought along sealed; the chain takes them out."""
        self._phase: object = {"Initialization": None}

    def enter(self, phase: object) -> None:
        """What happens from here on belongs to `phase`, an extrinsic's or the block's own."""
        self._phase = phase

    def emit(self, name: str, *attributes: object, pallet: str = PALLET, **named: object) -> None:
        """Leaves an event with the attributes that the metadata has for it: by position, or all by name."""
        value: object = named or attributes
        if len(attributes) == 1:
            value = attributes[0]
        self.events.append({"phase": self._phase, "event": {pallet: {name: value}}, "topics": []})

    def encode_error(self, error: DispatchError) -> object:
        """The error as the chain reports it in events."""
        if isinstance(error, BadOrigin):
            return {"BadOrigin": None}
        if isinstance(error, TokenError | ArithmeticFailure):
            return {error.pallet: error.name}
        return self.state.runtime.module_error(error.pallet, error.name)

    @contextmanager
    def transaction(self) -> Iterator[None]:
        """What happens inside leaves no trace when it raises."""
        num_events, num_sealed = len(self.events), len(self.sealed)
        try:
            with self.state.transaction():
                yield
        except BaseException:
            del self.events[num_events:]
            del self.sealed[num_sealed:]
            raise


Handler = Callable[..., None]
"""Takes the execution, the origin and the call's arguments by name; raises DispatchError."""

Dispatcher = Callable[[Execution, Origin, Call], None]
"""Carries out any call; raises DispatchError."""
