"""The loss of every applied microbatch, in order of arrival, 28 bytes each. Pure."""

from array import array
from dataclasses import dataclass, field

from orion.common.ids import MicrobatchId
from orion.common.protocol.records import LossPoint

LOSSES_MAX = 4_000_000
"""Points kept (112 MB); beyond, the oldest quarter is dropped. 150 outer steps of 48 large GPUs make a million."""


@dataclass(slots=True)
class LossHistory:
    """Columns of the newest points; `num_dropped` points came before them."""

    num_dropped: int = 0
    microbatch_ids: "array[int]" = field(default_factory=lambda: array("q"))
    outer_steps: "array[int]" = field(default_factory=lambda: array("i"))
    losses: "array[float]" = field(default_factory=lambda: array("d"))
    times_s: "array[float]" = field(default_factory=lambda: array("d"))

    @property
    def total(self) -> int:
        """Points ever added."""
        return self.num_dropped + len(self.losses)

    def add(self, point: LossPoint) -> None:
        self.microbatch_ids.append(point.microbatch_id)
        self.outer_steps.append(point.outer_step)
        self.losses.append(point.loss)
        self.times_s.append(point.time_s)
        if len(self.losses) > LOSSES_MAX:
            num_old = LOSSES_MAX // 4
            for column in (self.microbatch_ids, self.outer_steps, self.losses, self.times_s):
                del column[:num_old]
            self.num_dropped += num_old

    def points(self, offset: int, num_max: int) -> tuple[LossPoint, ...]:
        """Points from the one numbered `offset` on (from the oldest kept, if that is newer), at most `num_max`."""
        start = max(0, offset - self.num_dropped)
        return tuple(
            LossPoint(
                microbatch_id=MicrobatchId(self.microbatch_ids[index]),
                outer_step=self.outer_steps[index],
                loss=self.losses[index],
                time_s=self.times_s[index],
            )
            for index in range(start, min(start + num_max, len(self.losses)))
        )
