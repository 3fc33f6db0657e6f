"""Stages of the model: alone (`Stage`, what a miner runs) and all in one module (`Transformer`).

Owns the wiring of embedding, blocks, boundaries and head, and the names of parameters. Must not train, transport or
draw values. Invariants: a parameter has the same name in its stage and in the whole model (blocks and boundaries are
counted over the model); chained stages compute what the whole model with the same boundaries computes; forward
changes nothing in the module, so `torch.func.functional_call` with a dict of parameters works.

Shapes: B sequences, T tokens, D model width, C boundary width, V vocabulary.
"""

from torch import Tensor, nn
from torch.nn import functional

from orion.common.errors import ConfigError
from orion.common.model.boundary import Boundary, SubspaceTables
from orion.common.model.config import ModelConfig
from orion.common.model.layers import EMBEDDING_STD, Block, Embedding, KvCache, Linear, RMSNorm, Rotary
from orion.common.model.splits import SplitRule, StageLayout, stage_layouts

_HEAD_STD = 0.02


class Pipeline(nn.Module):
    """One or more consecutive stages in one module; use `Stage` or `Transformer`."""

    def __init__(self, config: ModelConfig, layouts: tuple[StageLayout, ...]) -> None:
        """Parameters are zeros (norms ones) until `init_params` or a checkpoint fills them. Raises ConfigError."""
        super().__init__()
        first, last = layouts[0], layouts[-1]
        if last.is_last and last.end_block != config.num_blocks:
            raise ConfigError(f"the last stage ends at block {last.end_block}; {config.name} has {config.num_blocks}")
        if config.tie_embeddings and first.num_stages > 1:
            raise ConfigError("a tied head needs the embedding in its own stage: untie it to use more than one stage")
        self.config = config
        self.layouts = layouts
        self.rotary = Rotary(config)
        num_stages = first.num_stages
        self.subspace = SubspaceTables(config) if config.boundary.kind == "subspace" and num_stages > 1 else None
        if first.is_first:
            std = _HEAD_STD if config.tie_embeddings else EMBEDDING_STD
            self.embedding = Embedding(config.vocab_size, config.width, std)
        self.blocks = nn.ModuleDict(
            {str(index): Block(config, index) for index in range(first.first_block, last.end_block)}
        )
        self.boundaries = nn.ModuleDict()
        for index in range(max(first.stage_index - 1, 0), min(last.stage_index + 1, num_stages - 1)):
            has_sender, has_receiver = index >= first.stage_index, index < last.stage_index
            self.boundaries[str(index)] = Boundary(config, self.subspace, has_sender, has_receiver)
        if last.is_last:
            self.norm = RMSNorm(config.width, config.norm_eps)
            if not config.tie_embeddings:
                self.head = Linear(config.width, config.vocab_size, _HEAD_STD)

    def run_stage(self, layout: StageLayout, x: Tensor | None, ids_BT: Tensor, cache: KvCache | None = None) -> Tensor:
        """One stage: z [B, T, C] of the stage before and ids -> z for the next, or logits [B, T, V].

        Raises ValueError when the sequence, with what the cache holds, is longer than the context.
        """
        start = 0 if cache is None else cache.num_tokens
        num_tokens = ids_BT.shape[1]
        if start + num_tokens > self.config.context_length:
            raise ValueError(f"{start + num_tokens} tokens do not fit the context of {self.config.context_length}")
        cos_sin = self.rotary(start, num_tokens)
        input_BTD, residual_BTD = self._enter(layout, x, ids_BT)
        for index in range(layout.first_block, layout.end_block):
            after_BTD, ffn_BTD = self.blocks[str(index)](input_BTD, residual_BTD, cos_sin, cache)
            if index == layout.end_block - 1 and not layout.is_last:
                return self._boundary(layout.stage_index).send(after_BTD, ffn_BTD, ids_BT)
            input_BTD = residual_BTD = after_BTD + ffn_BTD
        return self._logits(residual_BTD)

    def _boundary(self, index: int) -> Boundary:
        boundary = self.boundaries[str(index)]
        assert isinstance(boundary, Boundary)
        return boundary

    def _enter(self, layout: StageLayout, x: Tensor | None, ids_BT: Tensor) -> tuple[Tensor, Tensor]:
        """What the stage's first attention reads, and the residual it is added to."""
        if not layout.is_first:
            assert x is not None, "only the first stage goes without an input"
            return self._boundary(layout.stage_index - 1).receive(x, ids_BT)
        h_BTD = self.embedding(ids_BT)
        if self.subspace is not None:
            h_BTD = h_BTD + self.subspace.tokens(ids_BT, h_BTD.dtype)
        return h_BTD, h_BTD

    def _logits(self, x_BTD: Tensor) -> Tensor:
        normed_BTD = self.norm(x_BTD)
        if self.config.tie_embeddings:
            return functional.linear(normed_BTD, self.embedding.weight)
        logits_BTV: Tensor = self.head(normed_BTD)
        return logits_BTV


class Stage(Pipeline):
    """The slice of the model that one miner runs."""

    def __init__(self, config: ModelConfig, layout: StageLayout) -> None:
        """See Pipeline."""
        super().__init__(config, (layout,))
        self.layout = layout

    def forward(self, x: Tensor | None, ids_BT: Tensor) -> Tensor:
        """z [B, T, C] of the stage before and ids -> z for the next stage, or logits [B, T, V].

        The first stage ignores `x`, which may be None.
        """
        return self.run_stage(self.layout, x, ids_BT)


class Transformer(Pipeline):
    """The whole model with the boundaries of `num_stages` stages inside; one stage has none."""

    def __init__(self, config: ModelConfig, num_stages: int = 1, rule: SplitRule = "balanced") -> None:
        """Raises ConfigError when the blocks do not divide into that many stages."""
        super().__init__(config, stage_layouts(config, num_stages, rule))

    def forward(self, ids_BT: Tensor, cache: KvCache | None = None) -> Tensor:
        """ids [B, T] -> logits [B, T, V]. A cache is filled, and its tokens come before these."""
        x: Tensor | None = None
        for layout in self.layouts:
            x = self.run_stage(layout, x, ids_BT, cache)
        assert x is not None
        if cache is not None:
            cache.num_tokens += ids_BT.shape[1]
        return x


def token_loss(logits_BTV: Tensor, targets_BT: Tensor) -> Tensor:
    """Mean cross-entropy per token in nats, computed in float32; a scalar."""
    return functional.cross_entropy(logits_BTV.float().flatten(0, 1), targets_BT.flatten().long())
