"""The stages in numbers: parameters, work per microbatch, and how long and how large transfers may be.

Pure; computed once from the RunSpec. Every deadline of a phase comes from here: bytes to move ÷ the slowest bandwidth
that is still waited for, plus a grace. What a miner says of its own link can only make it be waited for less long.
"""

from dataclasses import dataclass

from orion.common.config import RunSpec
from orion.common.ledger.work import microbatch_flops
from orion.common.model.sizes import stage_size
from orion.common.train.encoded_size import encoded_bytes

_MEAN_BYTES_PER_PARAM = 4
_CHECKPOINT_BYTES_PER_PARAM = 8
"""fp32 anchor and fp32 outer momentum."""
_BODY_SLACK_BYTES = 64 * 1024
"""Header of a tensor body and rounding of a codec."""
_REDUCERS_PER_PARTITION = 2


@dataclass(frozen=True, slots=True)
class StageFigures:
    """One stage's sizes, and the time and bytes that its part of an outer step may take."""

    num_params: int
    microbatch_flops: float
    """Forward and backward of one microbatch."""
    num_partitions: int
    encoded_bytes: int
    """Of a whole encoded pseudo-gradient."""
    encoded_slice_bytes_max: int
    """Of the partition of it that takes the most."""
    grace_s: float
    bandwidth_bytes_per_s: float

    @property
    def upload_s(self) -> float:
        """Time for writing a whole pseudo-gradient over the slowest link."""
        return self.upload_s_at(None)

    def upload_s_at(self, upload_bytes_per_s: float | None) -> float:
        """The same for who has been seen to write that fast lately; None: not known."""
        return self.grace_s + self._moving_s(self.encoded_bytes, upload_bytes_per_s)

    def reduce_s(
        self,
        num_contributions: int,
        num_reducers: int,
        upload_bytes_per_s: float | None = None,
        download_bytes_per_s: float | None = None,
    ) -> float:
        """Time for fetching one's partitions of every contribution and writing their means, at such rates; None: over
        the slowest link."""
        share = min(1.0, _REDUCERS_PER_PARTITION / num_reducers + 1 / self.num_partitions)
        num_params = self.num_params * share
        fetching_s = self._moving_s(share * num_contributions * self.encoded_bytes, download_bytes_per_s)
        return self.grace_s + fetching_s + self._moving_s(num_params * _MEAN_BYTES_PER_PARAM, upload_bytes_per_s)

    @property
    def apply_s(self) -> float:
        """Time for fetching all means."""
        return self._transfer_s(self.num_params * _MEAN_BYTES_PER_PARAM)

    @property
    def checkpoint_s(self) -> float:
        """Time for writing a whole anchor with its momentum."""
        return self._transfer_s(self.num_params * _CHECKPOINT_BYTES_PER_PARAM)

    @property
    def contribution_bytes_max(self) -> int:
        """Largest object of one partition's pseudo-gradient."""
        return _BODY_SLACK_BYTES + self.encoded_slice_bytes_max

    @property
    def mean_bytes_max(self) -> int:
        """Largest object of one partition's mean."""
        return _BODY_SLACK_BYTES + self._partition_params * _MEAN_BYTES_PER_PARAM

    @property
    def checkpoint_bytes_max(self) -> int:
        """Largest checkpoint object."""
        return _BODY_SLACK_BYTES + self.num_params * _CHECKPOINT_BYTES_PER_PARAM

    @property
    def _partition_params(self) -> int:
        return -(-self.num_params // self.num_partitions)

    def _transfer_s(self, size_bytes: float) -> float:
        return self.grace_s + size_bytes / self.bandwidth_bytes_per_s

    def _moving_s(self, size_bytes: float, bytes_per_s: float | None) -> float:
        return size_bytes / max(self.bandwidth_bytes_per_s, bytes_per_s or 0.0)


def stage_figures(spec: RunSpec) -> tuple[StageFigures, ...]:
    """The figures of every stage of a run."""
    limits = spec.time_limits
    figures: list[StageFigures] = []
    for layout, flops in zip(spec.layouts, microbatch_flops(spec), strict=True):
        num_params = stage_size(spec.model, layout)
        figures.append(
            StageFigures(
                num_params=num_params,
                microbatch_flops=flops,
                num_partitions=spec.num_partitions,
                encoded_bytes=encoded_bytes(spec, layout, num_params),
                encoded_slice_bytes_max=encoded_bytes(spec, layout, -(-num_params // spec.num_partitions)),
                grace_s=limits.transfer_grace_s,
                bandwidth_bytes_per_s=limits.bandwidth_floor_bytes_per_s,
            )
        )
    return tuple(figures)
