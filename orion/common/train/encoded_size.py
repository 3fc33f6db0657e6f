"""What a stage's encoded pseudo-gradient takes on the network, from the run's specification alone.

Pure arithmetic, no torch: the orchestrator computes deadlines and bounds from it. A test holds it to what codecs make.
"""

from orion.common.config import RunSpec
from orion.common.model.sizes import boundary_maps_size
from orion.common.model.splits import StageLayout

_BYTES_PER_PARAM = {"none": 4.0, "bf16": 2.0, "int8": 1.0 + 4.0 / 256, "topk": 116.0 / 4096}
"""By codec; int8 has one fp32 scale per 256 values, top-k 116 bytes for each 4,096."""


def encoded_bytes(spec: RunSpec, layout: StageLayout, num_params: int) -> int:
    """Of `num_params` parameters of a stage, all its boundary maps among them, or as many as there are: headers, and
    what rounding up to whole blocks adds in each partition, left out."""
    dense_codec = spec.codec if spec.codec_boundaries is None else spec.codec_boundaries
    num_dense = min(num_params, boundary_maps_size(spec.model, layout))
    rest = (num_params - num_dense) * _BYTES_PER_PARAM[spec.codec]
    return int(rest + num_dense * _BYTES_PER_PARAM[dense_codec])
