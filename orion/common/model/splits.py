"""How the blocks of a model are divided among pipeline stages.

Owns the two rules (the public one, which spares the ends, and the one by cost) and `StageLayout`. Pure arithmetic, no
torch: the orchestrator plans with it. Invariants: stages are consecutive, cover every block once, and none is empty.
"""

from dataclasses import dataclass
from typing import Literal

from orion.common.errors import ConfigError
from orion.common.model.config import ModelConfig

SplitRule = Literal["balanced", "cost"]


@dataclass(frozen=True, slots=True)
class StageLayout:
    """The blocks of one stage: first_block up to, not including, end_block."""

    stage_index: int
    num_stages: int
    first_block: int
    end_block: int

    def __post_init__(self) -> None:
        if not 0 <= self.stage_index < self.num_stages:
            raise ConfigError(f"stage index {self.stage_index} is not one of {self.num_stages} stages")
        if not 0 <= self.first_block < self.end_block:
            raise ConfigError(f"stage {self.stage_index} has no blocks: {self.first_block} to {self.end_block}")

    @property
    def is_first(self) -> bool:
        """Whether this stage holds the embedding."""
        return self.stage_index == 0

    @property
    def is_last(self) -> bool:
        """Whether this stage holds the head and computes the loss."""
        return self.stage_index == self.num_stages - 1

    @property
    def num_blocks(self) -> int:
        """How many blocks the stage holds."""
        return self.end_block - self.first_block


def _check_divisible(num_blocks: int, num_stages: int) -> None:
    if num_stages < 1:
        raise ConfigError(f"a model needs at least one stage, not {num_stages}")
    if num_blocks < num_stages:
        raise ConfigError(f"{num_stages} stages need at least {num_stages} blocks; the model has {num_blocks}")


def balanced_stage_sizes(num_blocks: int, num_stages: int) -> tuple[int, ...]:
    """Blocks of each stage by the public rule: the ends, which carry embedding and head, get one less than the mean.

    What does not divide evenly among the inner stages goes to the leftmost. Raises ConfigError when a stage would be
    empty.
    """
    _check_divisible(num_blocks, num_stages)
    if num_stages == 1:
        return (num_blocks,)
    if num_stages == 2:
        return (num_blocks // 2, num_blocks - num_blocks // 2)
    mean = num_blocks // num_stages
    end = mean - 1 if mean >= 3 else max(1, mean)
    num_inner = num_stages - 2
    inner, num_larger = divmod(num_blocks - 2 * end, num_inner)
    return (end, *[inner + 1] * num_larger, *[inner] * (num_inner - num_larger), end)


def cost_stage_sizes(num_blocks: int, num_stages: int, embedding_cost: float, head_cost: float) -> tuple[int, ...]:
    """Blocks of each stage so that the dearest stage is as cheap as possible, and the others as even as possible.

    Costs are in blocks: a stage costs its blocks, plus `embedding_cost` in the first and `head_cost` in the last.
    Giving each next block to the stage that is then cheapest is optimal because all blocks cost the same. Raises
    ConfigError when a stage would be empty or a cost is negative.
    """
    _check_divisible(num_blocks, num_stages)
    if embedding_cost < 0 or head_cost < 0:
        raise ConfigError(f"stage costs are not negative: embedding {embedding_cost}, head {head_cost}")
    extra = [0.0] * num_stages
    extra[0] += embedding_cost
    extra[-1] += head_cost
    sizes = [1] * num_stages
    for _ in range(num_blocks - num_stages):
        cheapest = min(range(num_stages), key=lambda stage: (extra[stage] + sizes[stage], stage))
        sizes[cheapest] += 1
    return tuple(sizes)


def stage_layouts(config: ModelConfig, num_stages: int, rule: SplitRule = "balanced") -> tuple[StageLayout, ...]:
    """The layout of every stage.

    By cost, an embedding look-up counts as nothing, head and blocks count by their matrices. Raises ConfigError when a
    stage would be empty.
    """
    if rule == "balanced":
        sizes = balanced_stage_sizes(config.num_blocks, num_stages)
    else:
        head_cost = config.head_size / config.block_matrix_size
        sizes = cost_stage_sizes(config.num_blocks, num_stages, embedding_cost=0.0, head_cost=head_cost)
    ends = [sum(sizes[: stage + 1]) for stage in range(num_stages)]
    return tuple(
        StageLayout(stage, num_stages, end - size, end)
        for stage, (size, end) in enumerate(zip(sizes, ends, strict=True))
    )
