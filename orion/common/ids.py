"""The identities that everything else refers to. Plain types, so that they cost nothing on the wire or in a dict."""

from enum import StrEnum
from typing import NewType

Hotkey = NewType("Hotkey", str)
"""ss58 address of an sr25519 key: who somebody is, and the key of all state about them."""

MicrobatchId = NewType("MicrobatchId", int)
"""One trip of one microbatch through the pipeline; never used twice: data that is leased again gets a new one."""

DataId = NewType("DataId", int)
"""Names the tokens of a microbatch: they are a pure function of (run seed, data id)."""

Digest = NewType("Digest", str)
"""blake3 in lower-case hex, 64 characters."""

PROTOCOL_VERSION = 1
"""Raised when a message changes its meaning; both sides of a request must have the same."""


SPEC_VERSION = 1
"""The version key that chain weights are set with. Raised when weights come to mean something else; the subnet's owner
then raises the lowest key that the chain takes, and validators that have not updated are refused."""


class Direction(StrEnum):
    """Which way a tensor crosses a stage boundary."""

    ACTIVATION = "activation"
    GRADIENT = "gradient"


class Phase(StrEnum):
    """State of a stage's outer step; `DONE` after the run's last one."""

    TRAIN = "train"
    UPLOAD = "upload"
    MERGE = "merge"
    DONE = "done"


class MemberState(StrEnum):
    """Where a miner stands in its membership of a stage."""

    JOINING = "joining"
    """Assigned to a stage, fetching its anchor; takes no work."""
    READY = "ready"
    """Holds the anchor of the outer step that is under way; takes work from the next one on."""
    ACTIVE = "active"
    GONE = "gone"


class Outcome(StrEnum):
    """How a microbatch's trip ended."""

    APPLIED = "applied"
    CANCELLED = "cancelled"


class Subject(StrEnum):
    """What a validator's check looked at."""

    LOG = "log"
    """A prefix of a miner's log of an outer step."""
    WHOLE = "whole"
    """The whole log, and the pseudo-gradient that follows from it."""
    REDUCTION = "reduction"
    """Means of partitions that the miner reduced."""


class Operation(StrEnum):
    """What a miner's device did, as its log lists it."""

    FORWARD = "forward"
    BACKWARD = "backward"
    INNER_STEP = "inner_step"
    BEGIN_ANEW = "begin_anew"
    """The anchor was loaded again: what was done on it before in this outer step counts as work, and no further."""
    BEGIN_AHEAD = "begin_ahead"
    """Overlapped runs: the outer step was begun where the anchor before it leads with the miner's own upload alone."""
    TAKE_MERGED = "take_merged"
    """Overlapped runs: the anchor of the outer step came, and what it differs by from that beginning was added."""
    ENCODE = "encode"
    """In no log: names, as evidence, what the run's codec has lost of a miner's uploads up to an outer step."""
