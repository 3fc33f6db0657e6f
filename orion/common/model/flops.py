"""How much a stage computes, from its shape alone.

Owns the formula behind scores and utilisation figures. Pure arithmetic, no torch: the orchestrator's ledger counts
with it. Norms, activations, rotations and look-ups are not counted; a multiply-add is two floating-point operations.

Formula, per token of a sequence of T tokens: 2 × (values in the matrices the token passes) + 2 × attention width × (T
+ 1) for each block. The second term is attention itself: a token looks at (T + 1) / 2 tokens on average, and each
costs one multiply-add per attention coordinate for its score and one for its value.
"""

from orion.common.model.config import ModelConfig
from orion.common.model.sizes import boundary_sender_size
from orion.common.model.splits import StageLayout


def forward_flops_per_token(config: ModelConfig, layout: StageLayout, sequence_length: int) -> int:
    """Floating-point operations of one stage's forward for one token of a sequence of `sequence_length` tokens.

    Backward costs twice as much, and a stage that recomputes its forward for it pays the forward once more.
    """
    sender, receiver = _boundary_matrix_sizes(config)
    matrices = layout.num_blocks * config.block_matrix_size
    matrices += config.head_size if layout.is_last else sender
    matrices += 0 if layout.is_first else receiver
    attention = layout.num_blocks * 2 * config.attention_width * (sequence_length + 1)
    return 2 * matrices + attention


def _boundary_matrix_sizes(config: ModelConfig) -> tuple[int, int]:
    """Values in the matrices of a boundary's (sender, receiver)."""
    if config.boundary.kind == "subspace":  # the fixed basis is multiplied with, but is no parameter
        return config.width * config.boundary_width, config.width * config.boundary_width
    sender = boundary_sender_size(config)
    rank = config.boundary.anchor_rank if config.boundary.kind == "anchored" else None
    return sender, sender + (0 if rank is None else rank * config.width)
