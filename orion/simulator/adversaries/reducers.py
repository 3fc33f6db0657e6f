"""Attackers that train honestly and lie about means."""

from collections.abc import Callable
from dataclasses import replace
from typing import cast

import numpy as np
import torch

from orion.common.offload import Offload, ResultT
from orion.common.protocol.codec import Body, encode
from orion.common.protocol.reduction import Reduction
from orion.simulator.adversaries.adversary import Adversary


class LyingReducer(Adversary):
    """Flips the sign of every mean; with an accomplice that does the same, both copies of a partition may agree."""

    def make_offload(self) -> Offload:
        async def bent(function: Callable[[], ResultT]) -> ResultT:
            result = function()
            if isinstance(result, Reduction) and result.mean is not None:
                self.attacked()
                return cast(ResultT, replace(result, mean=_negated(result.mean)))
            return result

        return bent


def _negated(mean: Body) -> Body:
    values = np.frombuffer(mean.tobytes()[len(mean.header) :], dtype="<f4")
    return encode({"mean": torch.from_numpy(-values)})
