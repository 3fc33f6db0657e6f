"""A miner that speaks the real API, without a model: what it uploads is made up."""

import asyncio
from collections.abc import Callable
from dataclasses import dataclass

import torch

from orion.common.config import RunSpec
from orion.common.ids import Digest, Hotkey, Outcome
from orion.common.net.object_client import ObjectClient
from orion.common.net.orchestrator_client import OrchestratorClient
from orion.common.protocol.codec import Body, encode
from orion.common.protocol.keys import checkpoint_key, pseudo_gradient_key, reduced_key
from orion.common.protocol.messages import (
    Applied,
    CheckpointUploaded,
    Commitment,
    Contribution,
    Feed,
    Heartbeat,
    Join,
    LeaseRequest,
    MicrobatchEnd,
    Reduced,
    Report,
    StageState,
    Uploaded,
)
from orion.common.protocol.signing import Keypair, hotkey_of

DIGEST = Digest("d" * 64)


def body_of(value: float) -> Body:
    return encode({"values": torch.full((4,), value)})


@dataclass
class HttpMiner:
    """The only replica of the only stage: everything that a run of one needs, over HTTP."""

    key: Keypair
    spec: RunSpec
    api: OrchestratorClient
    sequence: int = 0

    @property
    def hotkey(self) -> Hotkey:
        return hotkey_of(self.key)

    @property
    def objects(self) -> ObjectClient:
        return ObjectClient(self.api)

    async def feed(self) -> Feed:
        return await self.api.feed(0, 0.0)

    async def stage(self) -> StageState:
        return (await self.feed()).stages[0]

    async def join(self) -> None:
        await self.api.join(Join(url="http://127.0.0.1:9", device="cpu", memory_bytes=1))
        await self.beat()

    async def beat(self) -> None:
        stage = await self.stage()
        heartbeat = Heartbeat(
            outer_step=stage.outer_step,
            phase=stage.phase,
            ready_outer_step=stage.outer_step,
            inner_step=0,
            queued=0,
            in_flight=0,
            applied=0,
            tokens_per_s=1.0,
            busy_share=0.5,
        )
        await self.api.heartbeat(heartbeat)

    async def report(self, **records: object) -> None:
        await self.api.report(Report.model_validate({"sequence": self.sequence, **records}))
        self.sequence += 1

    async def train(self) -> int:
        outer_step = (await self.stage()).outer_step
        share = self.spec.inner_steps * self.spec.microbatches_per_step
        lease = await self.api.lease(LeaseRequest(outer_step=outer_step, next_microbatch_id=0, num_microbatches=share))
        ends = [
            MicrobatchEnd(microbatch_id=leased.microbatch_id, outcome=Outcome.APPLIED, loss=2.0, path=(self.hotkey,))
            for leased in lease.microbatches
        ]
        await self.report(ends=tuple(ends))
        return len(ends)

    async def upload(self, num_applied: int) -> None:
        outer_step = (await self.stage()).outer_step
        commitment = Commitment(
            outer_step=outer_step,
            num_entries=2 * num_applied,
            num_applied=num_applied,
            num_contributed=num_applied,
            num_kept=2 * num_applied,
            root=DIGEST,
            is_final=True,
        )
        await self.report(commitment=commitment)
        bodies = {
            pseudo_gradient_key(outer_step, 0, self.hotkey, index): body_of(index)
            for index in range(self.spec.num_partitions)
        }
        refs = await self.objects.put_many(bodies)
        contribution = Contribution(hotkey=self.hotkey, num_microbatches=num_applied, objects=tuple(refs))
        await self.api.uploaded(Uploaded(outer_step=outer_step, contribution=contribution))

    async def reduce(self) -> None:
        feed = await self.until(lambda feed: feed.merge_plan is not None and feed.merge_plan.is_final)
        plan = feed.merge_plan
        assert plan is not None
        for partition in plan.partitions:
            for contribution in plan.contributions:
                await self.objects.get(contribution.objects[partition.partition_index])
            key = reduced_key(plan.outer_step, 0, self.hotkey, partition.partition_index)
            ref = await self.objects.put(key, body_of(1.0 + partition.partition_index))
            await self.api.reduced(
                Reduced(outer_step=plan.outer_step, partition_index=partition.partition_index, object=ref)
            )

    async def apply(self) -> None:
        outer_step = (await self.stage()).outer_step
        feed = await self.until(lambda feed: feed.manifest is not None and feed.manifest.outer_step == outer_step)
        assert feed.manifest is not None
        await self.objects.get_many([partition.object for partition in feed.manifest.partitions if partition.object])
        await self.api.applied(Applied(outer_step=outer_step, state_digest=DIGEST))

    async def checkpoint(self) -> None:
        feed = await self.until(lambda feed: feed.stages[0].checkpoint_by == self.hotkey)
        outer_step = feed.stages[0].outer_step
        ref = await self.objects.put(checkpoint_key(outer_step, 0, self.hotkey), body_of(outer_step))
        await self.api.checkpoint(CheckpointUploaded(outer_step=outer_step, object=ref, state_digest=DIGEST))

    async def outer_step(self) -> None:
        await self.upload(await self.train())
        await self.reduce()
        await self.apply()
        await self.checkpoint()

    async def until(self, holds: Callable[[Feed], bool]) -> Feed:
        feed = await self.feed()
        async with asyncio.timeout(10.0):
            while not holds(feed):
                feed = await self.api.feed(feed.version, 5.0)
        return feed
