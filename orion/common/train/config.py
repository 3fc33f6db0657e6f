"""The settings of the inner and the outer optimizer; the inner learning rate's shape is in `schedule`.

Must not import torch: roles that only plan read a run's settings too. Frozen, and a setting that exists is in range.
"""

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

from orion.common.train.schedule import InnerSchedule

LearningRate = Annotated[float, Field(gt=0, le=1, allow_inf_nan=False)]
Beta = Annotated[float, Field(ge=0, lt=1)]


class InnerConfig(BaseModel):
    """The inner optimizer and its schedule."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    optimizer: Literal["muon", "adamw", "nadam"] = "muon"
    """`muon`: Muon for matrices with AdamW for the rest; the others alone for everything."""
    lr_matrix: LearningRate = 2e-3
    """Full learning rate of the matrices inside blocks. Muon's update is scaled to the size of an AdamW update."""
    lr_other: LearningRate = 2e-3
    """Full learning rate of embeddings, norms and head."""
    weight_decay: Annotated[float, Field(ge=0, le=1)] = 0.1
    """Decoupled; on tensors of two or more dimensions only."""
    beta1: Beta = 0.9
    """AdamW and NAdam."""
    beta2: Beta = 0.95
    """AdamW and NAdam."""
    eps: Annotated[float, Field(gt=0, le=1e-2)] = 1e-8
    """AdamW and NAdam."""
    muon_momentum: Beta = 0.95
    clip_norm: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 1.0
    """Bound on the gradient norm of the whole model; each stage gets the share of `clip_share`."""
    inner_state: Literal["reset", "kept"] = "reset"
    """The optimizer's state at the start of an outer step. `kept` gives up replay from public anchors."""
    schedule: InnerSchedule = InnerSchedule()


class OuterConfig(BaseModel):
    """The outer optimizer: m ← μ·m + d, θ ← θ − η·(d + μ·m)."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    lr: Annotated[float, Field(gt=0, le=2, allow_inf_nan=False)] = 0.7
    """η, the share of the mean pseudo-gradient that is applied."""
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.9
    """μ once warmed up."""
    momentum_start: Annotated[float, Field(ge=0, lt=1)] = 0.9
    """μ of the first outer step; it goes linearly to `momentum` over `num_momentum_warmup_steps`."""
    num_momentum_warmup_steps: Annotated[int, Field(ge=0)] = 0
    """Outer steps over which μ goes from `momentum_start` to `momentum`; 0 = `momentum` from the first one on."""
