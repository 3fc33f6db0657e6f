"""Llama under its Hugging Face names: configuration and parameter names, both ways.

Owns the translation; reads and writes no files. Invariant: a configuration whose arithmetic this package does not have
(biases, other activations, other rotary scalings) is refused by name, never approximated.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from orion.common.errors import DataError
from orion.common.model.config import ModelConfig, RopeScaling

_BLOCK_PARTS = {
    "attention_norm": "input_layernorm",
    "attention.q": "self_attn.q_proj",
    "attention.k": "self_attn.k_proj",
    "attention.v": "self_attn.v_proj",
    "attention.o": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn.gate": "mlp.gate_proj",
    "ffn.up": "mlp.up_proj",
    "ffn.down": "mlp.down_proj",
}
_ENDS = {
    "embedding.weight": "model.embed_tokens.weight",
    "norm.weight": "model.norm.weight",
    "head.weight": "lm_head.weight",
}
_BLOCK_NAME = re.compile(r"blocks\.(\d+)\.(.+)\.weight")


def hf_name(name: str) -> str:
    """The Hugging Face name of a parameter. The parameters of a boundary have none."""
    if name in _ENDS:
        return _ENDS[name]
    match = _BLOCK_NAME.fullmatch(name)
    assert match is not None, f"{name} has no Hugging Face name"
    return f"model.layers.{match[1]}.{_BLOCK_PARTS[match[2]]}.weight"


class _LlamaFields(BaseModel):
    """What `config.json` says of the arithmetic; the many other keys of that file do not concern it."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    model_type: Literal["llama"]
    vocab_size: int
    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int | None = None
    head_dim: int | None = None
    intermediate_size: int
    max_position_embeddings: int
    rms_norm_eps: float
    hidden_act: Literal["silu"] = "silu"
    attention_bias: Literal[False] = False
    mlp_bias: Literal[False] = False
    tie_word_embeddings: bool = False
    rope_theta: float = 10_000.0
    rope_scaling: dict[str, Any] | None = None
    rope_parameters: dict[str, Any] | None = None
    """Newer files keep base and scaling together here."""


def config_from_hf(fields: Mapping[str, Any], name: str) -> ModelConfig:
    """The model, without boundaries, that a Llama `config.json` describes. Raises DataError for anything else."""
    try:
        llama = _LlamaFields.model_validate(fields)
        rope = llama.rope_parameters or llama.rope_scaling or {}
        return ModelConfig.model_validate(
            {
                "name": name,
                "vocab_size": llama.vocab_size,
                "width": llama.hidden_size,
                "num_blocks": llama.num_hidden_layers,
                "num_heads": llama.num_attention_heads,
                "num_kv_heads": llama.num_key_value_heads or llama.num_attention_heads,
                "head_dim": llama.head_dim or llama.hidden_size // llama.num_attention_heads,
                "ffn_width": llama.intermediate_size,
                "context_length": llama.max_position_embeddings,
                "rope_theta": rope.get("rope_theta", llama.rope_theta),
                "rope_scaling": _scaling_from_hf(rope),
                "norm_eps": llama.rms_norm_eps,
                "tie_embeddings": llama.tie_word_embeddings,
                "boundary": {"kind": "none"},
            }
        )
    except ValidationError as error:
        raise DataError(f"{name}: not a Llama this package can compute: {error}") from error


def _scaling_from_hf(rope: Mapping[str, Any]) -> RopeScaling | None:
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind == "default":
        return None
    if kind != "llama3":
        raise DataError(f"rotary scaling {kind!r} is not supported; only 'llama3' and none are")
    return RopeScaling.model_validate(
        {
            "factor": rope.get("factor"),
            "low_freq_factor": rope.get("low_freq_factor"),
            "high_freq_factor": rope.get("high_freq_factor"),
            "original_context_length": rope.get("original_max_position_embeddings"),
        }
    )


def config_to_hf(config: ModelConfig, dtype: str, eos_ids: Sequence[int]) -> dict[str, Any]:
    """The `config.json` of a model without boundaries; `dtype` is torch's name, such as "float32"."""
    rope: dict[str, Any] = {"rope_type": "default"}
    if config.rope_scaling is not None:
        rope = {
            "rope_type": "llama3",
            "factor": config.rope_scaling.factor,
            "low_freq_factor": config.rope_scaling.low_freq_factor,
            "high_freq_factor": config.rope_scaling.high_freq_factor,
            "original_max_position_embeddings": config.rope_scaling.original_context_length,
        }
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": config.vocab_size,
        "hidden_size": config.width,
        "num_hidden_layers": config.num_blocks,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "intermediate_size": config.ffn_width,
        "max_position_embeddings": config.context_length,
        "rms_norm_eps": config.norm_eps,
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": config.tie_embeddings,
        # Readers of both generations of this file find base and scaling where they look for them.
        "rope_theta": config.rope_theta,
        "rope_scaling": None if config.rope_scaling is None else rope,
        "rope_parameters": {**rope, "rope_theta": config.rope_theta},
        # Said although empty: a reader's own defaults would stop at token 2.
        "bos_token_id": None,
        "eos_token_id": list(eos_ids) or None,
        "pad_token_id": None,
        "dtype": dtype,
    }
