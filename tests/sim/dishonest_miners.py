"""Dishonest miners for simulated swarms. Nothing in the product knows of such a thing."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import cast

import torch
from torch import Tensor

from orion.common.ids import MicrobatchId
from orion.common.offload import Offload, ResultT
from orion.common.protocol.codec import Body, decode, encode
from orion.common.protocol.keys import parse_key
from orion.common.protocol.messages import ObjectRef
from orion.common.protocol.reduction import Reduction, slice_spec
from orion.miner.cache import Slot
from orion.miner.events import PseudoGradientEncoded
from orion.miner.worker import DeviceWorker
from orion.simulator.clients import SimulatedObjects, SimulatedOrchestrator
from orion.simulator.miner_host import HOST_DEVICE, MinerHost


class LyingReducer(MinerHost):
    """Computes honestly, and lies about means."""

    def make_offload(self) -> Offload:
        async def bent(function: Callable[[], ResultT]) -> ResultT:
            result = function()
            if isinstance(result, Reduction) and result.mean is not None:
                num_values = (result.mean.size_bytes - len(result.mean.header)) // 4
                lie = encode({"mean": torch.full((num_values,), 1e-3)})
                return cast(ResultT, replace(result, mean=lie))
            return result

        return bent


class ForgetfulObjects(SimulatedObjects):
    """Says that pseudo-gradients are written, and writes none."""

    async def put_many(self, bodies: Mapping[str, Body]) -> list[ObjectRef]:
        names = [parse_key(key) for key in bodies]
        if any(name is not None and name.kind == "pseudo-gradient" for name in names):
            return [ObjectRef(key=key, digest=body.digest, size_bytes=body.size_bytes) for key, body in bodies.items()]
        return await super().put_many(bodies)


class ForgetfulMiner(MinerHost):
    """Claims a contribution that nobody can read."""

    def make_objects(self, orchestrator: SimulatedOrchestrator) -> SimulatedObjects:
        return ForgetfulObjects(orchestrator)


class PoisoningWorker(DeviceWorker):
    """Works honestly, and uploads something else."""

    def _encode_pseudo_gradient(self, outer_step: int, *, adds_error: bool) -> PseudoGradientEncoded:
        honest = super()._encode_pseudo_gradient(outer_step, adds_error=adds_error)
        negated = {ref.key: _negated(self.outbox[ref.key]) for ref in honest.objects}
        self.outbox = self.outbox | negated
        objects = [ObjectRef(key=key, digest=body.digest, size_bytes=body.size_bytes) for key, body in negated.items()]
        return PseudoGradientEncoded(outer_step, tuple(objects))


def _negated(body: Body) -> Body:
    num_values = (body.size_bytes - len(body.header)) // 4
    values_N = decode(body.tobytes(), slice_spec("none", num_values), body.size_bytes)["values"]
    return encode({"values": -values_N})


class PoisoningMiner(MinerHost):
    """Does the work that it is checked for, and pulls the anchor the other way."""

    def make_worker(self) -> DeviceWorker:
        return PoisoningWorker(
            self.world.spec,
            self.hotkey,
            cache=self.cache,
            evidence=self.evidence,
            device=HOST_DEVICE,
            compute_dtype=torch.float32,
        )


class NoisyWorker(DeviceWorker):
    """Sends noise of the right shape instead of what it computed, and commits to it."""

    def _put(self, microbatch_id: MicrobatchId, slot: Slot, tensors: Mapping[str, Tensor]) -> Body:
        generator = torch.Generator().manual_seed(int(microbatch_id))
        noise = {
            name: torch.randn(tensor.shape, generator=generator) if tensor.is_floating_point() else tensor
            for name, tensor in tensors.items()
        }
        return super()._put(microbatch_id, slot, noise)


class NoisyMiner(MinerHost):
    """Does no work that is worth anything."""

    def make_worker(self) -> DeviceWorker:
        return NoisyWorker(
            self.world.spec,
            self.hotkey,
            cache=self.cache,
            evidence=self.evidence,
            device=HOST_DEVICE,
            compute_dtype=torch.float32,
        )
