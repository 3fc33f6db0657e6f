"""Fetches what an anchor is made of and builds it: the shell of `orion.common.train.anchor`."""

from collections.abc import Sequence
from typing import Protocol

import structlog
from torch import Tensor

from orion.common.config import RunSpec
from orion.common.offload import Offload, in_thread
from orion.common.protocol.codec import body_size, check_finite, checkpoint_spec, decode, mean_spec
from orion.common.protocol.messages import (
    CheckpointRef,
    Manifest,
    Manifests,
    ObjectRef,
    RefusalCode,
)
from orion.common.protocol.refusals import RefusedError, refused
from orion.common.protocol.start import start_checkpoint
from orion.common.train.anchor import apply_means, initial_anchor, state_from_checkpoint
from orion.common.train.outer import OuterState, state_digest
from orion.common.train.partition import Partition, partition_bounds

_log = structlog.get_logger("orion.anchor")


class ManifestSource(Protocol):
    """Where manifests come from (`OrchestratorClient`)."""

    async def manifests(self, stage_index: int, from_outer_step: int) -> Manifests: ...


class ObjectSource(Protocol):
    """Where objects come from (`ObjectClient`)."""

    async def get(self, ref: ObjectRef) -> bytearray: ...

    async def get_many(self, refs: Sequence[ObjectRef]) -> list[bytearray]: ...


class AnchorLoader:
    """Builds anchors of one run's stages, on the CPU. Heavy computing is handed to `offload`."""

    def __init__(
        self, orchestrator: ManifestSource, objects: ObjectSource, spec: RunSpec, offload: Offload = in_thread
    ) -> None:
        self._orchestrator = orchestrator
        self._objects = objects
        self._spec = spec
        self._offload = offload

    async def load(
        self,
        stage_index: int,
        outer_step: int,
        checkpoint: CheckpointRef | None = None,
        held: OuterState | None = None,
    ) -> OuterState:
        """The anchor at the start of `outer_step`.

        Starts from the newest state at or before it: one that the caller holds (of this stage), the checkpoint, or
        where the run began; a checkpoint whose content is not there or not what its digests say is passed over. Raises
        RefusedError (NOT_FOUND: a manifest or an object on the way is missing, and an older start would miss it too),
        and TransportError.
        """
        starts = [start for start in (held, checkpoint) if start is not None and start.outer_step <= outer_step]
        if self._spec.start is not None and checkpoint != (begun := start_checkpoint(self._spec.start, stage_index)):
            starts.append(begun)
        starts.sort(key=lambda start: start.outer_step, reverse=True)
        state = await self._start(stage_index, starts)
        return await self._advance(stage_index, state, outer_step)

    async def _start(self, stage_index: int, starts: Sequence[OuterState | CheckpointRef]) -> OuterState:
        """The first of these that is usable, or the initial parameters, unless the run began elsewhere."""
        for start in starts:
            if isinstance(start, OuterState):
                return start
            try:
                return await self._fetch_checkpoint(start)
            except RefusedError as error:
                _log.warning("checkpoint_passed_over", object=start.object.key, reason=str(error))
        if self._spec.start is not None:
            raise refused(RefusalCode.NOT_FOUND, f"stage {stage_index} has no checkpoint that can be read")
        return await self._offload(lambda: initial_anchor(self._spec, stage_index))

    async def _fetch_checkpoint(self, ref: CheckpointRef) -> OuterState:
        expected = checkpoint_spec(self._spec.stage_sizes[ref.stage_index])
        if ref.object.size_bytes != body_size(expected):
            raise refused(RefusalCode.BAD_TENSOR, f"checkpoint {ref.object.key} has the wrong size for its stage")
        buffer = await self._objects.get(ref.object)

        def read() -> OuterState:
            tensors = decode(buffer, expected, ref.object.size_bytes)
            check_finite(tensors)
            state = state_from_checkpoint(tensors, ref.outer_step)
            if state_digest(state) != ref.state_digest:
                raise refused(RefusalCode.DIGEST_MISMATCH, f"checkpoint {ref.object.key} is not the agreed state")
            return state

        return await self._offload(read)

    async def _advance(self, stage_index: int, state: OuterState, outer_step: int) -> OuterState:
        """Applies the manifests from the state's outer step up to, not including, the given one."""
        while state.outer_step < outer_step:
            manifests = (await self._orchestrator.manifests(stage_index, state.outer_step)).manifests
            if not manifests:
                raise refused(RefusalCode.NOT_FOUND, f"stage {stage_index} has no manifest of {state.outer_step}")
            for manifest in manifests[: outer_step - state.outer_step]:
                _check_next(manifest, stage_index, state.outer_step)
                state = await self.apply(state, manifest)
        return state

    async def apply(self, state: OuterState, manifest: Manifest) -> OuterState:
        """The state after the manifest's outer step: fetches the means and applies them. Raises RefusedError,
        TransportError; ValueError when the state does not stand at the manifest's outer step."""
        if manifest.outer_step != state.outer_step:
            raise ValueError(f"manifest of {manifest.outer_step} on a state of {state.outer_step}")
        partitions = partition_bounds(state.anchor_N.numel(), len(manifest.partitions))
        delivered = [
            (partition, merged.object)
            for partition, merged in zip(partitions, manifest.partitions, strict=True)
            if merged.object is not None
        ]
        for partition, ref in delivered:
            if ref.size_bytes != body_size(mean_spec(partition.num_params)):
                raise refused(RefusalCode.BAD_TENSOR, f"mean {ref.key} has the wrong size for its partition")
        buffers = await self._objects.get_many([ref for _, ref in delivered])

        def compute() -> OuterState:
            means: list[Tensor | None] = [None] * len(partitions)
            for (partition, _), buffer in zip(delivered, buffers, strict=True):
                means[partition.index] = _mean(partition, buffer)
            return apply_means(state, means, self._spec.outer)

        return await self._offload(compute)


def _mean(partition: Partition, buffer: bytearray) -> Tensor:
    tensors = decode(buffer, mean_spec(partition.num_params), len(buffer))
    check_finite(tensors)
    return tensors["mean"]


def _check_next(manifest: Manifest, stage_index: int, outer_step: int) -> None:
    in_order = [merged.partition_index for merged in manifest.partitions] == list(range(len(manifest.partitions)))
    if manifest.stage_index != stage_index or manifest.outer_step != outer_step or not in_order:
        raise refused(RefusalCode.MALFORMED, f"not the manifest of stage {stage_index}, outer step {outer_step}")
