"""Tensors of the microbatches that a miner holds, between the network and the device.

Owns the bodies that came in and those that are to go out, each with its tensors as views of the same memory. Shared by
the event loop's thread and the device's, hence the lock; nobody waits long for it. Bounded by the core's credits: it is
a mistake of ours to put in more. Everything of a microbatch is freed at once.
"""

import threading
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum

from torch import Tensor

from orion.common.ids import Direction, MicrobatchId
from orion.common.protocol.codec import Body


class Slot(StrEnum):
    """What a tensor is to its microbatch on this miner."""

    ACTIVATION_IN = "activation_in"
    ACTIVATION_OUT = "activation_out"
    GRADIENT_IN = "gradient_in"
    GRADIENT_OUT = "gradient_out"


INCOMING = {Direction.ACTIVATION: Slot.ACTIVATION_IN, Direction.GRADIENT: Slot.GRADIENT_IN}
OUTGOING = {Direction.ACTIVATION: Slot.ACTIVATION_OUT, Direction.GRADIENT: Slot.GRADIENT_OUT}


@dataclass(frozen=True, slots=True, eq=False)
class Parcel:
    """Tensors and their encoded form, which alias each other."""

    tensors: Mapping[str, Tensor]
    body: Body


def cached_max(in_flight_max: int) -> int:
    """Microbatches that hold tensors at most: those with a credit, and as many gradients that were returned."""
    return 2 * in_flight_max


class TensorCache:
    """Parcels by microbatch and slot."""

    def __init__(self, microbatches_max: int) -> None:
        self._microbatches_max = microbatches_max
        self._parcels: dict[MicrobatchId, dict[Slot, Parcel]] = {}
        self._lock = threading.Lock()

    def put(self, microbatch_id: MicrobatchId, slot: Slot, parcel: Parcel) -> None:
        """Keeps a parcel until its microbatch is freed. One that lies there already is replaced."""
        with self._lock:
            parcels = self._parcels.setdefault(microbatch_id, {})
            parcels[slot] = parcel
            assert len(self._parcels) <= self._microbatches_max, "more microbatches hold tensors than there are credits"

    def get(self, microbatch_id: MicrobatchId, slot: Slot) -> Parcel | None:
        """The parcel, None when it is not (or no longer) there."""
        with self._lock:
            return self._parcels.get(microbatch_id, {}).get(slot)

    def free_all_but(self, microbatch_id: MicrobatchId, slot: Slot) -> None:
        """Lets go of everything of a microbatch but that."""
        with self._lock:
            parcels = self._parcels.get(microbatch_id)
            if parcels is not None:
                self._parcels[microbatch_id] = {kept: parcel for kept, parcel in parcels.items() if kept is slot}

    def free(self, microbatch_id: MicrobatchId) -> None:
        """Lets go of everything of a microbatch; it may hold nothing."""
        with self._lock:
            self._parcels.pop(microbatch_id, None)

    @property
    def num_microbatches(self) -> int:
        """How many hold anything."""
        with self._lock:
            return len(self._parcels)

    @property
    def size_bytes(self) -> int:
        """Of all bodies."""
        with self._lock:
            return sum(parcel.body.size_bytes for parcels in self._parcels.values() for parcel in parcels.values())
