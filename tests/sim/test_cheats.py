"""Dishonest miners among real ones: what they make up is found out, and costs nobody else anything."""

from collections.abc import Mapping

import pytest
import torch
from torch import Tensor

from orion.common.ids import MicrobatchId
from orion.common.protocol.codec import Body, encode
from orion.common.protocol.keys import parse_key
from orion.common.protocol.messages import ManifestQuery, MergedPartition, ObjectRef
from orion.miner.cache import Slot
from orion.miner.worker import DeviceWorker
from orion.simulator.clients import SimulatedObjects, SimulatedOrchestrator
from orion.simulator.miner_host import HOST_DEVICE, MinerHost
from orion.simulator.scenarios import calm
from orion.simulator.simulation import watched
from orion.simulator.swarm import Swarm

SEED = 5


class LyingObjects(SimulatedObjects):
    """Writes other means than were computed."""

    async def put_many(self, bodies: Mapping[str, Body]) -> list[ObjectRef]:
        return await super().put_many({key: self._bent(key, body) for key, body in bodies.items()})

    def _bent(self, key: str, body: Body) -> Body:
        name = parse_key(key)
        if name is None or name.kind != "reduced":
            return body
        num_values = (body.size_bytes - len(body.header)) // 4
        return encode({"mean": torch.full((num_values,), 1e-3)})


class LyingReducer(MinerHost):
    """Computes honestly, and lies about means."""

    def make_objects(self, orchestrator: SimulatedOrchestrator) -> SimulatedObjects:
        return LyingObjects(orchestrator)


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


def merged_partitions(swarm: Swarm, stage_index: int) -> list[MergedPartition]:
    query = ManifestQuery(stage_index=stage_index, from_outer_step=0)
    manifests = swarm.orchestrator.core.manifests(query).manifests
    return [merged for manifest in manifests for merged in manifest.partitions]


def test_a_lying_reducer_is_named_and_its_bytes_are_not_used() -> None:
    liar = 4  # of stage 1, whose miners are 3 to 5
    swarm = Swarm(calm(num_stages=2, replicas=3, outer_steps=2, cheats={liar: LyingReducer}), SEED)
    result = watched(swarm, SEED)
    hotkey = swarm.hotkeys[liar]
    named = [notice for notice in result.status.notices if "other bytes from" in notice]
    assert named
    assert all(notice.endswith(f"other bytes from {hotkey}") for notice in named)
    merged = merged_partitions(swarm, 1)
    assert len(merged) == 2 * 3
    for partition in merged:
        assert len(partition.reducers) == 2
        assert hotkey not in partition.reducers
        assert partition.object is not None
        assert hotkey not in partition.object.key
    assert result.status.anchors_equal


def test_where_nobody_can_decide_who_lies_the_partition_stays_as_it_is() -> None:
    swarm = Swarm(calm(num_stages=2, replicas=2, outer_steps=2, cheats={2: LyingReducer}), SEED)
    result = watched(swarm, SEED)
    assert all(partition.object is None for partition in merged_partitions(swarm, 1))
    assert all(partition.object is not None for partition in merged_partitions(swarm, 0))
    assert result.status.anchors_equal


@pytest.mark.parametrize("cheat", [0, 3, 4], ids=["first stage", "middle stage", "last stage"])
def test_a_miner_that_returns_noise_fails_its_check_and_gets_no_weight(cheat: int) -> None:
    swarm = Swarm(calm(outer_steps=2, checks_per_outer_step=6, cheats={cheat: NoisyMiner}), SEED)
    result = watched(swarm, SEED)
    assert result.status.num_verdicts_failed >= 1
    failed = [notice for notice in result.status.notices if "failed a check" in notice]
    assert failed
    assert all(swarm.hotkeys[cheat] in notice for notice in failed)
    assert result.chain_weights[cheat] == 0.0
    assert all(share > 0 for index, share in result.chain_weights.items() if index != cheat)
