"""Hands: what each failure means as an event, and applying a manifest twice. Desk: who waits is answered once."""

import asyncio
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest
import torch
from miner_kit import STATE_DIGEST, hotkey_of, make_spec, object_of

from orion.common.errors import ConfigError, TransportError
from orion.common.ids import MicrobatchId
from orion.common.net.anchor_loader import AnchorLoader
from orion.common.offload import in_place
from orion.common.protocol.codec import Body, encode
from orion.common.protocol.messages import (
    Accepted,
    Applied,
    CheckpointUploaded,
    Contribution,
    Done,
    Join,
    Joined,
    Lease,
    LeaseRequest,
    Manifest,
    Manifests,
    MergedPartition,
    ObjectRef,
    Reduced,
    RefusalCode,
    Report,
    Uploaded,
)
from orion.common.protocol.reduction import encode_slice
from orion.common.protocol.refusals import refused
from orion.common.protocol.signing import keypair_from_uri
from orion.common.train.anchor import initial_anchor
from orion.common.train.outer import weighted_mean_in_order
from orion.common.train.partition import partition_bounds
from orion.miner.cache import TensorCache
from orion.miner.config import MinerConfig
from orion.miner.desk import Desk
from orion.miner.effects import (
    Accept,
    ApplyManifest,
    FetchMean,
    FetchSlices,
    LoadAnchor,
    ReducePartition,
    Refuse,
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
    BodyEnded,
    CheckpointEnded,
    JoinEnded,
    LeaseRefused,
    MeanFetched,
    NoticeEnded,
    ReduceEnded,
    ReduceFailed,
    ReportEnded,
    SendOutcome,
    SlicesFetched,
    UploadEnded,
)
from orion.miner.hands import Deed, Ending, Hands, failed, size_bytes_max
from orion.miner.held_objects import HeldObjects
from orion.miner.memory_archive import MemoryArchive, MemoryDisk
from orion.miner.service import serve
from orion.miner.worker import DeviceWorker, TokenSource

SPEC = make_spec(3)
NOTICE = Applied(outer_step=0, state_digest=STATE_DIGEST)
AWAY = TransportError("away")
LEASE_REQUEST = LeaseRequest(outer_step=0, next_microbatch_id=MicrobatchId(0), num_microbatches=1)


def manifest_of(objects: Sequence[ObjectRef | None]) -> Manifest:
    partitions = tuple(
        MergedPartition(partition_index=index, object=ref, reducers=()) for index, ref in enumerate(objects)
    )
    return Manifest(stage_index=1, outer_step=0, partitions=partitions, contributors=(), total_microbatches=1)


@pytest.mark.parametrize(
    ("deed", "error", "ending"),
    [
        (RequestJoin(), AWAY, JoinEnded(None)),
        (
            RequestLease(LEASE_REQUEST),
            refused(RefusalCode.NO_WORK, "none", 0.7),
            LeaseRefused(0.7),
        ),
        (
            RequestLease(LEASE_REQUEST),
            AWAY,
            LeaseRefused(None),
        ),
        (SendReport(Report(sequence=3)), AWAY, ReportEnded(3, False)),
        (SendReport(Report(sequence=3)), refused(RefusalCode.NOT_MEMBER, "who?"), ReportEnded(3, False)),
        (SendReport(Report(sequence=3)), refused(RefusalCode.MALFORMED, "what?"), ReportEnded(3, True)),
        (SendNotice(NOTICE), AWAY, NoticeEnded(NOTICE, SendOutcome.UNREACHABLE)),
        (SendNotice(NOTICE), refused(RefusalCode.BUSY, "later"), NoticeEnded(NOTICE, SendOutcome.BUSY)),
        (SendNotice(NOTICE), refused(RefusalCode.WRONG_PHASE, "late"), NoticeEnded(NOTICE, SendOutcome.REFUSED)),
        (LoadAnchor(1, 0, None), AWAY, AnchorFailed("away")),
        (ApplyManifest(manifest_of([None])), TimeoutError("late"), ApplyFailed(0, "late")),
        (UploadPseudoGradient(2, ()), AWAY, UploadEnded(2, False)),
        (ReducePartition(1, 2, 0, ()), AWAY, ReduceFailed(2, 0, "away")),
        (FetchSlices(1, 2, 0, ()), AWAY, SlicesFetched(2, 0, False)),
        (FetchMean(1, 2, 0, object_of("mean")), AWAY, MeanFetched(2, 0, False)),
        (UploadCheckpoint(1, 2), AWAY, CheckpointEnded(2, None)),
    ],
)
def test_each_failure_is_an_event(deed: Deed, error: Exception, ending: Ending) -> None:
    assert failed(deed, error) == ending
    assert size_bytes_max(SPEC, deed) >= 0


class Store:
    """An orchestrator and object store that hold what a test puts there, and are away when told so."""

    def __init__(self) -> None:
        self.objects: dict[str, bytes] = {}
        self.is_away = False

    def add(self, key: str, body: Body) -> ObjectRef:
        self.objects[key] = body.tobytes()
        return ObjectRef(key=key, digest=body.digest, size_bytes=body.size_bytes)

    async def get(self, ref: ObjectRef) -> bytearray:
        return (await self.get_many([ref]))[0]

    async def get_many(self, refs: Sequence[ObjectRef], wait_s: float = 0.0) -> list[bytearray]:
        self._check()
        return [bytearray(self.objects[ref.key]) for ref in refs]

    async def put_many(self, bodies: Mapping[str, Body]) -> list[ObjectRef]:
        self._check()
        return [self.add(key, body) for key, body in bodies.items()]

    async def manifests(self, stage_index: int, from_outer_step: int) -> Manifests:
        self._check()
        return Manifests(manifests=())

    async def join(self, join: Join) -> Joined:
        raise AWAY

    async def lease(self, request: LeaseRequest) -> Lease:
        raise AWAY

    async def report(self, report: Report) -> Done:
        self._check()
        return Done()

    async def uploaded(self, uploaded: Uploaded) -> Done:
        return Done()

    async def reduced(self, reduced: Reduced) -> Done:
        return Done()

    async def applied(self, applied: Applied) -> Done:
        return Done()

    async def checkpoint(self, checkpoint: CheckpointUploaded) -> Done:
        return Done()

    def _check(self) -> None:
        if self.is_away:
            raise AWAY


def make_hands(store: Store) -> tuple[Hands, DeviceWorker]:
    archive = MemoryArchive(MemoryDisk(), 1 << 20)
    worker = DeviceWorker(
        SPEC,
        hotkey_of(1, 0),
        cache=TensorCache(6),
        evidence=archive,
        device=torch.device("cpu"),
        compute_dtype=torch.float32,
    )

    async def open_tokens() -> TokenSource:
        raise AssertionError("only the first stage needs data")

    hands = Hands(
        SPEC,
        hotkey_of(1, 0),
        join=Join(url="http://miner:1", device="cpu", memory_bytes=0),
        orchestrator=store,
        objects=HeldObjects(store, store),
        anchors=AnchorLoader(store, store, SPEC, in_place),
        worker=worker,
        archive=archive,
        open_tokens=open_tokens,
        on_device=in_place,
        offload=in_place,
    )
    return hands, worker


async def test_an_anchor_is_loaded_and_a_manifest_applied_once_only() -> None:
    store = Store()
    hands, worker = make_hands(store)
    loaded = await hands.carry_out(LoadAnchor(1, 0, None))
    assert isinstance(loaded, AnchorLoaded)
    num_params = SPEC.stage_sizes[1]
    refs: list[ObjectRef | None] = [
        store.add(f"outer/0/stage/1/mean{part.index}", encode({"mean": torch.full((part.num_params,), 0.01)}))
        for part in partition_bounds(num_params, SPEC.num_partitions)
    ]
    refs[1] = None
    before = initial_anchor(SPEC, 1).anchor_N

    first = await hands.carry_out(ApplyManifest(manifest_of(refs)))
    again = await hands.carry_out(ApplyManifest(manifest_of(refs)))

    assert isinstance(first, ApplyEnded) and first == again
    assert first.state_digest != loaded.state_digest
    state = worker.outer_state
    assert state is not None and state.outer_step == 1
    untouched = partition_bounds(num_params, SPEC.num_partitions)[1]
    moved = state.anchor_N != before
    assert not bool(moved[untouched.start : untouched.end].any())
    assert bool(moved[: untouched.start].all())


async def test_a_store_that_is_away_fails_what_was_asked_and_nothing_else() -> None:
    store = Store()
    hands, worker = make_hands(store)
    await hands.carry_out(LoadAnchor(1, 0, None))
    before = worker.outer_state
    store.is_away = True

    assert await hands.carry_out(ApplyManifest(manifest_of([object_of("m")] * 3))) == ApplyFailed(
        0, "bad_tensor: mean outer/0/m has the wrong size for its partition"
    )
    assert await hands.carry_out(UploadCheckpoint(1, 0)) == CheckpointEnded(0, None)
    assert await hands.carry_out(SendReport(Report(sequence=0))) == ReportEnded(0, False)
    assert await hands.carry_out(UploadPseudoGradient(0, (object_of("gone"),))) == UploadEnded(0, False)
    assert worker.outer_state is before


async def test_what_was_fetched_ahead_is_reduced_ahead_unless_the_plan_changes() -> None:
    store = Store()
    hands, _ = make_hands(store)
    part = partition_bounds(SPEC.stage_sizes[1], SPEC.num_partitions)[0]
    contributions = tuple(
        Contribution(
            hotkey=hotkey_of(1, index),
            num_microbatches=index + 1,
            objects=(store.add(f"slice{index}", encode_slice("none", torch.full((part.num_params,), 1.0 + index))),),
        )
        for index in range(2)
    )
    assert await hands.carry_out(FetchSlices(1, 0, 0, contributions)) == SlicesFetched(0, 0, True)
    kept, store.objects = store.objects, {}

    ended = await hands.carry_out(ReducePartition(1, 0, 0, contributions, writes=False))

    assert isinstance(ended, ReduceEnded) and ended.object is not None and not ended.is_stored
    values = [torch.full((part.num_params,), 1.0 + index) for index in range(2)]
    expected = encode({"mean": weighted_mean_in_order([(1.0, values[0]), (2.0, values[1])])})
    assert ended.object.digest == expected.digest
    written = await hands.carry_out(ReducePartition(1, 0, 0, contributions, writes=True))
    assert isinstance(written, ReduceEnded) and written.object == ended.object and written.is_stored
    assert store.objects[ended.object.key] == expected.tobytes()

    store.objects = kept
    weighed = (contributions[0], contributions[1].model_copy(update={"num_microbatches": 1}))
    other = await hands.carry_out(ReducePartition(1, 0, 0, weighed, writes=False))
    assert isinstance(other, ReduceEnded) and other.object is not None
    assert other.object.digest == encode({"mean": torch.full((part.num_params,), 1.5)}).digest


async def test_who_waits_at_the_desk_is_answered_once() -> None:
    desk = Desk()
    request_id = desk.new_request_id()
    asking = asyncio.create_task(desk.ask(BodyEnded(request_id, None)))
    assert await desk.next_event(1.0) == BodyEnded(request_id, None)

    desk.answer(Accept(request_id, Accepted(credits=1, queued=0)))
    desk.answer(Refuse(request_id, refused(RefusalCode.BUSY, "again").refusal))

    assert await asking == Accept(request_id, Accepted(credits=1, queued=0))
    assert await desk.next_event(0.0) is None


async def test_an_address_that_nobody_can_reach_is_told_in_one_line(tmp_path: Path) -> None:
    config = MinerConfig(
        orchestrator_url="http://127.0.0.1:1", data_folder=tmp_path, state_folder=tmp_path, host="0.0.0.0"
    )

    with pytest.raises(ConfigError, match="public_url"):
        await serve(config, keypair_from_uri("//miner"))
