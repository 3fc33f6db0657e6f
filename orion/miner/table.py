"""The microbatches that a miner holds, and those of this outer step that have ended here.

Owns the records and the rule of ending: an admitted microbatch ends exactly once, and what it held is freed with that.
Must not decide when one ends. Invariants: at most `in_flight_max` are held; an id that has ended in this outer step is
never held again (of the newest `ENDED_MAX`, more than an honest outer step has); gradients that were returned and are
kept aside hold no credit, and are as many as there are credits at most.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field
from enum import StrEnum

from orion.common.ids import DataId, Digest, Hotkey, MicrobatchId, Outcome
from orion.common.protocol.messages import Transfer
from orion.miner.events import BodyRef

ENDED_MAX = 65_536
"""Ends remembered: a bound on what a peer can make us hold by offering nonsense."""


class Stand(StrEnum):
    """Where a microbatch stands on this miner, in the order in which it gets there."""

    RECEIVING = "receiving"
    """The activation's body is being read."""
    FORWARD_QUEUED = "forward_queued"
    FORWARDING = "forwarding"
    SEND_DUE = "send_due"
    """The output waits for a replica of the next stage that takes it."""
    SENDING = "sending"
    AWAITING_GRADIENT = "awaiting_gradient"
    GRADIENT_RECEIVING = "gradient_receiving"
    BACKWARD_QUEUED = "backward_queued"
    BACKWARDING = "backwarding"
    RETURN_DUE = "return_due"
    """The input gradient waits to be sent back."""
    RETURNING = "returning"
    RETURNED = "returned"
    """The stage before has the gradient; it is kept here for a while, lest the miner there be lost with it."""


OPERATING = frozenset({Stand.RECEIVING, Stand.FORWARDING, Stand.GRADIENT_RECEIVING, Stand.BACKWARDING})
"""Something is being read into the cache or computed on: it ends only when that has ended."""

NOT_STARTED = frozenset({Stand.RECEIVING, Stand.FORWARD_QUEUED})
"""Nothing was computed yet."""

WITH_NEXT = frozenset({Stand.SENDING, Stand.AWAITING_GRADIENT, Stand.GRADIENT_RECEIVING})
"""The next hop holds it, or may hold it."""

BETWEEN_PASSES = frozenset(
    {Stand.SEND_DUE, Stand.SENDING, Stand.AWAITING_GRADIENT, Stand.GRADIENT_RECEIVING, Stand.BACKWARD_QUEUED}
)
"""The device holds its graph or its input, with a version of the parameters, for the backward."""

GRADIENT_HELD = frozenset({Stand.BACKWARD_QUEUED, Stand.BACKWARDING, Stand.RETURN_DUE, Stand.RETURNING, Stand.RETURNED})


@dataclass(slots=True)
class Held:
    """One admitted microbatch."""

    microbatch_id: MicrobatchId
    data_id: DataId
    outer_step: int
    path: tuple[Hotkey, ...]
    """The miners before this one, first stage first."""
    deadline_s: float
    stand: Stand
    input_digest: Digest | None
    """Of the activation's body; None on the first stage."""
    request_id: int | None = None
    """The offer whose body is being read."""
    offer: Transfer | None = None
    """With `request_id`."""
    version: int = 0
    """Inner steps that had been taken when it was run forward."""
    output: BodyRef | None = None
    """The activation, later the input gradient, that lies in the cache to be sent."""
    next_hop: Hotkey | None = None
    """The replica of the next stage that it is being sent to or was accepted by."""
    sent_s: float = 0.0
    tried: set[Hotkey] = field(default_factory=set)
    """Replicas of the next stage that will not be asked again."""
    retry_s: float = 0.0
    """Earliest time of the next attempt to send."""
    num_returns: int = 0
    """Attempts to send the gradient back that did not reach anybody."""
    gradient: Transfer | None = None
    """The gradient that was accepted."""
    begun_s: float = 0.0
    """When its forward began."""
    begun_in_flight: int = 0
    """Microbatches between forward and end then, itself included."""
    waiting_s: float = 0.0
    """Since when it stands where it stands now, if that is a queue."""
    waited_s: float = 0.0
    """In all queues, of this stage and (once the gradient told) of those after it."""
    loss: float | None = None
    full_path: tuple[Hotkey, ...] = ()
    """All its miners, once the gradient told."""
    is_applied: bool = False
    """Its gradient was accumulated here."""
    cancelled: str | None = None
    """Why it is to end as soon as the operation under way has ended."""
    is_aside: bool = False
    """It was returned once: only its gradient is kept, and no credit is held for it."""
    orphaned_s: float | None = None
    """Since when the miner before is lost and a replacement is waited for."""
    adopted_digest: Digest | None = None
    """Of the output that the replacement offered; what was computed here came from the lost miner's."""
    is_repaired: bool = False
    """The next hop was lost or not reached, or this miner takes the place of one that was."""
    lost_hop: Hotkey | None = None
    """The next hop that was lost, until it has been told to let go; nothing is sent before."""
    seeking: set[Hotkey] = field(default_factory=set)
    """Members of the stage after the lost one that have not said yet whether they hold the microbatch."""
    seek_until_s: float = 0.0
    is_sought: bool = True
    """They have been asked."""
    continues_at: Hotkey | None = None
    """Who holds what the lost next hop had sent on: its replacement is told."""
    adopter: Hotkey | None = None
    """This miner is a replacement: the replica of the next stage that holds what the lost one had sent it."""

    @property
    def previous_hop(self) -> Hotkey | None:
        return self.path[-1] if self.path else None


@dataclass(frozen=True, slots=True)
class Ended:
    """How a microbatch ended, and enough to know its duplicates by."""

    outcome: Outcome
    sender: Hotkey | None
    input_digest: Digest | None
    gradient_digest: Digest | None


class MicrobatchTable:
    """What is held and what has ended."""

    def __init__(self, in_flight_max: int) -> None:
        self._in_flight_max = in_flight_max
        self._held: dict[MicrobatchId, Held] = {}
        self._ended: dict[MicrobatchId, Ended] = {}
        self._taken_over: dict[MicrobatchId, set[tuple[Hotkey, ...]]] = {}
        self._outer_step = -1
        self.num_applied_total = 0
        """Since the process started."""

    def __len__(self) -> int:
        """Those that hold a credit."""
        return sum(not item.is_aside for item in self._held.values())

    @property
    def room(self) -> int:
        """How many more may be admitted."""
        return self._in_flight_max - len(self)

    def held(self) -> tuple[Held, ...]:
        """All that are held, the oldest first."""
        return tuple(self._held.values())

    @property
    def num_started(self) -> int:
        """How many are past the queue for their forward."""
        return sum(item.stand not in NOT_STARTED for item in self._held.values())

    def standing(self, stand: Stand) -> tuple[Held, ...]:
        """Those that stand there, the oldest first."""
        return tuple(item for item in self._held.values() if item.stand is stand)

    def get(self, microbatch_id: MicrobatchId) -> Held | None:
        return self._held.get(microbatch_id)

    def ended(self, microbatch_id: MicrobatchId) -> Ended | None:
        return self._ended.get(microbatch_id)

    def by_request(self, request_id: int) -> Held | None:
        """The microbatch whose body that request brings."""
        return next((item for item in self._held.values() if item.request_id == request_id), None)

    def admit(self, item: Held) -> None:
        assert self.room > 0, "admitted beyond the credits"
        assert item.microbatch_id not in self._held, f"{item.microbatch_id} is held already"
        assert item.microbatch_id not in self._ended, f"{item.microbatch_id} has ended already"
        self._held[item.microbatch_id] = item

    def set_aside(self, item: Held) -> Held | None:
        """It was returned: it gives its credit back. One that has to end for it, since as many are kept aside as there
        are credits: the oldest that nobody waits for, or the oldest."""
        self.num_applied_total += not item.is_aside
        item.stand, item.is_aside = Stand.RETURNED, True
        aside = [other for other in self._held.values() if other.is_aside]
        if len(aside) <= self._in_flight_max:
            return None
        idle = [other for other in aside if other.stand is Stand.RETURNED and other.orphaned_s is None]
        return (idle or aside)[0]

    def end(self, item: Held) -> Outcome:
        """Takes it out of what is held, for good."""
        del self._held[item.microbatch_id]
        outcome = Outcome.APPLIED if item.is_applied else Outcome.CANCELLED
        self._ended[item.microbatch_id] = Ended(
            outcome=outcome,
            sender=item.previous_hop,
            input_digest=item.input_digest,
            gradient_digest=None if item.gradient is None else item.gradient.digest,
        )
        if len(self._ended) > ENDED_MAX:
            del self._ended[next(iter(self._ended))]
        self.num_applied_total += item.is_applied and not item.is_aside
        return outcome

    def take_over(self, microbatch_id: MicrobatchId, way: tuple[Hotkey, Hotkey]) -> None:
        """The first of these two miners takes the microbatch from the second, which is lost and may come back."""
        self._taken_over.setdefault(microbatch_id, set()).add(way)
        if len(self._taken_over) > ENDED_MAX:
            del self._taken_over[next(iter(self._taken_over))]

    def is_taken_over(self, microbatch_id: MicrobatchId, path: tuple[Hotkey, ...]) -> bool:
        """Whether the last miner of that path has lost the microbatch to another one."""
        return path[-2:] in self._taken_over.get(microbatch_id, ())

    def begin(self, outer_step: int, known: Iterable[MicrobatchId] = ()) -> None:
        """Work for an outer step begins, perhaps anew. Ids of the ones before are refused by their outer step, and need
        not be remembered. `known` have been worked on in this one, by an earlier process perhaps."""
        if outer_step != self._outer_step:
            self._outer_step = outer_step
            self._ended.clear()
            self._taken_over.clear()
        for microbatch_id in known:
            if microbatch_id not in self._held and len(self._ended) < ENDED_MAX:
                self._ended.setdefault(microbatch_id, Ended(Outcome.CANCELLED, None, None, None))

    def check_invariants(self) -> None:
        assert len(self) <= self._in_flight_max, "more microbatches are held than there are credits"
        num_aside = len(self._held) - len(self)
        assert num_aside <= self._in_flight_max, "more gradients are kept aside than there are credits"
        assert not self._held.keys() & self._ended.keys(), "a microbatch is held and has ended"
        for item in self._held.values():
            name = f"microbatch {item.microbatch_id} ({item.stand})"
            reads = item.stand in (Stand.RECEIVING, Stand.GRADIENT_RECEIVING)
            assert reads == (item.request_id is not None), f"{name}: request {item.request_id}"
            sends = item.stand in (Stand.SEND_DUE, Stand.SENDING, Stand.RETURN_DUE, Stand.RETURNING)
            assert not sends or item.output is not None, f"{name} has nothing to send"
            assert item.stand not in WITH_NEXT or item.next_hop is not None, f"{name} has no next hop"
            returns = item.stand in (Stand.RETURN_DUE, Stand.RETURNING, Stand.RETURNED)
            assert not item.is_aside or returns, f"{name} is aside"
            assert item.stand is not Stand.RETURNED or item.is_aside, f"{name} is not aside"
            assert not item.seeking or item.lost_hop is not None, f"{name} seeks for nobody"
            assert item.lost_hop is None or item.stand is Stand.SEND_DUE, f"{name} has lost its next hop"
            assert item.is_applied == returns, f"{name}: applied is {item.is_applied}"
            assert not returns or item.previous_hop is not None, f"{name} has nobody to return to"
            assert item.cancelled is None or item.stand in OPERATING, f"{name} is cancelled and still held"
