"""What one microbatch is worth at each stage. Pure; follows from the run's specification alone."""

from orion.common.config import RunSpec
from orion.common.model.flops import forward_flops_per_token

_BACKWARD_TIMES = 2
"""Work of a backward ÷ that of a forward."""


def microbatch_flops(spec: RunSpec) -> tuple[float, ...]:
    """FLOPs of forward and backward of one microbatch, by stage."""
    sequence_length = spec.data.sequence_length
    return tuple(
        float((1 + _BACKWARD_TIMES) * forward_flops_per_token(spec.model, layout, sequence_length))
        * spec.tokens_per_microbatch
        for layout in spec.layouts
    )
