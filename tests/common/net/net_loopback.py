"""Keys, a clock that is told the time, and servers on loopback."""

import asyncio
import contextlib
import socket
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass

import uvicorn
from starlette.applications import Starlette

from orion.common.ids import Digest
from orion.common.protocol.signing import hotkey_of, keypair_from_uri

RUN = Digest("ab" * 32)
SERVER_KEY, CLIENT_KEY = keypair_from_uri("//server"), keypair_from_uri("//client")
SERVER, CLIENT = hotkey_of(SERVER_KEY), hotkey_of(CLIENT_KEY)


@dataclass
class ManualClock:
    """Time that passes when told to."""

    time_s: float = 1000.0

    def now_s(self) -> float:
        return self.time_s

    def monotonic_s(self) -> float:
        return self.time_s


class _Server(uvicorn.Server):
    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Leaves the test runner's signal handlers alone."""
        yield


@asynccontextmanager
async def serve_starlette(app: Starlette) -> AsyncIterator[str]:
    """Runs an application as the orchestrator's server does; gives its base URL."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        server = _Server(uvicorn.Config(app, log_level="critical", lifespan="off", http="httptools"))
        task = asyncio.create_task(server.serve([listener]))
        try:
            yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        finally:
            server.should_exit = True
            await task
