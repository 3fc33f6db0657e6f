"""The stages in numbers: parameters, work per microbatch, and how long and how large transfers may be.

Pure; computed once from the RunSpec. Every deadline of a phase comes from here: bytes to move ÷ the slowest bandwidth
that is still waited for, plus a grace. Nothing here depends on what a miner says.
"""

from dataclasses import dataclass

from orion.common.config import RunSpec
from orion.common.ledger.work import microbatch_flops
from orion.common.model.sizes import stage_size

_ENCODED_BYTES_PER_PARAM = {"none": 4.0, "bf16": 2.0, "int8": 1.0 + 4.0 / 256}
"""Of a pseudo-gradient by codec; int8 has one fp32 scale per 256 values."""
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
    encoded_bytes_per_param: float
    grace_s: float
    bandwidth_bytes_per_s: float

    @property
    def upload_s(self) -> float:
        """Time for writing a whole pseudo-gradient."""
        return self._transfer_s(self.num_params * self.encoded_bytes_per_param)

    def reduce_s(self, num_contributions: int, num_reducers: int) -> float:
        """Time for fetching one's partitions of every contribution and writing their means."""
        share = min(1.0, _REDUCERS_PER_PARTITION / num_reducers + 1 / self.num_partitions)
        bytes_per_param = num_contributions * self.encoded_bytes_per_param + _MEAN_BYTES_PER_PARAM
        return self._transfer_s(self.num_params * share * bytes_per_param)

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
        return _BODY_SLACK_BYTES + int(self._partition_params * self.encoded_bytes_per_param)

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


def stage_figures(spec: RunSpec) -> tuple[StageFigures, ...]:
    """The figures of every stage of a run."""
    limits = spec.time_limits
    figures: list[StageFigures] = []
    for layout, flops in zip(spec.layouts, microbatch_flops(spec), strict=True):
        figures.append(
            StageFigures(
                num_params=stage_size(spec.model, layout),
                microbatch_flops=flops,
                num_partitions=spec.num_partitions,
                encoded_bytes_per_param=_ENCODED_BYTES_PER_PARAM[spec.codec],
                grace_s=limits.transfer_grace_s,
                bandwidth_bytes_per_s=limits.bandwidth_floor_bytes_per_s,
            )
        )
    return tuple(figures)
