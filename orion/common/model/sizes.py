"""How many parameters a stage has, from its shape alone.

Pure arithmetic, no torch: the orchestrator computes deadlines and bounds from it without loading a tensor library.
Agrees with `params.stage_num_params`, which counts them on the module itself; a test holds the two together.
"""

from orion.common.model.config import ModelConfig
from orion.common.model.splits import StageLayout


def stage_size(config: ModelConfig, layout: StageLayout) -> int:
    """Parameters of one stage, its halves of the boundaries included."""
    norms = 2 * config.width
    size = layout.num_blocks * (config.block_matrix_size + norms)
    size += config.head_size if layout.is_first else _receiver_size(config)
    if not layout.is_last:
        return size + boundary_sender_size(config)
    return size + config.width + (0 if config.tie_embeddings else config.head_size)


def boundary_sender_size(config: ModelConfig) -> int:
    """Parameters of a boundary's sending half; the mirror image of the receiving half's map."""
    boundary = config.boundary
    if boundary.kind in ("none", "subspace"):
        return 0
    if boundary.kind in ("resbm", "anchored") and boundary.maps == "mlp":
        return config.boundary_mlp_width * (config.width + config.boundary_width)
    return config.width * config.boundary_width


def boundary_maps_size(config: ModelConfig, layout: StageLayout) -> int:
    """Parameters in the learned maps of a stage's halves of its boundaries, token tables left out."""
    return ((not layout.is_first) + (not layout.is_last)) * boundary_sender_size(config)


def _receiver_size(config: ModelConfig) -> int:
    """Parameters of a boundary's receiving half."""
    rank = config.boundary.anchor_rank
    if config.boundary.kind != "anchored":
        anchor = 0
    elif rank is None:
        anchor = config.vocab_size * config.width
    else:
        anchor = rank * (config.vocab_size + config.width)
    return boundary_sender_size(config) + anchor
