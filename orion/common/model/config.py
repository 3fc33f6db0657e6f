"""The shape of a model: every number that fixes its parameters and what crosses a stage boundary.

Owns `ModelConfig` and its parts, and reads the presets that lie beside this file as data. Must not import torch:
roles that only plan (the orchestrator) read configs too. Invariants: a config that exists is consistent (heads
divide, the boundary width is whole), it never changes, and two equal configs describe byte-compatible parameters.
"""

import tomllib
from importlib import resources
from typing import Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from orion.common.errors import ConfigError

BoundaryKind = Literal["anchored", "resbm", "linear", "iota", "subspace", "none"]

_MLP_WIDTH_MIN = 64  # narrower hidden layers than this cost as much in launches and learn less


class RopeScaling(BaseModel):
    """Llama-3 frequency scaling: long wavelengths are stretched by `factor`, short ones kept, a linear ramp between."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    factor: float = Field(ge=1.0)
    """How much longer the long wavelengths become."""
    low_freq_factor: float = Field(gt=0.0)
    """Wavelengths above original_context_length / low_freq_factor (tokens) are stretched in full."""
    high_freq_factor: float = Field(gt=0.0)
    """Wavelengths below original_context_length / high_freq_factor (tokens) are kept."""
    original_context_length: int = Field(ge=1)
    """Context length, in tokens, that the unscaled frequencies were trained for."""

    @model_validator(mode="after")
    def _ramp_has_width(self) -> Self:
        if self.high_freq_factor <= self.low_freq_factor:
            raise ValueError("high_freq_factor must be above low_freq_factor")
        return self


class BoundaryConfig(BaseModel):
    """What a residual stream of `width` values becomes on its way to the next stage.

    `anchored`: `resbm` plus a learned row of the receiver's own for each token. `resbm`: identity on the first
    coordinates plus learned, normalised maps both ways. `linear`: one learned map each way, no identity. `iota`:
    squeezed inside the last block of the sender and widened inside the first block of the receiver. `subspace`: every
    branch writes into one fixed subspace, whose coordinates cross without loss. `none`: the whole residual stream
    crosses.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: BoundaryKind = "anchored"
    ratio: int = Field(default=64, ge=1)
    """How many times narrower than the residual stream the crossing tensor is (ignored by `none`)."""
    anchor_rank: int | None = Field(default=None, ge=1)
    """Rank of the `anchored` token table; None is full rank (vocab_size × width values for each boundary)."""
    maps: Literal["linear", "mlp"] = "linear"
    """Shape of the learned maps of `resbm` and `anchored`: one matrix, or two with SiLU between."""
    mlp_width: int | None = Field(default=None, ge=1)
    """Hidden width of `maps = "mlp"`; None is max(4 × boundary width, 64)."""
    subspace_seed: int = Field(default=0, ge=0)
    """Draws the fixed subspace and token table of `subspace`; the same for every stage of a run."""


class ModelConfig(BaseModel):
    """A decoder-only transformer of the Llama-3 family and the boundary between its stages."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    vocab_size: int = Field(ge=2)
    width: int = Field(ge=1)
    """Width of the residual stream."""
    num_blocks: int = Field(ge=1)
    num_heads: int = Field(ge=1)
    """Query heads."""
    num_kv_heads: int = Field(ge=1)
    """Key and value heads; each serves num_heads / num_kv_heads query heads."""
    head_dim: int = Field(ge=2)
    ffn_width: int = Field(ge=1)
    """Hidden width of the gated feed-forward part."""
    context_length: int = Field(ge=1)
    """Longest sequence, in tokens."""
    rope_theta: float = Field(default=500_000.0, gt=0.0)
    """Base of the rotary frequencies."""
    rope_scaling: RopeScaling | None = None
    norm_eps: float = Field(default=1e-5, gt=0.0)
    tie_embeddings: bool = False
    """Whether the head reuses the embedding; only a model in one stage can."""
    boundary: BoundaryConfig = BoundaryConfig()

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.num_heads % self.num_kv_heads != 0:
            raise ValueError(f"num_kv_heads {self.num_kv_heads} does not divide num_heads {self.num_heads}")
        if self.head_dim % 2 != 0:
            raise ValueError(f"head_dim {self.head_dim} is odd; rotary embedding turns pairs")
        if self.boundary.kind != "none" and self.width % self.boundary.ratio != 0:
            raise ValueError(f"boundary ratio {self.boundary.ratio} does not divide width {self.width}")
        if self.boundary.anchor_rank is not None and self.boundary.anchor_rank > self.width:
            raise ValueError(f"anchor_rank {self.boundary.anchor_rank} is above width {self.width}")
        return self

    @property
    def boundary_width(self) -> int:
        """Values a token sends across a stage boundary (C)."""
        return self.width if self.boundary.kind == "none" else self.width // self.boundary.ratio

    @property
    def boundary_mlp_width(self) -> int:
        """Hidden width of the boundary's maps when they are MLPs."""
        return self.boundary.mlp_width or max(4 * self.boundary_width, _MLP_WIDTH_MIN)

    @property
    def kv_width(self) -> int:
        """Width of a token's keys, and of its values, over all their heads."""
        return self.num_kv_heads * self.head_dim

    @property
    def attention_width(self) -> int:
        """Width of a token's queries over all heads."""
        return self.num_heads * self.head_dim

    @property
    def block_matrix_size(self) -> int:
        """Values in the matrices of one block: each costs one multiply-add a token."""
        return self.width * (2 * self.attention_width + 2 * self.kv_width + 3 * self.ffn_width)

    @property
    def head_size(self) -> int:
        """Values in the head (or in the embedding that stands in for it)."""
        return self.vocab_size * self.width

    def with_boundary(self, kind: BoundaryKind, **fields: object) -> "ModelConfig":
        """This config with another boundary; `fields` are those of BoundaryConfig. Raises ConfigError."""
        return self.with_fields(boundary={"kind": kind, **fields})

    def with_fields(self, **fields: object) -> "ModelConfig":
        """This config with some fields replaced, checked again. Raises ConfigError."""
        try:
            return ModelConfig.model_validate({**dict(self), **fields})
        except ValidationError as error:
            raise ConfigError(f"model {self.name}: {error}") from error

    @classmethod
    def preset(cls, name: str) -> "ModelConfig":
        """The preset `presets/<name>.toml`. Raises ConfigError, which lists the names, for any other name."""
        names = preset_names()
        if name not in names:
            raise ConfigError(f"no model preset {name!r}; there are {', '.join(names)}")
        text = (resources.files("orion.common.model") / "presets" / f"{name}.toml").read_text(encoding="utf-8")
        try:
            return cls.model_validate({"name": name, **tomllib.loads(text)})
        except ValidationError as error:
            raise ConfigError(f"model preset {name}: {error}") from error


def preset_names() -> tuple[str, ...]:
    """Names of the presets that come with the package, sorted."""
    folder = resources.files("orion.common.model") / "presets"
    return tuple(sorted(entry.name.removesuffix(".toml") for entry in folder.iterdir() if entry.name.endswith(".toml")))
