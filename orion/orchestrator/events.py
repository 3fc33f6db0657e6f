"""What can happen to the orchestrator (events) and what it wants done about it (effects).

Events are pydantic models because the journal keeps them as JSON and a restart replays them; effects never leave the
process and are plain dataclasses. Nothing here decides anything.

Queries (feed, status, losses, ledger, manifests, commitments, grants) are no events: they change nothing, so they are
answered from the core's views and not written to the journal.
"""

from dataclasses import dataclass
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter

from orion.common.ids import Digest
from orion.common.protocol.entries import Proof
from orion.common.protocol.fields import MINERS_MAX, Ss58
from orion.common.protocol.messages import (
    Applied,
    CheckpointUploaded,
    Done,
    Heartbeat,
    Join,
    Joined,
    Lease,
    LeaseRequest,
    Leave,
    ObjectRef,
    Reduced,
    Refusal,
    Report,
    Uploaded,
)
from orion.common.protocol.records import ScoreSheet, Verdict

Request = Annotated[
    Join
    | Heartbeat
    | Leave
    | LeaseRequest
    | Report
    | Uploaded
    | Reduced
    | Applied
    | CheckpointUploaded
    | Verdict
    | ScoreSheet,
    Field(discriminator="kind"),
]
"""A signed message that may change the run's state."""

Response = Joined | Lease | Done
"""What a request that was not refused is answered with."""


class _Event(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


class RequestArrived(_Event):
    """A message whose signature holds. It ends in exactly one `Answer` or `Refuse` with the same request id."""

    kind: Literal["request_arrived"] = "request_arrived"
    request_id: Annotated[int, Field(ge=0)]
    """Chosen by the shell; it only has to tell apart the requests that wait for an answer at the same time."""
    hotkey: Ss58
    message: Request
    proof: Proof | None = None
    """That the sender said so, of messages that the public ledger keeps; none in the simulator and in tests."""


class ObjectChecked(_Event):
    """The store was asked about an object."""

    kind: Literal["object_checked"] = "object_checked"
    ref: ObjectRef
    durable: bool
    """Whether it lies there, safe, with the size and digest that `ref` names."""


class Neuron(_Event):
    """A hotkey that is registered on the subnet."""

    hotkey: Ss58
    validator_permit: bool


class MetagraphUpdated(_Event):
    """All registered hotkeys, whenever they differ from those told before."""

    kind: Literal["metagraph_updated"] = "metagraph_updated"
    neurons: Annotated[tuple[Neuron, ...], Field(max_length=MINERS_MAX)]


class ConnectionLost(_Event):
    """The connection on which a hotkey waited for the feed broke off, and it waits on no other. It may get lost, as
    nothing else depends on this hint."""

    kind: Literal["connection_lost"] = "connection_lost"
    hotkey: Ss58
    usual_s: Annotated[float, Field(ge=0, le=3600)]
    """The longest it lately took from one answer to its next question."""


class ConnectionSeen(_Event):
    """A hotkey whose connection was lost asks for the feed again."""

    kind: Literal["connection_seen"] = "connection_seen"
    hotkey: Ss58


class Ticked(_Event):
    """Time has passed: deadlines are looked at. Due several times a second."""

    kind: Literal["ticked"] = "ticked"


class Resumed(_Event):
    """The orchestrator is up again. Nobody could reach it since the last event: silence counts from now, deadlines move
    by the time it was away, and every effect that may have been lost is due again."""

    kind: Literal["resumed"] = "resumed"


_AnyEvent = RequestArrived | ObjectChecked | MetagraphUpdated | ConnectionLost | ConnectionSeen | Ticked | Resumed
Event = Annotated[_AnyEvent, Field(discriminator="kind")]

_EVENT: TypeAdapter[_AnyEvent] = TypeAdapter(Event)


def event_to_json(event: Event) -> bytes:
    """The journal's form of an event."""
    return _EVENT.dump_json(event)


def event_from_json(data: bytes) -> Event:
    """The event that `event_to_json` wrote. Raises pydantic.ValidationError for anything else."""
    return _EVENT.validate_json(data)


@dataclass(frozen=True, slots=True)
class Answer:
    """Reply to the request with this message (200)."""

    request_id: int
    message: Response


@dataclass(frozen=True, slots=True)
class Refuse:
    """Reply to the request with a refusal (4xx). It has changed nothing but when its sender was last heard of."""

    request_id: int
    refusal: Refusal


@dataclass(frozen=True, slots=True)
class CheckObject:
    """Look whether the object is durable; ends as `ObjectChecked`. Asked again after a while when no answer came."""

    ref: ObjectRef


@dataclass(frozen=True, slots=True)
class DeleteObjects:
    """Delete every object whose key starts with the prefix. No event follows: nothing names these objects any more."""

    prefix: str


@dataclass(frozen=True, slots=True)
class Announce:
    """The feed has changed: wake whoever waits for a version above the one it knows."""

    version: int


@dataclass(frozen=True, slots=True)
class Recorded:
    """A new entry of the public ledger. A restart gives it again, the same to the last bit."""

    sequence: int
    entry: bytes
    """Its JSON (`orion.common.protocol.entries`)."""
    digest: Digest
    """Of the ledger up to this entry."""


Effect = Answer | Refuse | CheckObject | DeleteObjects | Announce | Recorded
