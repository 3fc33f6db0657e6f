"""Text from a model, token by token.

Owns sampling and the window of tokens a model sees. Must not know tokenizers or terminals: ids go in and come out.
Invariant: at temperature 0 every token is the likeliest one, whatever the seed.

Shapes: B sequences, T tokens, V vocabulary.
"""

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from orion.common.errors import ConfigError, DataError
from orion.common.model.checkpoint import (
    HF_CONFIG,
    ORION_CONFIG,
    TOKENIZER,
    hf_eos_ids,
    load_checkpoint,
    load_hf_folder,
)
from orion.common.model.layers import KvCache
from orion.common.model.stage import Transformer


@dataclass(frozen=True, slots=True)
class LoadedModel:
    """A model ready to generate, with what its folder says of text."""

    model: Transformer
    eos_ids: tuple[int, ...]
    tokenizer: Path | None


def load_any(path: Path, dtype: torch.dtype = torch.float32) -> LoadedModel:
    """Opens a folder in Orion's layout or a Hugging Face Llama folder. Raises DataError."""
    if (path / ORION_CONFIG).is_file():
        checkpoint = load_checkpoint(path, dtype)
        return LoadedModel(checkpoint.model, checkpoint.eos_ids, checkpoint.tokenizer)
    if (path / HF_CONFIG).is_file():
        _, model = load_hf_folder(path, dtype)
        tokenizer = path / TOKENIZER
        return LoadedModel(model, hf_eos_ids(path), tokenizer if tokenizer.is_file() else None)
    raise DataError(f"{path} holds no model: neither {ORION_CONFIG} nor {HF_CONFIG} is there")


@torch.no_grad()
def generate(
    model: Transformer,
    ids: Sequence[int],
    max_new_tokens: int,
    temperature: float = 0.0,
    rng_seed: int = 0,
    *,
    eos_ids: Collection[int] = (),
) -> list[int]:
    """The tokens that follow `ids`: at most `max_new_tokens`, or up to the first of `eos_ids`, which is included.

    Temperature 0 takes the likeliest token; above it tokens are drawn from the softmax of logits / temperature. When
    the context is full the model goes on from its later half. Raises ConfigError for an empty text, an id outside the
    vocabulary, or a temperature that is negative or no number.
    """
    vocab_size, context_length = model.config.vocab_size, model.config.context_length
    if not ids or not all(0 <= token < vocab_size for token in ids):
        raise ConfigError(f"a text to go on from has at least one token, each from 0 to {vocab_size - 1}")
    if not 0 <= temperature < math.inf:
        raise ConfigError(f"temperature is a number from 0 up, not {temperature}")
    generator = torch.Generator().manual_seed(rng_seed)
    device = next(model.parameters()).device
    text = list(ids)
    cache = KvCache()
    unseen = text[-context_length:]
    for _ in range(max_new_tokens):
        if cache.num_tokens + len(unseen) > context_length:
            # Positions are part of what is cached, so a moved window has to be read again.
            cache = KvCache()
            unseen = text[-max(1, context_length // 2) :]
        logits_BTV = model(torch.tensor([unseen], device=device), cache)
        token = _pick(logits_BTV[0, -1].float().cpu(), temperature, generator)
        text.append(token)
        unseen = [token]
        if token in eos_ids:
            break
    return text[len(ids) :]


def _pick(logits_V: Tensor, temperature: float, generator: torch.Generator) -> int:
    if temperature == 0:
        return int(logits_V.argmax())
    # The likeliest token's logit becomes 0, so that however small the temperature nothing overflows.
    scaled_V = (logits_V - logits_V.max()).double() / temperature
    return int(torch.multinomial(scaled_V.softmax(-1), 1, generator=generator))
