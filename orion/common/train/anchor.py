"""A stage's anchor as a pure function of the public record: initial parameters, checkpoints, merged means.

Miners, newcomers and validators all build an anchor with these functions, so they all end with the same bytes. Fetching
what they need is `orion.common.net.anchor_loader`'s part.

Letters in names: N flat parameters of a stage.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from orion.common.config import RunSpec
from orion.common.model.params import flatten_params, init_params
from orion.common.model.stage import Stage
from orion.common.train.config import OuterConfig
from orion.common.train.outer import OuterState, apply_outer_step, initial_outer_state
from orion.common.train.partition import partition_bounds


def initial_anchor(spec: RunSpec, stage_index: int) -> OuterState:
    """The state before the first outer step: parameters drawn from the run's seed, no momentum. Builds the stage in
    host memory; takes seconds for a large one."""
    stage = Stage(spec.model, spec.layouts[stage_index])
    init_params(stage, spec.seed)
    return initial_outer_state(flatten_params(stage))


def apply_means(state: OuterState, means: Sequence[Tensor | None], config: OuterConfig) -> OuterState:
    """The state after one outer step whose mean pseudo-gradient came in partitions, in order and covering all N.

    A partition that nobody delivered (None) keeps its parameters and its momentum as they are: momentum alone would
    move parameters by what no contributor asked for in this step. The given state is left as it is. Raises ValueError
    when a mean doesn't fit its partition; finiteness is the caller's to check.
    """
    after = OuterState(torch.empty_like(state.anchor_N), torch.empty_like(state.momentum_N), state.outer_step + 1)
    for partition, mean_N in zip(partition_bounds(state.anchor_N.numel(), len(means)), means, strict=True):
        part, into = (whole.slice(partition.start, partition.end) for whole in (state, after))
        if mean_N is None:
            into.anchor_N.copy_(part.anchor_N)
            into.momentum_N.copy_(part.momentum_N)
        else:
            # The outer step is elementwise, so a slice's step is the slice of the step.
            apply_outer_step(part, mean_N, config, into)
    return after


def checkpoint_tensors(state: OuterState) -> dict[str, Tensor]:
    """What a checkpoint's object holds (`orion.common.protocol.codec.checkpoint_spec`)."""
    return {"anchor": state.anchor_N, "momentum": state.momentum_N}


def state_from_checkpoint(tensors: Mapping[str, Tensor], outer_step: int) -> OuterState:
    """The state in a checkpoint's tensors. Raises ValueError when they do not fit each other."""
    return OuterState(tensors["anchor"], tensors["momentum"], outer_step)
