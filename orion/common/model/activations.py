"""How many bytes a stage's forward keeps for its backward, from its shape alone.

Owns the formula behind the memory plan. Pure arithmetic, no torch. It is a bound from above of what autograd saves
(parameters not counted, memory that several operations share counted once), and within a tenth of it; a test counts
the saved tensors of every kind of stage and holds the two together. Whoever changes what a layer computes changes it
here too.

Attention is counted as its fused kernels keep it: queries, keys, values, the result and one number a head and token,
not the T × T scores. That is what PyTorch runs for causal attention on CPUs and, in bfloat16, on GPUs.

Letters: N tokens of a microbatch, T tokens of a sequence, D model width, F feed-forward width, C boundary width, V
vocabulary.
"""

from orion.common.model.config import ModelConfig
from orion.common.model.splits import StageLayout

FP32_BYTES = 4
ID_BYTES = 8
"""A token id on the device."""
_ODDS_BYTES = 4096
"""Scalars, random states and the like."""


def graph_bytes(
    config: ModelConfig, layout: StageLayout, *, sequence_length: int, sequences: int, value_bytes: int
) -> int:
    """Bytes that the graph of one microbatch of `sequences` × `sequence_length` tokens keeps alive on the device.

    `value_bytes` is the size of a value in the compute dtype: 4 or 2. On the last stage the loss is part of it.
    """
    tokens = sequences * sequence_length
    size = layout.num_blocks * _block_bytes(config, tokens, sequence_length, value_bytes)
    if layout.is_first:
        size += tokens * (ID_BYTES + (config.width * value_bytes if config.boundary.kind == "subspace" else 0))
    else:
        size += _receiver_bytes(config, tokens, value_bytes)
    if layout.is_last:
        size += _norm_bytes(config.width, tokens) + tokens * config.width * value_bytes
        # The softmax in fp32, and what the loss is gathered by.
        size += tokens * (config.vocab_size * FP32_BYTES + ID_BYTES)
    else:
        size += _sender_bytes(config, tokens, value_bytes)
    return size + _ODDS_BYTES


def _block_bytes(config: ModelConfig, tokens: int, sequence_length: int, value_bytes: int) -> int:
    heads = (2 * config.attention_width + 2 * config.kv_width) * value_bytes + config.num_heads * FP32_BYTES
    ffn = 4 * config.ffn_width * value_bytes
    """Gate, its activation, up, and their product."""
    norms = 2 * (_norm_bytes(config.width, tokens) + tokens * config.width * value_bytes)
    rotary = 4 * sequence_length * config.head_dim // 2 * FP32_BYTES
    return norms + tokens * (heads + ffn) + rotary


def _norm_bytes(width: int, tokens: int) -> int:
    """The input and the normalised input in fp32, and the root mean square of each token."""
    return tokens * (2 * width + 1) * FP32_BYTES


def _unit_rms_bytes(width: int, tokens: int) -> int:
    """As a norm without learned scales: the normalised input is not needed again."""
    return tokens * (width + 1) * FP32_BYTES


def _map_bytes(config: ModelConfig, inputs: int, tokens: int, value_bytes: int) -> int:
    """A learned map of a boundary: its input, and the hidden values of an MLP before and after their activation."""
    hidden = 2 * config.boundary_mlp_width if config.boundary.maps == "mlp" else 0
    return tokens * (inputs + hidden) * value_bytes


def _sender_bytes(config: ModelConfig, tokens: int, value_bytes: int) -> int:
    width = config.width
    match config.boundary.kind:
        case "anchored" | "resbm" if config.boundary.maps == "linear":
            # The block's output, the encoded one before it is divided, and by what.
            return tokens * ((width + config.boundary_width) * value_bytes + FP32_BYTES)
        case "anchored" | "resbm":
            return _unit_rms_bytes(width, tokens) + _map_bytes(config, width, tokens, value_bytes)
        case "linear":
            return tokens * width * value_bytes
        case "iota":
            return 2 * tokens * width * value_bytes
        case "subspace":
            return width * config.boundary_width * value_bytes
        case "none":
            return 0


def _receiver_bytes(config: ModelConfig, tokens: int, value_bytes: int) -> int:
    boundary_width, width = config.boundary_width, config.width
    rank = config.boundary.anchor_rank
    z_bytes = tokens * boundary_width * value_bytes
    match config.boundary.kind:
        case "anchored" | "resbm":
            size = _unit_rms_bytes(boundary_width, tokens) + _map_bytes(config, boundary_width, tokens, value_bytes)
            if config.boundary.maps == "linear":
                # Beside its unit form the narrow tensor itself, and identity and map as one matrix.
                size += z_bytes + 2 * boundary_width * width * value_bytes
            if config.boundary.kind == "anchored":
                size += tokens * (ID_BYTES + (0 if rank is None else rank * value_bytes))
            return z_bytes + size
        case "linear":
            return z_bytes
        case "iota":
            return z_bytes + tokens * width * value_bytes
        case "subspace":
            return z_bytes + width * boundary_width * value_bytes
        case "none":
            return z_bytes
