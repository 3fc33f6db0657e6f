"""What the link between a peer and the network is like. Owns the figures, does nothing."""

from dataclasses import asdict, dataclass
from enum import StrEnum
from typing import Any


class Way(StrEnum):
    """A direction of a link, as its peer sees it."""

    OUT = "out"
    IN = "in"
    BOTH = "both"


@dataclass(frozen=True, slots=True)
class LinkProfile:
    """One peer's link. Two peers of one profile see a round trip of twice `delay_ms`, and what the machine adds."""

    upload_mbit: float | None = None
    """Megabits a second that the peer can send; None = as many as the machine moves."""
    download_mbit: float | None = None
    """Megabits a second that the peer can receive."""
    delay_ms: float = 0.0
    """From the peer to any other, one way."""
    jitter_ms: float = 0.0
    """Most that is added to the delay of a frame, drawn anew for each; frames of one pair of peers stay in order."""
    stall_every_s: float | None = None
    """Mean time between two stalls of what the peer sends, exponentially distributed; None = never."""
    stall_ms: float = 0.0
    """Length of a stall, in which nothing arrives and after which everything does: what a burst of loss looks like to
    who waits for a retransmission."""

    def __post_init__(self) -> None:
        """Raises ValueError for what no link can be."""
        for rate in (self.upload_mbit, self.download_mbit, self.stall_every_s):
            if rate is not None and not 0 < rate < float("inf"):
                raise ValueError(f"{rate} is no positive number: {self}")
        for time_ms in (self.delay_ms, self.jitter_ms, self.stall_ms):
            if not 0 <= time_ms <= 60_000:
                raise ValueError(f"{time_ms} ms is not between 0 and a minute: {self}")

    @property
    def needs_switch(self) -> bool:
        """Whether it has what only the switch in user space can do: the kernel limits and cuts by itself."""
        return bool(self.delay_ms or self.jitter_ms or self.stall_every_s)

    def as_json(self) -> dict[str, Any]:
        """The arguments that make it again."""
        return asdict(self)
