"""A file that is written as bytes arrive, off the event loop, and is nobody's file until it is whole.

Its methods that block run in threads, also beyond the cancellation of whoever awaits them; a lock and a flag see to it
that nothing is written after the file was discarded.
"""

import asyncio
import os
import threading
from collections.abc import AsyncIterable
from pathlib import Path
from typing import IO

from blake3 import blake3

from orion.common.ids import Digest
from orion.common.protocol.messages import RefusalCode
from orion.common.protocol.refusals import refused

_WRITE_BYTES = 4 * 1024 * 1024
"""What is gathered before a thread hashes and writes it."""


class PartialFile:
    """One file on its way in."""

    def __init__(self, path: Path) -> None:
        """Touches nothing yet. An existing file at `path` will be overwritten."""
        self.path = path
        self.size_bytes = 0
        self._hasher = blake3()
        self._file: IO[bytes] | None = None
        self._discarded = False
        self._lock = threading.Lock()

    @property
    def digest(self) -> Digest:
        """Of what has been written so far."""
        return Digest(self._hasher.hexdigest())

    async def fill(self, chunks: AsyncIterable[bytes | bytearray | memoryview], size_bytes_max: int) -> None:
        """Writes everything that arrives; it is on disk on return. Raises RefusedError TOO_LARGE, OSError."""
        gathered = bytearray()
        async for chunk in chunks:
            if self.size_bytes + len(gathered) + len(chunk) > size_bytes_max:
                raise refused(RefusalCode.TOO_LARGE, f"more than {size_bytes_max} bytes")
            gathered += chunk
            if len(gathered) >= _WRITE_BYTES:
                await asyncio.to_thread(self._write, gathered)
                gathered = bytearray()
        await asyncio.to_thread(self._write, gathered, last=True)

    async def discard(self) -> None:
        """Removes what is left at `path`; harmless after the file has been moved away."""
        await asyncio.to_thread(self._discard)

    def _write(self, data: bytearray, last: bool = False) -> None:
        with self._lock:
            if self._discarded:
                return
            if self._file is None:
                self._file = self.path.open("wb")
            self._hasher.update(data)
            self._file.write(data)
            self.size_bytes += len(data)
            if last:
                self._file.flush()
                os.fsync(self._file.fileno())
                self._file.close()

    def _discard(self) -> None:
        with self._lock:
            self._discarded = True
            if self._file is not None:
                self._file.close()
                self.path.unlink(missing_ok=True)
