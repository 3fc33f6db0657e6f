"""Carries out the core's effects towards the orchestrator, the store and the device.

Owns what each failure means as an event; decides nothing and keeps no state of its own. Every effect ends as exactly
one event, whatever happens; only a mistake of our own, or of the user (`DataError`), raises. What it asks and where it
computes is given to it, so that it needs no event loop: the simulator runs it too. Time limits are the caller's, who
turns one that has passed into the event of `failed`.
"""

from collections.abc import Awaitable, Callable
from functools import partial
from typing import Protocol

from orion.common.config import RunSpec
from orion.common.errors import TransportError
from orion.common.ids import Hotkey
from orion.common.net.anchor_loader import AnchorLoader
from orion.common.net.state_fetcher import StatePeers, fetch_state
from orion.common.offload import Offload, in_thread
from orion.common.protocol.keys import reduced_key
from orion.common.protocol.messages import (
    Applied,
    CheckpointUploaded,
    Done,
    Join,
    Joined,
    Lease,
    LeaseRequest,
    ObjectRef,
    Reduced,
    Refusal,
    RefusalCode,
    Report,
    StateQuery,
    Uploaded,
)
from orion.common.protocol.reduction import Place, Reduction, reduce_partition, slice_refs, slices_in_order
from orion.common.protocol.refusals import RefusedError
from orion.common.train.outer import OuterState, state_digest
from orion.common.train.partition import Partition, partition_bounds
from orion.common.train.slice_codec import slice_codec
from orion.miner.archive import Archive
from orion.miner.effects import (
    ApplyManifest,
    Compute,
    FetchMean,
    FetchMerged,
    FetchSlices,
    LoadAnchor,
    PersistLog,
    ReducePartition,
    RequestJoin,
    RequestLease,
    SendNotice,
    SendReport,
    UploadCheckpoint,
    UploadPseudoGradient,
)
from orion.miner.events import (
    AnchorFailed,
    AnchorLoaded,
    ApplyEnded,
    ApplyFailed,
    CheckpointEnded,
    ComputeEnded,
    JoinEnded,
    LeaseGranted,
    LeaseRefused,
    LogPersisted,
    MeanFetched,
    MergedFetched,
    MergedNotFetched,
    NoticeEnded,
    ReduceEnded,
    ReduceFailed,
    ReportEnded,
    SendOutcome,
    SlicesFetched,
    UploadEnded,
)
from orion.miner.held_objects import HeldObjects
from orion.miner.worker import DeviceWorker, TokenSource

SLICES_WAIT_S = 1.0
"""What a question for a slice that is on its way may wait for it, where the store can tell when it comes."""

Question = RequestJoin | RequestLease | SendReport | SendNotice
"""One request to the orchestrator."""
Errand = (
    LoadAnchor
    | ApplyManifest
    | FetchMerged
    | UploadPseudoGradient
    | ReducePartition
    | FetchSlices
    | FetchMean
    | UploadCheckpoint
)
"""Several requests, tensors and computing."""
Deed = Question | Errand
"""Effects that are carried out here and may fail."""

Ending = (
    JoinEnded
    | LeaseGranted
    | LeaseRefused
    | ReportEnded
    | NoticeEnded
    | AnchorLoaded
    | AnchorFailed
    | ApplyEnded
    | ApplyFailed
    | MergedFetched
    | MergedNotFetched
    | UploadEnded
    | ReduceEnded
    | ReduceFailed
    | SlicesFetched
    | MeanFetched
    | CheckpointEnded
)
"""The events that they end as."""

DATA_BYTES = float(1 << 31)
"""Of the run's data that one attempt must manage to fetch: a few files. Whole files stay for the next attempt."""

_REPEATED = frozenset({RefusalCode.BUSY, RefusalCode.NOT_MEMBER, RefusalCode.BAD_SIGNATURE})
"""Refusals of a report that another attempt may not meet; any other would come again for ever."""


class Orchestrator(Protocol):
    """What is asked of the orchestrator (`OrchestratorClient`)."""

    async def join(self, join: Join) -> Joined: ...

    async def lease(self, request: LeaseRequest) -> Lease: ...

    async def report(self, report: Report) -> Done: ...

    async def uploaded(self, uploaded: Uploaded) -> Done: ...

    async def reduced(self, reduced: Reduced) -> Done: ...

    async def applied(self, applied: Applied) -> Done: ...

    async def checkpoint(self, checkpoint: CheckpointUploaded) -> Done: ...


class Hands:
    """What one miner acts with."""

    def __init__(
        self,
        spec: RunSpec,
        hotkey: Hotkey,
        *,
        join: Join,
        orchestrator: Orchestrator,
        objects: HeldObjects,
        anchors: AnchorLoader,
        worker: DeviceWorker,
        archive: Archive,
        open_tokens: Callable[[], Awaitable[TokenSource]],
        on_device: Offload,
        offload: Offload = in_thread,
        state_peers: StatePeers | None = None,
    ) -> None:
        """`anchors` should read from `objects`, so that means that are held need no fetching. `open_tokens` gets the
        run's data, once, when the first stage is assigned. `on_device` computes with the worker, one thing after the
        other; `offload` computes anything else. `state_peers` asks other replicas for their anchor; None: only the
        store is asked."""
        self._spec = spec
        self._hotkey = hotkey
        self._join = join
        self._orchestrator = orchestrator
        self._objects = objects
        self._anchors = anchors
        self._worker = worker
        self._archive = archive
        self._open_tokens = open_tokens
        self._on_device = on_device
        self._offload = offload
        self._state_peers = state_peers

    async def compute(self, effect: Compute) -> ComputeEnded:
        """Has the device do a job."""
        return ComputeEnded(await self._on_device(partial(self._worker.run, effect.job)))

    async def persist(self, effect: PersistLog) -> LogPersisted:
        """Makes a log durable, beside the device. Raises DataError."""
        persist = partial(self._archive.persist, effect.stage_index, effect.entries, effect.commitment)
        return LogPersisted(await self._offload(persist))

    async def carry_out(self, deed: Deed) -> Ending:
        """Does it, and gives the event that it ends as. Raises DataError."""
        try:
            return await self.attempt(deed)
        except (TransportError, RefusedError) as error:
            return failed(deed, error)

    async def attempt(self, deed: Deed) -> Ending:
        """Does it, and gives the event of success. Raises TransportError and RefusedError too: see `failed`."""
        match deed:
            case LoadAnchor():
                return await self._load(deed)
            case ApplyManifest():
                return await self._apply(deed)
            case FetchMerged():
                return await self._fetch_merged(deed)
            case UploadPseudoGradient():
                return await self._upload(deed)
            case ReducePartition():
                return await self._reduce(deed)
            case FetchSlices() | FetchMean():
                return await self._fetch_ahead(deed)
            case UploadCheckpoint():
                return await self._upload_checkpoint(deed)
            case _:
                return await self._ask(deed)

    async def _ask(self, question: Question) -> Ending:
        match question:
            case RequestJoin():
                return JoinEnded(await self._orchestrator.join(self._join))
            case RequestLease(request):
                return LeaseGranted(await self._orchestrator.lease(request))
            case SendReport(report):
                await self._orchestrator.report(report)
                return ReportEnded(report.sequence, acknowledged=True)
            case SendNotice():
                return await self._notify(question)

    async def _notify(self, deed: SendNotice) -> Ending:
        match deed.notice:
            case Uploaded() as uploaded:
                await self._orchestrator.uploaded(uploaded)
            case Reduced() as reduced:
                await self._orchestrator.reduced(reduced)
            case Applied() as applied:
                await self._orchestrator.applied(applied)
            case CheckpointUploaded() as checkpoint:
                await self._orchestrator.checkpoint(checkpoint)
        return NoticeEnded(deed.notice, SendOutcome.ACCEPTED)

    async def _load(self, deed: LoadAnchor) -> Ending:
        if deed.stage_index == 0 and self._worker.tokens is None:
            self._worker.tokens = await self._open_tokens()
        state = await self._from_replicas(deed)
        if state is None:
            state = await self._anchors.load(deed.stage_index, deed.outer_step, deed.checkpoint)
        digest = await self._on_device(partial(self._worker.load, deed.stage_index, state))
        self._objects.clear()
        return AnchorLoaded(deed.stage_index, deed.outer_step, digest)

    async def _from_replicas(self, deed: LoadAnchor) -> OuterState | None:
        """The anchor from those who hold it; None when they cannot give the whole of it: the store can."""
        if deed.agreed is None or self._state_peers is None:
            return None
        wanted = StateQuery(stage_index=deed.stage_index, outer_step=deed.outer_step, state_digest=deed.agreed)
        num_params = self._spec.stage_sizes[deed.stage_index]
        return await fetch_state(self._state_peers, wanted, num_params, deed.holders)

    async def _apply(self, deed: ApplyManifest) -> Ending:
        before = self._worker.outer_state
        assert before is not None, "a manifest is applied to nothing"
        outer_step = deed.manifest.outer_step
        if before.outer_step == outer_step + 1:
            # An earlier attempt got through to the device although its time was up.
            return ApplyEnded(outer_step, await self._offload(partial(state_digest, before)))
        after = await self._anchors.apply(before, deed.manifest)
        digest = await self._on_device(partial(self._worker.load, deed.manifest.stage_index, after))
        self._objects.clear()
        return ApplyEnded(outer_step, digest)

    async def _fetch_merged(self, deed: FetchMerged) -> Ending:
        outer_step = deed.manifest.outer_step
        before = self._worker.outer_state
        if before is None or before.outer_step != outer_step:
            return MergedNotFetched(outer_step, "the engine stands elsewhere by now")
        after = await self._anchors.apply(before, deed.manifest)
        digest = await self._offload(partial(state_digest, after))
        if self._worker.outer_state is not before:
            return MergedNotFetched(outer_step, "the engine stands elsewhere by now")
        self._worker.merged = after
        self._objects.clear()
        return MergedFetched(outer_step, digest)

    async def _upload(self, deed: UploadPseudoGradient) -> Ending:
        outbox = self._worker.outbox
        if any(ref.key not in outbox for ref in deed.objects):
            return UploadEnded(deed.outer_step, succeeded=False)  # the stage has gone on meanwhile
        for ref in deed.objects:
            self._objects.hold(outbox[ref.key])
        await self._objects.put_many({ref.key: outbox[ref.key] for ref in deed.objects})
        for ref in deed.objects:
            self._worker.outbox.pop(ref.key, None)
        return UploadEnded(deed.outer_step, succeeded=True)

    async def _reduce(self, deed: ReducePartition) -> Ending:
        index, refs = deed.partition_index, self._slices(deed)
        reduction = await self._reduction(deed, refs)
        if reduction.mean is None:
            return ReduceEnded(deed.outer_step, index, None, reduction.excluded)
        mean = reduction.mean
        self._objects.hold(mean)
        self._objects.release(refs.values())
        key = reduced_key(deed.outer_step, deed.stage_index, self._hotkey, index)
        if deed.writes:
            (ref,) = await self._objects.put_many({key: mean})
        else:
            ref = ObjectRef(key=key, digest=mean.digest, size_bytes=mean.size_bytes)
        return ReduceEnded(deed.outer_step, index, ref, reduction.excluded, is_stored=deed.writes)

    async def _fetch_ahead(self, deed: FetchSlices | FetchMean) -> Ending:
        if isinstance(deed, FetchMean):
            return _fetched(deed, is_complete=await self._objects.fetch([deed.object]))
        refs = self._slices(deed)
        is_complete = await self._objects.fetch(refs.values(), SLICES_WAIT_S)
        if is_complete:
            # Most plans stay as they are until they are final: then this is what will be due.
            await self._reduction(deed, refs)
        return _fetched(deed, is_complete=is_complete)

    async def _reduction(self, deed: ReducePartition | FetchSlices, refs: dict[Place, ObjectRef]) -> Reduction:
        """What the partition's slices make, which is held from then on."""
        inputs = (deed.stage_index, deed.partition_index, deed.contributions)
        held = self._objects.reduction(inputs)
        if held is not None:
            return held
        bodies = dict(zip(refs, await self._objects.get_many(list(refs.values())), strict=True))
        slices = slices_in_order(deed.contributions, bodies)
        partition = self._partition(deed)
        codec = slice_codec(self._spec, deed.stage_index, partition)
        reduce = partial(reduce_partition, codec, partition.num_params, slices, self._spec.mean)
        reduction = await self._offload(reduce)
        self._objects.hold_reduction(inputs, reduction)
        return reduction

    def _partition(self, deed: ReducePartition | FetchSlices) -> Partition:
        bounds = partition_bounds(self._spec.stage_sizes[deed.stage_index], self._spec.num_partitions)
        return bounds[deed.partition_index]

    def _slices(self, deed: ReducePartition | FetchSlices) -> dict[Place, ObjectRef]:
        """What a partition is reduced from."""
        partition = self._partition(deed)
        codec = slice_codec(self._spec, deed.stage_index, partition)
        return slice_refs(codec, partition.num_params, deed.contributions, deed.partition_index)

    async def _upload_checkpoint(self, deed: UploadCheckpoint) -> Ending:
        # Beside the device: the anchor's tensors are never written to.
        encoded = await self._offload(partial(self._worker.encode_checkpoint, deed.stage_index, deed.outer_step))
        if encoded is None:
            return CheckpointEnded(deed.outer_step, None)
        key, body = encoded
        (ref,) = await self._objects.put_many({key: body})
        return CheckpointEnded(deed.outer_step, ref)


def failed(deed: Deed, error: Exception) -> Ending:
    """The event that an effect ends as when it has come to nothing."""
    match deed:
        case LoadAnchor():
            return AnchorFailed(str(error))
        case ApplyManifest(manifest):
            return ApplyFailed(manifest.outer_step, str(error))
        case FetchMerged(manifest):
            return MergedNotFetched(manifest.outer_step, str(error))
        case UploadPseudoGradient():
            return UploadEnded(deed.outer_step, succeeded=False)
        case ReducePartition():
            return ReduceFailed(deed.outer_step, deed.partition_index, str(error))
        case FetchSlices() | FetchMean():
            return _fetched(deed, is_complete=False)
        case UploadCheckpoint():
            return CheckpointEnded(deed.outer_step, None)
        case _:
            return _not_granted(deed, error.refusal if isinstance(error, RefusedError) else None)


def _fetched(deed: FetchSlices | FetchMean, *, is_complete: bool) -> Ending:
    kind = MeanFetched if isinstance(deed, FetchMean) else SlicesFetched
    return kind(deed.outer_step, deed.partition_index, is_complete)


def _not_granted(question: Question, refusal: Refusal | None) -> Ending:
    """What a refusal means; None: the orchestrator was not reached."""
    match question:
        case RequestJoin():
            return JoinEnded(None)
        case RequestLease():
            return LeaseRefused(None if refusal is None else refusal.retry_after_s)
        case SendReport(report):
            return ReportEnded(report.sequence, acknowledged=refusal is not None and refusal.code not in _REPEATED)
        case SendNotice(notice):
            if refusal is None:
                return NoticeEnded(notice, SendOutcome.UNREACHABLE)
            is_final = refusal.retry_after_s is None and refusal.code is not RefusalCode.BUSY
            return NoticeEnded(notice, SendOutcome.REFUSED if is_final else SendOutcome.BUSY)


def size_bytes_max(spec: RunSpec, deed: Deed) -> float:
    """The most bytes that carrying out an effect may move, for its time limit."""
    match deed:
        case RequestJoin() | RequestLease() | SendReport() | SendNotice():
            return 0.0
        case LoadAnchor():
            # A checkpoint (anchor and momentum) and the means since it; on the first stage perhaps the data.
            anchor_bytes = spec.stage_sizes[deed.stage_index] * (8.0 + 4.0 * spec.keep_outer_steps)
            return anchor_bytes + (DATA_BYTES if deed.stage_index == 0 else 0.0)
        case ApplyManifest(manifest) | FetchMerged(manifest):
            return spec.stage_sizes[manifest.stage_index] * 4.0
        case UploadPseudoGradient():
            return float(sum(ref.size_bytes for ref in deed.objects))
        case FetchMean(_, _, _, ref):
            return float(ref.size_bytes)
        case ReducePartition() | FetchSlices():
            # Every contribution's slice, and the mean; no slice is larger than fp32.
            partition_bytes = 4.0 * (spec.stage_sizes[deed.stage_index] // spec.num_partitions + 1)
            return partition_bytes * (len(deed.contributions) + 1)
        case UploadCheckpoint():
            return spec.stage_sizes[deed.stage_index] * 8.0
