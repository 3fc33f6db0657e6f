"""An object store of either kind behind the orchestrator's routes, and a proxy before it that can do harm."""

import asyncio
import secrets
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

from net_loopback import CLIENT_KEY, RUN, SERVER, serve_starlette
from seaweed import S3Server
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from orion.common.clock import Clock, SystemClock
from orion.common.net.directory_store import DirectoryStore
from orion.common.net.gate import Gate
from orion.common.net.object_client import ObjectClient
from orion.common.net.object_routes import OBJECT_ROUTE, GrantRoutes, ObjectRoutes
from orion.common.net.orchestrator_client import OrchestratorClient
from orion.common.net.rpc import RpcClient
from orion.common.net.s3_access import S3Access, make_client
from orion.common.net.s3_address import parse_s3_address
from orion.common.net.s3_store import S3Store
from orion.common.net.starlette_server import install
from orion.common.net.store import ObjectStore
from orion.common.net.url_signer import UrlSigner
from orion.common.protocol import routes
from orion.common.protocol.signing import Verifier

OpenStore = Callable[[], tuple[ObjectStore, ObjectRoutes | None]]
_CHUNK_BYTES = 64 * 1024
SYSTEM = SystemClock()


@dataclass
class StoreServer:
    """What the orchestrator does about objects; may be started again while clients go on."""

    open_store: OpenStore
    clock: Clock = SYSTEM
    grant_s: float = 60.0
    num_expired: int = 0
    """So many of the next grants have expired when they arrive."""

    def __post_init__(self) -> None:
        self.store, self._objects = self.open_store()

    def restart(self) -> None:
        """As another process would find things."""
        self.store.close()
        self.store, self._objects = self.open_store()

    def app(self) -> Starlette:
        def granting(name: str) -> Callable[[Request], object]:
            async def handler(request: Request) -> Response:
                self.num_expired, grant_s = max(0, self.num_expired - 1), -60.0 if self.num_expired else self.grant_s
                granted = GrantRoutes(self.store, self.clock, grant_s, lambda *_: None)
                return await getattr(granted, name)(request)

            return handler

        def serving(name: str) -> Callable[[Request], object]:
            async def handler(request: Request) -> Response:
                assert self._objects is not None
                return await getattr(self._objects, name)(request)

            return handler

        app = Starlette(
            routes=[
                Route(routes.GRANTS, granting("grants"), methods=["POST"]),
                Route(routes.UPLOADS, granting("uploads"), methods=["POST"]),
                Route(routes.COMPLETE, granting("complete"), methods=["POST"]),
                Route(OBJECT_ROUTE, serving("put"), methods=["PUT"]),
                Route(OBJECT_ROUTE, serving("get"), methods=["GET"]),
            ]
        )
        install(app, Gate(Verifier(SERVER), RUN, SystemClock()))
        return app


@dataclass
class World:
    """A served store, clients of it, and the proxy that their objects go through."""

    server: StoreServer
    url: str
    proxy: "HarmfulProxy"
    rpc: RpcClient
    part_bytes: int
    part_needle: Callable[[int], bytes]
    """What the head of a request that writes this part holds."""

    @property
    def store(self) -> ObjectStore:
        return self.server.store

    @property
    def api(self) -> OrchestratorClient:
        return OrchestratorClient(self.rpc, self.url, SERVER)

    def client(self, **options: object) -> ObjectClient:
        return ObjectClient(self.api, **options)  # type: ignore[arg-type]


@dataclass
class Harm:
    """What happens to the first requests whose head holds some text: they stall, or their connection is cut."""

    needle: bytes
    how: str
    times: int = 1
    num_fired: int = 0
    fired: asyncio.Event = field(default_factory=asyncio.Event)


class HarmfulProxy:
    """Passes bytes on between a client and one server, and looks at the heads of requests."""

    def __init__(self, target: str) -> None:
        """`target`: http://HOST:PORT."""
        host, _, port = target.removeprefix("http://").partition(":")
        self._target = (host, int(port))
        self.harms: list[Harm] = []
        self.heads: list[bytes] = []
        """First lines of all requests so far."""
        self.released = asyncio.Event()
        """Stalled requests go on."""
        self._tasks: set[asyncio.Task[None]] = set()

    def harm(self, needle: bytes, how: str, times: int = 1) -> Harm:
        self.harms.append(Harm(needle, how, times))
        return self.harms[-1]

    def num_requests(self, needle: bytes) -> int:
        return sum(needle in head for head in self.heads)

    @asynccontextmanager
    async def listening(self) -> AsyncIterator[str]:
        """Its address."""
        server = await asyncio.start_server(self._accepted, "127.0.0.1", 0)
        try:
            port = server.sockets[0].getsockname()[1]
            yield f"http://127.0.0.1:{port}"
        finally:
            server.close()
            for task in self._tasks:
                task.cancel()
            await asyncio.gather(*self._tasks, return_exceptions=True)
            await server.wait_closed()

    async def _accepted(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        try:
            await self._pass_on(reader, writer)
        except (OSError, asyncio.CancelledError):
            return  # either side has gone, or the test is over
        finally:
            writer.close()
            self._tasks.discard(task)

    async def _pass_on(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        to_reader, to_writer = await asyncio.open_connection(*self._target)

        async def back() -> None:
            while data := await to_reader.read(_CHUNK_BYTES):
                writer.write(data)
                await writer.drain()
            writer.close()

        answering = asyncio.create_task(back())
        try:
            while data := await reader.read(_CHUNK_BYTES):
                if data.startswith((b"PUT ", b"GET ", b"POST ", b"HEAD ")) and await self._is_cut(data):
                    return
                to_writer.write(data)
                await to_writer.drain()
        finally:
            to_writer.close()
            answering.cancel()
            await asyncio.gather(answering, return_exceptions=True)

    async def _is_cut(self, data: bytes) -> bool:
        head = data.partition(b"\r\n\r\n")[0]
        self.heads.append(head)
        for harm in self.harms:
            if harm.needle in head and harm.num_fired < harm.times:
                harm.num_fired += 1
                harm.fired.set()
                if harm.how == "cut":
                    return True
                await self.released.wait()
        return False


@asynccontextmanager
async def directory_world(folder: Path, part_bytes: int, clock: Clock = SYSTEM) -> AsyncIterator[World]:
    """A directory, served on loopback; everything goes through the proxy. The clock is that of grants and URLs."""
    signer = UrlSigner(b"s" * 32)

    def open_store() -> tuple[ObjectStore, ObjectRoutes]:
        store = DirectoryStore(folder, signer, part_bytes=part_bytes)
        return store, ObjectRoutes(store, signer, clock)

    server = StoreServer(open_store, clock)
    async with serve_starlette(server.app()) as url, RpcClient(CLIENT_KEY, RUN) as rpc:
        proxy = HarmfulProxy(url)
        async with proxy.listening() as proxied:
            yield World(server, proxied, proxy, rpc, part_bytes, lambda index: f".{index}&sig=".encode())


@asynccontextmanager
async def s3_world(s3: S3Server, options: str) -> AsyncIterator[World]:
    """A prefix of a bucket; what goes to the bucket goes through the proxy."""
    proxy, prefix = HarmfulProxy(s3.endpoint), new_prefix()
    async with proxy.listening() as endpoint, RpcClient(CLIENT_KEY, RUN) as rpc:
        address = parse_s3_address(s3.address(prefix, options, endpoint=endpoint))

        def open_store() -> tuple[ObjectStore, None]:
            return S3Store(S3Access(make_client(address), address), SystemClock()), None

        server = StoreServer(open_store)
        try:
            async with serve_starlette(server.app()) as url:
                part_bytes = address.part_bytes
                yield World(server, url, proxy, rpc, part_bytes, lambda index: f"partNumber={index + 1}&".encode())
        finally:
            await asyncio.to_thread(server.store.close)


def new_prefix() -> str:
    """Used by nobody else."""
    return f"test-{secrets.token_hex(6)}"
