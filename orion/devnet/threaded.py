"""A development chain in a thread of this process, for tests and scripts that use the blocking SDK.

Owns the thread. Invariant: when the context ends the port is free and the thread has ended.
"""

import asyncio
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from orion.common.clock import SystemClock
from orion.devnet.config import DevnetConfig
from orion.devnet.server import RunningDevnet, serve_devnet

_START_S = 60.0
"""The metadata is decoded within a second; on a machine that is very busy it may take many times that."""


@contextmanager
def devnet_in_thread(config: DevnetConfig, *, state_file: Path | None = None) -> Iterator[str]:
    """Serves on a free port of 127.0.0.1; gives the URL. Raises what the server raises when it can't start."""
    ready = threading.Event()
    running: list[RunningDevnet] = []
    failures: list[BaseException] = []
    loop = asyncio.new_event_loop()

    async def serve() -> None:
        async with serve_devnet("127.0.0.1", 0, config, SystemClock(), state_file=state_file) as served:
            running.append(served)
            ready.set()
            await served.beat

    task = loop.create_task(serve())

    def run() -> None:
        asyncio.set_event_loop(loop)
        try:
            loop.run_until_complete(task)
        except asyncio.CancelledError:
            pass
        except Exception as error:  # noqa: BLE001 - raised in the thread that waits for the server
            failures.append(error)
        finally:
            loop.run_until_complete(loop.shutdown_asyncgens())
            loop.close()
            ready.set()

    thread = threading.Thread(target=run, name="orion-devnet", daemon=True)
    thread.start()
    started = ready.wait(_START_S)
    try:
        if failures:
            raise failures[0]
        assert started, f"the development chain did not start within {_START_S} s"
        yield running[0].url
    finally:
        if thread.is_alive():
            loop.call_soon_threadsafe(task.cancel)
            thread.join(_START_S)
        assert not thread.is_alive(), "the server ends when it is cancelled"
    if failures:
        raise failures[0]
