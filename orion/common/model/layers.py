"""The parts of a block: matrices, norms, rotary embedding, grouped-query attention, gated feed-forward.

Owns the arithmetic inside a block. Must not know of stages, boundaries or names of the whole model. Parameters are
created as zeros and get their values from `params.init_params` or a checkpoint; nothing here draws random numbers.
Everything works under `torch.func.functional_call`: no state changes in `forward`, no in-place writes to parameters.

Shapes: B sequences, T tokens, D model width, F feed-forward width, H heads, K head width, I a matrix's inputs, O its
outputs, P the longest context.
"""

import math
from abc import abstractmethod
from collections.abc import Callable
from typing import Self

import torch
from blake3 import blake3
from torch import Tensor, nn
from torch.nn import functional

from orion.common.model.config import ModelConfig, RopeScaling

EMBEDDING_STD = 0.2
"""Of the first values of embeddings and anchors: as loud as what one block adds, so that tokens are not drowned out.

After 100 steps of the `local` model in three stages the held-out loss was 4.24 with it and 4.47 with 0.02 (one seed).
"""


def named_generator(seed: int, name: str) -> torch.Generator:
    """A CPU generator for one tensor.

    Which values it gets depends on the seed and its name, not on what was drawn before it.
    """
    digest = blake3(f"{seed}:{name}".encode()).digest(length=8)
    return torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)  # torch takes 63 bits without sign


class Linear(nn.Module):
    """A matrix without bias; `init_std` is the standard deviation its values start with."""

    def __init__(self, inputs: int, outputs: int, init_std: float) -> None:
        super().__init__()
        self.init_std = init_std
        self.weight = nn.Parameter(torch.zeros(outputs, inputs))

    def forward(self, x: Tensor) -> Tensor:
        """x [..., I] -> [..., O]."""
        return functional.linear(x, self.weight)


class Embedding(nn.Module):
    """A row of `width` values for each token; `init_std` is the standard deviation they start with."""

    def __init__(self, vocab_size: int, width: int, init_std: float) -> None:
        super().__init__()
        self.init_std = init_std
        self.weight = nn.Parameter(torch.zeros(vocab_size, width))

    def forward(self, ids_BT: Tensor) -> Tensor:
        """Integer ids [B, T] -> [B, T, D]."""
        return functional.embedding(ids_BT, self.weight)


class RMSNorm(nn.Module):
    """Divides by the root mean square and scales each coordinate; starts as ones."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        """x [..., D] -> [..., D], in x's dtype."""
        return functional.rms_norm(x, self.weight.shape, self.weight.to(x.dtype), self.eps)


class DerivedTables(nn.Module):
    """Buffers that follow from the config alone, so they are in no checkpoint and no optimizer.

    They are computed again after every move or cast of the module: `to_empty` would leave them undefined, and a cast to
    bfloat16 would lose digits that late positions need.
    """

    def _fill(self, device: torch.device) -> None:
        if device.type == "meta":
            with torch.device("meta"):
                tables = self.compute()
        else:
            with torch.device("cpu"):
                tables = self.compute()
        for name, table in tables.items():
            self.register_buffer(name, table.to(device), persistent=False)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]  # torch leaves it without types
        self._fill(next(self.buffers()).device)
        return self

    @abstractmethod
    def compute(self) -> dict[str, Tensor]:
        """The tables by name, float32, on torch's default device."""


def rotary_frequencies(head_dim: int, theta: float, scaling: RopeScaling | None) -> Tensor:
    """Angle per position of each of the head_dim / 2 rotated pairs, in radians, float32.

    With `scaling`, a frequency whose wavelength exceeds original / low_freq_factor is divided by `factor`, one below
    original / high_freq_factor is kept, and between them the two are mixed linearly in 1 / wavelength.
    """
    frequencies = 1.0 / theta ** (torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim)
    if scaling is None:
        return frequencies
    turns_in_original = scaling.original_context_length * frequencies / (2 * math.pi)
    kept = (turns_in_original - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
    kept = kept.clamp(0.0, 1.0)
    return frequencies * ((1.0 - kept) / scaling.factor + kept)


class Rotary(DerivedTables):
    """Cosine and sine of every position's angles, [P, K/2] each."""

    cos: Tensor
    sin: Tensor

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self._config = config
        self._fill(torch.empty(0).device)

    def compute(self) -> dict[str, Tensor]:
        """See DerivedTables."""
        config = self._config
        frequencies = rotary_frequencies(config.head_dim, config.rope_theta, config.rope_scaling)
        angles = torch.outer(torch.arange(config.context_length, dtype=torch.float32), frequencies)
        return {"cos": angles.cos(), "sin": angles.sin()}

    def forward(self, start: int, num_tokens: int) -> tuple[Tensor, Tensor]:
        """Cosine and sine [T, 1, K/2] of positions start … start + num_tokens - 1, ready to broadcast over heads."""
        positions = slice(start, start + num_tokens)
        return self.cos[positions, None], self.sin[positions, None]


def rotate(x_BTHK: Tensor, cos_sin: tuple[Tensor, Tensor]) -> Tensor:
    """Turns coordinate i and i + K/2 of every head together by its position's angle."""
    cos, sin = (table.to(x_BTHK.dtype) for table in cos_sin)
    first, second = x_BTHK.chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)


class KvCache:
    """Keys and values of the tokens seen so far, per block, while one text is being generated.

    Bounded by the model's context length, which `Rotary` enforces. Holds no parameter and never takes part in training.
    """

    def __init__(self) -> None:
        self.num_tokens = 0
        self._kept: dict[int, tuple[Tensor, Tensor]] = {}

    def extend(self, block_index: int, k_BTHK: Tensor, v_BTHK: Tensor) -> tuple[Tensor, Tensor]:
        """Appends a block's new keys and values and returns all of them."""
        kept = self._kept.get(block_index)
        if kept is not None:
            k_BTHK = torch.cat((kept[0], k_BTHK), dim=1)
            v_BTHK = torch.cat((kept[1], v_BTHK), dim=1)
        self._kept[block_index] = (k_BTHK, v_BTHK)
        return k_BTHK, v_BTHK


class Attention(nn.Module):
    """Causal grouped-query attention with rotary positions."""

    def __init__(self, config: ModelConfig, block_index: int) -> None:
        super().__init__()
        self._head_dim = config.head_dim
        self._grouped = config.num_kv_heads != config.num_heads
        self._block_index = block_index
        std_in = 1 / math.sqrt(config.width)
        self.q = Linear(config.width, config.attention_width, std_in)
        self.k = Linear(config.width, config.kv_width, std_in)
        self.v = Linear(config.width, config.kv_width, std_in)
        self.o = Linear(config.attention_width, config.width, branch_std(config, config.attention_width))

    def forward(self, x_BTD: Tensor, cos_sin: tuple[Tensor, Tensor], cache: KvCache | None = None) -> Tensor:
        """Normalised x [B, T, D] -> the branch's output [B, T, D]. With a cache, either it is empty or T is 1."""
        heads = (*x_BTD.shape[:2], -1, self._head_dim)
        q_BTHK = rotate(self.q(x_BTD).view(heads), cos_sin)
        k_BTHK = rotate(self.k(x_BTD).view(heads), cos_sin)
        v_BTHK = self.v(x_BTD).view(heads)
        if cache is not None:
            k_BTHK, v_BTHK = cache.extend(self._block_index, k_BTHK, v_BTHK)
        mixed_BHTK = functional.scaled_dot_product_attention(
            q_BTHK.transpose(1, 2),
            k_BTHK.transpose(1, 2),
            v_BTHK.transpose(1, 2),
            is_causal=k_BTHK.shape[1] == q_BTHK.shape[1],  # a single new token may look at everything kept
            enable_gqa=self._grouped,
        )
        out_BTD: Tensor = self.o(mixed_BHTK.transpose(1, 2).flatten(2))
        return out_BTD


class FeedForward(nn.Module):
    """SwiGLU: down(silu(gate(x)) × up(x))."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        std_in = 1 / math.sqrt(config.width)
        self.gate = Linear(config.width, config.ffn_width, std_in)
        self.up = Linear(config.width, config.ffn_width, std_in)
        self.down = Linear(config.ffn_width, config.width, branch_std(config, config.ffn_width))

    def forward(self, x_BTD: Tensor) -> Tensor:
        """Normalised x [B, T, D] -> the branch's output [B, T, D]."""
        out_BTD: Tensor = self.down(functional.silu(self.gate(x_BTD)) * self.up(x_BTD))
        return out_BTD


class Block(nn.Module):
    """One transformer block, its two branches left apart so that a boundary can reach between them."""

    def __init__(self, config: ModelConfig, block_index: int) -> None:
        super().__init__()
        self.attention_norm = RMSNorm(config.width, config.norm_eps)
        self.attention = Attention(config, block_index)
        self.ffn_norm = RMSNorm(config.width, config.norm_eps)
        self.ffn = FeedForward(config)

    def forward(
        self, input_BTD: Tensor, residual_BTD: Tensor, cos_sin: tuple[Tensor, Tensor], cache: KvCache | None = None
    ) -> tuple[Tensor, Tensor]:
        """What attention reads and what its output is added to (the same tensor, but behind an `iota` boundary).

        Returns (the residual stream after attention, the feed-forward branch's output), [B, T, D] each; the block's
        output is their sum.
        """
        after_BTD = residual_BTD + self.attention(self.attention_norm(input_BTD), cos_sin, cache)
        return after_BTD, self.ffn(self.ffn_norm(after_BTD))


def branch_std(config: ModelConfig, inputs: int) -> float:
    """Initial standard deviation of a matrix that writes to the residual stream.

    All branches together add variance 1.
    """
    return 1 / math.sqrt(inputs * 2 * config.num_blocks)
