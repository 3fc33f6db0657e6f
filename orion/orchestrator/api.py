"""The orchestrator's routes (docs/PROTOCOL.md, section 2).

Owns how requests reach the core and its views; decides nothing itself. Cheap refusals come first: size, protocol and
run, signature, registration; only then is the core asked. There is no answer 200 that means failure.
"""

import asyncio
from collections.abc import Awaitable, Callable, Hashable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from fastapi import FastAPI, Query
from fastapi import Request as HttpRequest
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, generate_latest
from starlette.responses import FileResponse, PlainTextResponse
from starlette.responses import Response as HttpResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from orion.common.clock import Clock
from orion.common.ids import Hotkey
from orion.common.net.gate import REQUEST_BYTES_MAX, Gate, parse_request
from orion.common.net.object_routes import OBJECT_ROUTE, GrantRoutes, ObjectRoutes
from orion.common.net.starlette_server import (
    install,
    json_answer,
    read_bounded,
    signed_json,
    signed_statement,
    verify_starlette,
)
from orion.common.net.store import ObjectStore
from orion.common.protocol import routes
from orion.common.protocol.entries import STATEMENT_TYPES, EntriesQuery
from orion.common.protocol.messages import (
    Applied,
    CheckpointUploaded,
    Heartbeat,
    Join,
    LeaseRequest,
    Leave,
    ManifestQuery,
    Reduced,
    RefusalCode,
    Report,
    RunInfo,
    Uploaded,
)
from orion.common.protocol.records import (
    BoundaryQuery,
    CommitmentQuery,
    LedgerQuery,
    LossQuery,
    MergeQuery,
    PathwayQuery,
    ScoreSheet,
    Verdict,
)
from orion.common.protocol.refusals import refused
from orion.orchestrator.dashboard.live import LivePage
from orion.orchestrator.dashboard.serve import add_dashboard
from orion.orchestrator.events import Request
from orion.orchestrator.ledger_store import LedgerStore
from orion.orchestrator.loop import OrchestratorLoop
from orion.orchestrator.metrics import RequestMetrics

_SMALL_BYTES_MAX = 64 * 1024
"""For messages without long lists."""
_REQUESTS: Mapping[str, tuple[type[Request], int]] = {
    routes.JOIN: (Join, _SMALL_BYTES_MAX),
    routes.HEARTBEAT: (Heartbeat, _SMALL_BYTES_MAX),
    routes.LEAVE: (Leave, _SMALL_BYTES_MAX),
    routes.LEASE: (LeaseRequest, _SMALL_BYTES_MAX),
    routes.REPORT: (Report, REQUEST_BYTES_MAX),
    routes.UPLOADED: (Uploaded, REQUEST_BYTES_MAX),
    routes.REDUCED: (Reduced, REQUEST_BYTES_MAX),
    routes.APPLIED: (Applied, _SMALL_BYTES_MAX),
    routes.CHECKPOINT: (CheckpointUploaded, _SMALL_BYTES_MAX),
    routes.VERDICT: (Verdict, _SMALL_BYTES_MAX),
    routes.SCORES: (ScoreSheet, REQUEST_BYTES_MAX),
}
"""What may change the run's state: message and largest body by route."""

Handler = Callable[[HttpRequest], Awaitable[HttpResponse]]


@dataclass(frozen=True, slots=True)
class ApiParts:
    """What the routes work with."""

    run_info: RunInfo
    ledger: LedgerStore
    loop: OrchestratorLoop
    gate: Gate
    store: ObjectStore
    served_objects: ObjectRoutes | None
    """The store's objects where this process serves them itself; None: they lie elsewhere."""
    clock: Clock
    grant_s: float
    data_files: Mapping[str, Path]
    """The prepared data by file name."""
    registry: CollectorRegistry
    page: LivePage
    """What people watch the run on."""
    drop_connection: Callable[[Hashable], None]
    """Ends the connection of the client with this address at once."""


def build_app(parts: ApiParts) -> FastAPI:
    """The application; one per process and registry."""
    app = FastAPI(title="Orion orchestrator", docs_url=None, redoc_url=None, openapi_url=None)
    install(app, parts.gate)
    _add_public(app, parts)
    for route, (message_type, size_bytes_max) in _REQUESTS.items():
        app.add_api_route(route, _deciding(parts, message_type, size_bytes_max), methods=["POST"])
    _add_queries(app, parts)
    _add_objects(app, parts)
    add_dashboard(app, parts.page, parts.drop_connection)
    app.add_middleware(_Measured, metrics=RequestMetrics(parts.registry), clock=parts.clock)
    return app


def _add_public(app: FastAPI, parts: ApiParts) -> None:
    core, clock = parts.loop.core, parts.clock

    @app.get(routes.RUN)
    async def run() -> HttpResponse:
        return json_answer(parts.run_info)

    @app.get(routes.STATUS)
    async def status() -> HttpResponse:
        return json_answer(core.status(clock.now_s()))

    @app.post(routes.LOSSES)
    async def losses(request: HttpRequest) -> HttpResponse:
        body = await read_bounded(request, _SMALL_BYTES_MAX)
        return json_answer(core.losses(parse_request(LossQuery, body)))

    @app.post(routes.PATHWAYS)
    async def pathways(request: HttpRequest) -> HttpResponse:
        body = await read_bounded(request, _SMALL_BYTES_MAX)
        return json_answer(core.pathways(parse_request(PathwayQuery, body)))

    @app.post(routes.ENTRIES)
    async def entries(request: HttpRequest) -> HttpResponse:
        query = parse_request(EntriesQuery, await read_bounded(request, _SMALL_BYTES_MAX))
        page = await asyncio.to_thread(parts.ledger.page, query.from_sequence)
        return HttpResponse(page.to_json(), media_type="application/json")

    @app.post(routes.BOUNDARIES)
    async def boundaries(request: HttpRequest) -> HttpResponse:
        body = await read_bounded(request, _SMALL_BYTES_MAX)
        return json_answer(core.boundaries(parse_request(BoundaryQuery, body)))

    @app.get(routes.MINERS + "/{hotkey}")
    async def miner(hotkey: str) -> HttpResponse:
        return json_answer(core.pay(Hotkey(hotkey)))

    @app.get(routes.HEALTH)
    async def health() -> HttpResponse:
        return PlainTextResponse("ok")

    @app.get(routes.METRICS)
    async def metrics() -> HttpResponse:
        return HttpResponse(generate_latest(parts.registry), media_type=CONTENT_TYPE_LATEST)


def _deciding(parts: ApiParts, message_type: type[Request], size_bytes_max: int) -> Handler:
    """A handler that has the core decide on a signed message."""

    async def handler(request: HttpRequest) -> HttpResponse:
        hotkey, message, proof = await signed_statement(request, message_type, size_bytes_max)
        kept = proof if isinstance(message, STATEMENT_TYPES) else None
        return json_answer(await parts.loop.ask(hotkey, message, kept))

    return handler


def _add_queries(app: FastAPI, parts: ApiParts) -> None:
    core, clock = parts.loop.core, parts.clock

    @app.get(routes.FEED)
    async def feed(
        request: HttpRequest,
        since: Annotated[int, Query(ge=0, le=2**53)] = 0,
        wait_s: Annotated[float, Query(ge=0, le=routes.FEED_WAIT_S_MAX)] = 0.0,
    ) -> HttpResponse:
        hotkey = verify_starlette(request, b"")
        connection = request.client
        parts.loop.feed_asked(hotkey, connection)
        try:
            await parts.loop.wait_for_change(since, wait_s)
            return json_answer(core.feed(hotkey, clock.now_s()))
        finally:
            parts.loop.feed_answered(hotkey, connection)

    @app.post(routes.MANIFESTS)
    async def manifests(request: HttpRequest) -> HttpResponse:
        _, query = await signed_json(request, ManifestQuery, _SMALL_BYTES_MAX)
        return json_answer(core.manifests(query))

    @app.post(routes.MERGES)
    async def merges(request: HttpRequest) -> HttpResponse:
        _, query = await signed_json(request, MergeQuery, _SMALL_BYTES_MAX)
        return json_answer(core.merge(query))

    @app.post(routes.COMMITMENTS)
    async def commitments(request: HttpRequest) -> HttpResponse:
        _, query = await signed_json(request, CommitmentQuery, _SMALL_BYTES_MAX)
        return json_answer(core.commitments(query))

    @app.post(routes.LEDGER)
    async def ledger(request: HttpRequest) -> HttpResponse:
        _, query = await signed_json(request, LedgerQuery, _SMALL_BYTES_MAX)
        return json_answer(core.ledger(query))


def _add_objects(app: FastAPI, parts: ApiParts) -> None:
    grants = GrantRoutes(parts.store, parts.clock, parts.grant_s, parts.loop.core.check_grant)
    app.add_api_route(routes.GRANTS, grants.grants, methods=["POST"])
    app.add_api_route(routes.UPLOADS, grants.uploads, methods=["POST"])
    app.add_api_route(routes.COMPLETE, grants.complete, methods=["POST"])
    if parts.served_objects is not None:
        app.add_api_route(OBJECT_ROUTE, parts.served_objects.put, methods=["PUT"])
        app.add_api_route(OBJECT_ROUTE, parts.served_objects.get, methods=["GET"])

    @app.get(routes.DATA + "/{name}")
    async def data(request: HttpRequest, name: str) -> HttpResponse:
        verify_starlette(request, b"")
        path = parts.data_files.get(name)
        if path is None:
            raise refused(RefusalCode.NOT_FOUND, f"the data has no file {name[:100]!r}")
        return FileResponse(path, media_type="application/octet-stream")


class _Measured:
    """Counts requests and their time by the pattern of their route."""

    def __init__(self, app: ASGIApp, metrics: RequestMetrics, clock: Clock) -> None:
        self._app = app
        self._metrics = metrics
        self._clock = clock

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        began_s = self._clock.monotonic_s()
        status = 500

        async def noting(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            await self._app(scope, receive, noting)
        finally:
            route = getattr(scope.get("route"), "path", "none")
            self._metrics.requests.labels(route, str(status)).inc()
            self._metrics.seconds.labels(route).observe(self._clock.monotonic_s() - began_s)
