"""The orchestrator's callers against a server of its framework: routes, objects through granted URLs, anchors."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path

import pytest
import torch
from blake3 import blake3
from net_loopback import CLIENT_KEY, SERVER, serve_starlette
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from orion.common.clock import SystemClock
from orion.common.config import RunSpec
from orion.common.errors import TransportError
from orion.common.ids import Digest
from orion.common.net.anchor_loader import AnchorLoader
from orion.common.net.directory_store import DirectoryStore
from orion.common.net.gate import Gate
from orion.common.net.http import HttpClient
from orion.common.net.object_client import ObjectClient
from orion.common.net.object_routes import OBJECT_ROUTE, GrantRoutes, ObjectRoutes
from orion.common.net.orchestrator_client import OrchestratorClient
from orion.common.net.rpc import RpcClient
from orion.common.net.starlette_server import install, json_answer, read_bounded, signed_json, verify_starlette
from orion.common.net.url_signer import UrlSigner
from orion.common.protocol import routes
from orion.common.protocol.codec import Body, encode
from orion.common.protocol.messages import (
    CheckpointRef,
    Feed,
    Manifest,
    ManifestQuery,
    Manifests,
    MergedPartition,
    ObjectRef,
    RefusalCode,
    RunInfo,
    UploadRequest,
)
from orion.common.protocol.records import (
    Losses,
    LossQuery,
)
from orion.common.protocol.refusals import RefusedError, refused
from orion.common.protocol.signing import Verifier
from orion.common.train.anchor import apply_means, checkpoint_tensors, initial_anchor
from orion.common.train.outer import OuterState, state_digest
from orion.common.train.partition import partition_bounds

DATA = bytes(range(256)) * 40_000
"""10 MB: several writes."""


class Orchestrator:
    """Serves what is put into it; decides nothing."""

    def __init__(self, spec: RunSpec, root: Path) -> None:
        self.spec = spec
        self.clock = SystemClock()
        self.signer = UrlSigner(b"s" * 32)
        self.store = DirectoryStore(root, self.signer)
        self.manifests: list[Manifest] = []
        self.num_grant_requests = 0
        self.expires_in_s = 60.0

    def app(self) -> Starlette:
        objects = ObjectRoutes(self.store, self.signer, self.clock)
        served: list[tuple[str, str, Callable[[Request], Awaitable[Response]]]] = [
            ("GET", routes.RUN, self.run),
            ("GET", routes.FEED, self.feed),
            ("POST", routes.LOSSES, self.losses),
            ("POST", routes.MANIFESTS, self.answer_manifests),
            ("POST", routes.GRANTS, self.grants),
            ("POST", routes.UPLOADS, self.uploads),
            ("POST", routes.COMPLETE, self.complete),
            ("GET", routes.DATA + "/{name}", self.data),
            ("PUT", OBJECT_ROUTE, objects.put),
            ("GET", OBJECT_ROUTE, objects.get),
        ]
        app = Starlette(routes=[Route(path, handler, methods=[method]) for method, path, handler in served])
        install(app, Gate(Verifier(SERVER), self.spec.digest, self.clock))
        return app

    async def run(self, request: Request) -> Response:
        return json_answer(RunInfo(orchestrator=SERVER, spec=self.spec.model_dump(mode="json")))

    async def feed(self, request: Request) -> Response:
        verify_starlette(request, b"")
        assert float(request.query_params["wait_s"]) <= routes.FEED_WAIT_S_MAX
        version = int(request.query_params["since"]) + 1
        feed = Feed(
            version=version,
            now_s=0.0,
            finished=False,
            assignment=None,
            stages=(),
            peers=(),
            merge_plan=None,
            manifest=None,
            validators=(),
        )
        return json_answer(feed)

    async def losses(self, request: Request) -> Response:
        query = LossQuery.model_validate_json(await read_bounded(request, 1000))
        return json_answer(Losses(points=(), total=query.offset))

    async def answer_manifests(self, request: Request) -> Response:
        _, query = await signed_json(request, ManifestQuery)
        found = [
            manifest
            for manifest in self.manifests
            if manifest.stage_index == query.stage_index and manifest.outer_step >= query.from_outer_step
        ]
        return json_answer(Manifests(manifests=tuple(found[:2])))

    def _granting(self) -> GrantRoutes:
        self.num_grant_requests += 1
        return GrantRoutes(self.store, self.clock, self.expires_in_s, lambda *_: None)

    async def grants(self, request: Request) -> Response:
        return await self._granting().grants(request)

    async def uploads(self, request: Request) -> Response:
        return await self._granting().uploads(request)

    async def complete(self, request: Request) -> Response:
        return await self._granting().complete(request)

    async def data(self, request: Request) -> Response:
        verify_starlette(request, b"")
        if request.path_params["name"] != "shard 0.bin":
            raise refused(RefusalCode.NOT_FOUND, "no such file")
        return Response(DATA)


@pytest.fixture
def orchestrator(spec: RunSpec, tmp_path: Path) -> Orchestrator:
    return Orchestrator(spec, tmp_path / "store")


@pytest.fixture
async def base_url(orchestrator: Orchestrator) -> AsyncIterator[str]:
    async with serve_starlette(orchestrator.app()) as url:
        yield url


@pytest.fixture
async def client(spec: RunSpec, base_url: str) -> AsyncIterator[OrchestratorClient]:
    async with RpcClient(CLIENT_KEY, spec.digest) as rpc:
        yield OrchestratorClient(rpc, base_url, SERVER)


@pytest.fixture
def objects(client: OrchestratorClient) -> ObjectClient:
    return ObjectClient(client)


async def refusal_code(awaitable: Awaitable[object]) -> RefusalCode:
    with pytest.raises(RefusedError) as caught:
        await awaitable
    return caught.value.code


# --- routes -----------------------------------------------------------------------------------------------------------


async def test_the_run_is_read_back_with_the_same_digest(spec: RunSpec, base_url: str) -> None:
    async with HttpClient() as http:
        found, hotkey = await OrchestratorClient.run_spec(http, base_url)
        assert (await OrchestratorClient.losses(http, base_url, 5)).total == 5
    assert found == spec
    assert found.digest == spec.digest
    assert hotkey == SERVER


async def test_the_feed_is_asked_for_what_comes_after(client: OrchestratorClient) -> None:
    assert (await client.feed(7, 100.0)).version == 8


async def test_a_data_file_is_fetched_whole_or_not_at_all(client: OrchestratorClient, tmp_path: Path) -> None:
    target = tmp_path / "shard"
    size = len(DATA)
    digest = await client.fetch_data_file("shard 0.bin", target, size_bytes_max=size, timeout_s=30)
    assert digest == blake3(DATA).hexdigest()
    assert await asyncio.to_thread(target.read_bytes) == DATA
    other = tmp_path / "other"
    for name, limit in (("shard 0.bin", size - 1), ("nothing", size)):
        with pytest.raises(RefusedError):
            await client.fetch_data_file(name, other, size_bytes_max=limit, timeout_s=30)
    assert await asyncio.to_thread(lambda: {path.name for path in tmp_path.iterdir()}) == {"shard", "store"}


# --- objects ----------------------------------------------------------------------------------------------------------


def body_of(value: float, num_params: int = 1000) -> Body:
    return encode({"mean": torch.full((num_params,), value)})


async def upload_url(client: OrchestratorClient, key: str, size_bytes: int) -> str:
    ref = ObjectRef(key=key, digest=Digest("0" * 64), size_bytes=size_bytes)
    (grant,) = (await client.uploads(UploadRequest(objects=(ref,)))).grants
    return grant.parts[0].url


async def test_objects_are_written_and_read_with_one_request_for_grants(
    orchestrator: Orchestrator, objects: ObjectClient
) -> None:
    bodies = {f"outer/0/{index}": body_of(index, 100 * index) for index in range(12)}
    refs = await objects.put_many(bodies)
    assert orchestrator.num_grant_requests == 1
    found = await objects.get_many(refs)
    assert orchestrator.num_grant_requests == 2
    assert [bytes(data) for data in found] == [body.tobytes() for body in bodies.values()]
    assert [ref.key for ref in refs] == list(bodies)
    assert await objects.put_many(bodies) == refs
    assert await objects.put_many({}) == await objects.get_many([]) == []


async def test_what_the_store_refuses_comes_back_as_a_refusal(
    orchestrator: Orchestrator, client: OrchestratorClient, objects: ObjectClient
) -> None:
    ref = await objects.put("a/b", body_of(1.0))
    assert await refusal_code(objects.put("a/b", body_of(2.0))) is RefusalCode.CONFLICT
    absent = ref.model_copy(update={"key": "a/c"})
    assert await refusal_code(objects.get_many([ref, absent])) is RefusalCode.NOT_FOUND
    url = await upload_url(client, "a/d", 10)
    too_large = client.rpc.http.read("PUT", client.base_url + url, data=b"x" * 11, timeout_s=5)
    assert await refusal_code(too_large) is RefusalCode.TOO_LARGE
    orchestrator.expires_in_s = -10.0
    assert await refusal_code(objects.get(ref)) is RefusalCode.FORBIDDEN


async def test_an_object_that_is_not_what_its_reference_says_is_refused(objects: ObjectClient) -> None:
    ref = await objects.put("a/b", body_of(1.0))
    other = Digest("0" * 64)
    for changed, code in (
        ({"digest": other}, RefusalCode.DIGEST_MISMATCH),
        ({"size_bytes": ref.size_bytes - 1}, RefusalCode.TOO_LARGE),
        ({"size_bytes": 2**50}, RefusalCode.BAD_TENSOR),
    ):
        assert await refusal_code(objects.get(ref.model_copy(update=changed))) is code


async def test_an_upload_that_breaks_off_is_not_there(
    orchestrator: Orchestrator, client: OrchestratorClient, objects: ObjectClient
) -> None:
    body = body_of(1.0)
    shortened = Body(body.header, body.parts[:-1], body.size_bytes, body.digest)
    url = client.base_url + await upload_url(client, "a/b", body.size_bytes)
    with pytest.raises((TransportError, RefusedError)):
        async with client.rpc.http.open("PUT", url, data=shortened, timeout_s=0.5):
            pass
    assert await orchestrator.store.stat("a/b") is None
    await objects.put("a/b", body)


# --- anchors ----------------------------------------------------------------------------------------------------------


class Record:
    """A stage's history, made as its replicas would make it."""

    def __init__(self, spec: RunSpec, orchestrator: Orchestrator, objects: ObjectClient) -> None:
        self.spec = spec
        self.orchestrator = orchestrator
        self.objects = objects
        self.states = [initial_anchor(spec, 1)]

    async def outer_step(self, absent: tuple[int, ...] = ()) -> None:
        state = self.states[-1]
        generator = torch.Generator().manual_seed(state.outer_step)
        means: list[torch.Tensor | None] = []
        merged: list[MergedPartition] = []
        for part in partition_bounds(state.anchor_N.numel(), self.spec.num_partitions):
            mean_N = None if part.index in absent else torch.randn(part.num_params, generator=generator)
            key = f"outer/{state.outer_step}/{part.index}"
            ref = None if mean_N is None else await self.objects.put(key, encode({"mean": mean_N}))
            means.append(mean_N)
            merged.append(MergedPartition(partition_index=part.index, object=ref, reducers=()))
        self.orchestrator.manifests.append(
            Manifest(
                stage_index=1,
                outer_step=state.outer_step,
                partitions=tuple(merged),
                contributors=(),
                total_microbatches=1,
            )
        )
        self.states.append(apply_means(state, means, self.spec.outer))

    async def checkpoint(self, outer_step: int, content: OuterState | None = None) -> CheckpointRef:
        """Of `outer_step`; with another state's content where one is given."""
        agreed = self.states[outer_step]
        body = encode(checkpoint_tensors(content if content is not None else agreed))
        return CheckpointRef(
            stage_index=1,
            outer_step=outer_step,
            object=await self.objects.put(f"checkpoint/{outer_step}", body),
            state_digest=state_digest(agreed),
        )

    async def forget(self, outer_step: int) -> None:
        await self.orchestrator.store.delete_prefix(f"outer/{outer_step}/")


@pytest.fixture
async def record(spec: RunSpec, orchestrator: Orchestrator, objects: ObjectClient) -> Record:
    record = Record(spec, orchestrator, objects)
    for absent in ((), (1,), (), (0, 1, 2, 3), ()):
        await record.outer_step(absent)
    return record


@pytest.fixture
def loader(client: OrchestratorClient, objects: ObjectClient, spec: RunSpec) -> AnchorLoader:
    return AnchorLoader(client, objects, spec)


async def test_every_anchor_follows_from_the_seed_and_the_manifests(record: Record, loader: AnchorLoader) -> None:
    for outer_step in (0, 1, 5):
        state = await loader.load(1, outer_step)
        assert state_digest(state) == state_digest(record.states[outer_step])


async def test_the_newest_start_is_taken(record: Record, loader: AnchorLoader) -> None:
    checkpoint = await record.checkpoint(3)
    for forgotten in (0, 1, 2):
        await record.forget(forgotten)
    wanted = state_digest(record.states[5])
    assert state_digest(await loader.load(1, 5, checkpoint)) == wanted
    assert state_digest(await loader.load(1, 5, None, held=record.states[4])) == wanted
    assert await refusal_code(loader.load(1, 5)) is RefusalCode.NOT_FOUND
    assert await refusal_code(loader.load(1, 2, checkpoint, held=record.states[4])) is RefusalCode.NOT_FOUND


async def test_a_checkpoint_that_is_not_the_agreed_state_is_passed_over(record: Record, loader: AnchorLoader) -> None:
    forged = await record.checkpoint(3, content=record.states[2])
    assert state_digest(await loader.load(1, 5, forged)) == state_digest(record.states[5])
    await record.forget(0)
    assert await refusal_code(loader.load(1, 5, forged)) is RefusalCode.NOT_FOUND


async def test_a_checkpoint_of_another_size_is_not_fetched(
    record: Record, loader: AnchorLoader, objects: ObjectClient
) -> None:
    ref: ObjectRef = await objects.put("small", body_of(1.0))
    checkpoint = CheckpointRef(stage_index=1, outer_step=3, object=ref, state_digest=Digest("0" * 64))
    assert state_digest(await loader.load(1, 4, checkpoint)) == state_digest(record.states[4])


async def test_an_anchor_that_is_still_to_come_is_not_found(record: Record, loader: AnchorLoader) -> None:
    assert await refusal_code(loader.load(1, 6)) is RefusalCode.NOT_FOUND


async def test_a_mean_that_is_not_finite_is_refused(
    record: Record, loader: AnchorLoader, objects: ObjectClient
) -> None:
    state = record.states[-1]
    parts = partition_bounds(state.anchor_N.numel(), 1)
    ref = await objects.put("bad", body_of(float("inf"), parts[0].num_params))
    manifest = Manifest(
        stage_index=1,
        outer_step=5,
        partitions=(MergedPartition(partition_index=0, object=ref, reducers=()),),
        contributors=(),
        total_microbatches=0,
    )
    assert await refusal_code(loader.apply(state, manifest)) is RefusalCode.NOT_FINITE
    with pytest.raises(ValueError, match="manifest of 5"):
        await loader.apply(record.states[0], manifest)
