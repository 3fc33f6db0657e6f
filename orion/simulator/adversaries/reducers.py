"""Attackers that train honestly and lie about means."""

from collections.abc import Mapping

import numpy as np
import torch

from orion.common.protocol.codec import Body, encode
from orion.common.protocol.keys import parse_key
from orion.common.protocol.messages import ObjectRef
from orion.simulator.adversaries.adversary import Adversary
from orion.simulator.clients import SimulatedObjects, SimulatedOrchestrator


class _LyingObjects(SimulatedObjects):
    """Writes the mean with its sign flipped: any two that do so write the same bytes."""

    def __init__(self, orchestrator: SimulatedOrchestrator, adversary: Adversary) -> None:
        super().__init__(orchestrator)
        self._adversary = adversary

    async def put_many(self, bodies: Mapping[str, Body]) -> list[ObjectRef]:
        return await super().put_many({key: self._bent(key, body) for key, body in bodies.items()})

    def _bent(self, key: str, body: Body) -> Body:
        name = parse_key(key)
        if name is None or name.kind != "reduced":
            return body
        self._adversary.attacked()
        values = np.frombuffer(body.tobytes()[len(body.header) :], dtype="<f4")
        return encode({"mean": torch.from_numpy(-values)})


class LyingReducer(Adversary):
    """Lies about every mean; with an accomplice that does the same, both copies of a partition may agree."""

    def make_objects(self, orchestrator: SimulatedOrchestrator) -> SimulatedObjects:
        return _LyingObjects(orchestrator, self)
