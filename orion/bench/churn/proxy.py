"""A TCP proxy before one miner that can be cut: connections stay open, and nothing more comes through."""

import asyncio
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, closing, suppress
from typing import Any

CHUNK_BYTES = 1 << 16


def free_port(host: str) -> int:
    """A TCP port that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind((host, 0))
        port: int = probe.getsockname()[1]
        return port


class CutProxy:
    """Carries what comes to `port` on to `target_port`, while it is not cut."""

    def __init__(self, host: str, target_port: int) -> None:
        self._host = host
        self.target_port = target_port
        self._open = asyncio.Event()
        self._open.set()
        self._tasks: set[asyncio.Task[Any]] = set()
        self.held_back = asyncio.Event()
        """Something came since it was cut."""
        self.port = 0

    def cut(self) -> None:
        self.held_back.clear()
        self._open.clear()

    def heal(self) -> None:
        self._open.set()

    @asynccontextmanager
    async def running(self) -> AsyncIterator["CutProxy"]:
        server = await asyncio.start_server(self._accept, self._host, 0)
        self.port = server.sockets[0].getsockname()[1]
        try:
            yield self
        finally:
            server.close()
            for task in tuple(self._tasks):
                task.cancel()
            await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _pass(self) -> None:
        """Waits while it is cut."""
        if not self._open.is_set():
            self.held_back.set()
        await self._open.wait()

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        # It is cancelled at the end only; the stream's own callback takes a cancelled task for a mistake and prints it.
        with suppress(asyncio.CancelledError), closing(writer):
            await self._pass()
            try:
                target_reader, target_writer = await asyncio.open_connection(self._host, self.target_port)
            except OSError:
                return
            with closing(target_writer):
                await asyncio.gather(self._carry(reader, target_writer), self._carry(target_reader, writer))

    async def _carry(self, source: asyncio.StreamReader, sink: asyncio.StreamWriter) -> None:
        try:
            while piece := await source.read(CHUNK_BYTES):
                await self._pass()
                sink.write(piece)
                await sink.drain()
        except OSError:
            pass  # one side has broken off; the other one learns it now
        finally:
            sink.close()
