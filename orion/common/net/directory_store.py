"""The object store as a directory that one process owns and serves.

Invariants: an object is visible only when it is whole, on disk and has its digest; a key never leads outside the root;
a part of an unfinished upload, once there, never changes, so that whoever is late cannot touch what was made of it.
"""

import asyncio
import itertools
import os
import secrets
import shutil
import threading
from collections.abc import AsyncIterable, AsyncIterator, Sequence
from pathlib import Path

from blake3 import blake3

from orion.common.ids import Digest
from orion.common.net.part_layout import PART_BYTES, part_ranges, part_size
from orion.common.net.partial_file import PartialFile
from orion.common.net.store import StoredObject, check_key, check_prefix, check_writable
from orion.common.net.url_signer import UrlSigner
from orion.common.protocol.fields import PART_URLS_MAX
from orion.common.protocol.messages import ObjectRef, PartUrl, RefusalCode, UploadGrant
from orion.common.protocol.refusals import refused

READ_BYTES = 1024 * 1024
"""What is read from a file at a time."""
_ASSEMBLE_BYTES = 4 * 1024 * 1024
_UPLOAD_ID_CHARS = 32

_NOT_THERE = (FileNotFoundError, NotADirectoryError, IsADirectoryError)
"""No such file; also where a part of the key is a file, or the key is only the beginning of others."""


class DirectoryStore:
    """Objects as files under a root that belongs to one process."""

    def __init__(self, root: Path, signer: UrlSigner | None = None, *, part_bytes: int = PART_BYTES) -> None:
        """Makes the root, and removes what an interrupted write left there; whole parts stay. Blocks on file I/O.

        Without a signer, the URLs end with this process. What is larger than `part_bytes` is written in parts.
        """
        self._signer = signer if signer is not None else UrlSigner(secrets.token_bytes(32))
        self._part_bytes = part_bytes
        self._objects = root / "objects"
        self._digests = root / "digests"
        self._uploads = root / "uploads"
        self._partial = root / "partial"
        shutil.rmtree(self._partial, ignore_errors=True)
        for folder in (self._objects, self._digests, self._uploads, self._partial):
            folder.mkdir(parents=True, exist_ok=True)
        self._commits = threading.Lock()
        self._numbers = itertools.count()
        self._awaited: dict[str, list[asyncio.Future[None]]] = {}
        """Who waits for an object to come."""

    async def stat(self, key: str) -> StoredObject | None:
        return await asyncio.to_thread(self._stat, check_key(key))

    async def wait_until_there(self, keys: Sequence[str], timeout_s: float) -> None:
        try:
            async with asyncio.timeout(timeout_s):
                for key in keys:
                    await self._wait_for(check_key(key))
        except TimeoutError:
            return

    async def _wait_for(self, key: str) -> None:
        there: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        waiting = self._awaited.setdefault(key, [])
        waiting.append(there)
        try:
            if await self.stat(key) is None:
                await there
        finally:
            waiting.remove(there)
            if not waiting:
                self._awaited.pop(key, None)

    async def grant_read(self, key: str, expires_s: float) -> str:
        return self._signer.sign("GET", key, expires_s)

    async def grant_write(self, ref: ObjectRef, expires_s: float) -> UploadGrant:
        if check_writable(ref, await self.stat(ref.key)):
            return UploadGrant(is_durable=True, part_bytes=ref.size_bytes)
        part_bytes = part_size(ref.size_bytes, self._part_bytes)
        if ref.size_bytes <= part_bytes:
            url = self._signer.sign("PUT", ref.key, expires_s, ref.size_bytes)
            return UploadGrant(part_bytes=ref.size_bytes, parts=(PartUrl(index=0, url=url),))
        ranges = part_ranges(ref.size_bytes, part_bytes)
        present = await asyncio.to_thread(self._present_parts, ref, len(ranges))
        upload = _upload_id(ref, part_bytes)
        missing = [index for index in range(len(ranges)) if index not in present][:PART_URLS_MAX]
        parts = tuple(
            PartUrl(
                index=index,
                url=self._signer.sign("PUT", ref.key, expires_s, len(ranges[index]), f"{upload}.{index}"),
            )
            for index in missing
        )
        return UploadGrant(part_bytes=part_bytes, in_parts=True, parts=parts)

    async def complete(self, ref: ObjectRef) -> None:
        if check_writable(ref, await self.stat(ref.key)):
            return
        path = self._new_partial()
        try:
            await asyncio.to_thread(self._assemble, ref, path)
            self._tell(ref.key)
        finally:
            await asyncio.to_thread(path.unlink, missing_ok=True)

    async def put(
        self, key: str, chunks: AsyncIterable[bytes | bytearray | memoryview], size_bytes_max: int
    ) -> StoredObject:
        """Takes an object in; durable on return. Raises RefusedError TOO_LARGE as soon as it exceeds the bound, and
        CONFLICT when the key holds other bytes. Whatever fails leaves nothing half-written behind."""
        check_key(key)
        partial = PartialFile(self._new_partial())
        try:
            await partial.fill(chunks, size_bytes_max)
            stored = StoredObject(partial.size_bytes, partial.digest)
            committed = await asyncio.to_thread(self._commit, key, partial.path, stored)
            self._tell(key)
            return committed
        finally:
            await partial.discard()

    async def put_file(self, path: Path, ref: ObjectRef) -> None:
        check_writable(ref, await self.put(ref.key, _pieces(path), ref.size_bytes))

    async def put_part(
        self, key: str, part: str, chunks: AsyncIterable[bytes | bytearray | memoryview], size_bytes: int
    ) -> None:
        """Takes one part of an upload in; on disk on return. `part` is as it was signed. Raises RefusedError TOO_LARGE,
        BAD_TENSOR for fewer bytes than were due."""
        upload, _, index = part.partition(".")
        target = self._uploads / check_key(key) / upload / index
        partial = PartialFile(self._new_partial())
        try:
            await partial.fill(chunks, size_bytes)
            if partial.size_bytes != size_bytes:
                raise refused(RefusalCode.BAD_TENSOR, f"a part of {partial.size_bytes} bytes, {size_bytes} were due")
            await asyncio.to_thread(self._keep_part, key, partial.path, target)
        finally:
            await partial.discard()

    async def get(self, key: str, start: int = 0, size_bytes: int | None = None) -> AsyncIterator[bytes]:
        """An object's bytes from `start` on, `size_bytes` of them at most, in pieces. Raises RefusedError NOT_FOUND
        before the first."""
        check_key(key)
        position, end = start, None if size_bytes is None else start + size_bytes
        # Opened anew for each piece: whoever stops reading in the middle leaves no open file behind.
        while end is None or position < end:
            due = READ_BYTES if end is None else min(READ_BYTES, end - position)
            data = await asyncio.to_thread(self._read, key, position, due)
            if not data:
                return
            yield data
            position += len(data)

    async def delete_prefix(self, prefix: str) -> None:
        await asyncio.to_thread(self._delete, check_prefix(prefix))

    def close(self) -> None:
        """Nothing is held."""

    def _tell(self, key: str) -> None:
        """An object is there now."""
        for there in self._awaited.get(key, ()):
            if not there.done():
                there.set_result(None)

    def _new_partial(self) -> Path:
        return self._partial / str(next(self._numbers))

    def _stat(self, key: str) -> StoredObject | None:
        try:
            size_bytes = (self._objects / key).stat().st_size
            return StoredObject(size_bytes, Digest((self._digests / key).read_text(encoding="ascii")))
        except _NOT_THERE:
            return None

    def _read(self, key: str, position: int, size_bytes: int) -> bytes:
        try:
            with (self._objects / key).open("rb") as file:
                file.seek(position)
                return file.read(size_bytes)
        except _NOT_THERE:
            raise refused(RefusalCode.NOT_FOUND, f"no object {key}") from None

    def _delete(self, key: str) -> None:
        with self._commits:
            for folder in (self._objects / key, self._digests / key, self._uploads / key):
                if folder.is_dir():
                    shutil.rmtree(folder)

    # --- parts

    def _upload_folder(self, ref: ObjectRef) -> Path:
        return self._uploads / ref.key / _upload_id(ref, part_size(ref.size_bytes, self._part_bytes))

    def _present_parts(self, ref: ObjectRef, num_parts: int) -> set[int]:
        folder = self._upload_folder(ref)
        return {index for index in range(num_parts) if (folder / str(index)).is_file()}

    def _keep_part(self, key: str, path: Path, target: Path) -> None:
        with self._commits:
            if self._stat(key) is not None:
                return  # the object was made of the same part, sent once more
            target.parent.mkdir(parents=True, exist_ok=True)
            path.replace(target)

    def _assemble(self, ref: ObjectRef, path: Path) -> None:
        """Copies the parts, one after the other, into a file at `path`, and makes it the object."""
        ranges = part_ranges(ref.size_bytes, part_size(ref.size_bytes, self._part_bytes))
        folder, hasher = self._upload_folder(ref), blake3()
        if len(self._present_parts(ref, len(ranges))) < len(ranges):
            raise refused(RefusalCode.NOT_FOUND, f"parts of {ref.key} are missing; ask for them again")
        try:
            with path.open("wb") as whole:
                for index in range(len(ranges)):
                    with (folder / str(index)).open("rb") as part:
                        while data := part.read(_ASSEMBLE_BYTES):
                            hasher.update(data)
                            whole.write(data)
                whole.flush()
                os.fsync(whole.fileno())
        except FileNotFoundError:
            raise refused(RefusalCode.NOT_FOUND, f"{ref.key} has been deleted meanwhile") from None
        if hasher.hexdigest() != ref.digest:
            # Whoever sent it must send it all again: no part can be told from the others.
            shutil.rmtree(folder)
            raise refused(RefusalCode.DIGEST_MISMATCH, f"the parts of {ref.key} are not what its digest says")
        self._commit(ref.key, path, StoredObject(ref.size_bytes, ref.digest))
        shutil.rmtree(self._uploads / ref.key, ignore_errors=True)

    def _commit(self, key: str, path: Path, stored: StoredObject) -> StoredObject:
        """Makes a finished file visible. The lock keeps others from coming between looking and moving."""
        target, digest_file = self._objects / key, self._digests / key
        with self._commits:
            present = self._stat(key)
            if present is not None:
                if present != stored:
                    raise refused(RefusalCode.CONFLICT, f"{key} holds other bytes; objects are written once")
                return present
            try:
                for folder in (target.parent, digest_file.parent):
                    folder.mkdir(parents=True, exist_ok=True)
            except (FileExistsError, NotADirectoryError):
                raise refused(RefusalCode.CONFLICT, f"{key} goes on from another key") from None
            if target.is_dir():
                raise refused(RefusalCode.CONFLICT, f"{key} is the beginning of another key")
            # The digest first: a digest without object is no object, but an object must never lack its digest.
            with digest_file.open("w", encoding="ascii") as file:
                file.write(stored.digest)
                file.flush()
                os.fsync(file.fileno())
            path.replace(target)
            for folder in (digest_file.parent, target.parent):
                _sync_folder(folder)
        return stored


def _upload_id(ref: ObjectRef, part_bytes: int) -> str:
    """The same for the same bytes cut in the same way, also in another process."""
    told = f"{ref.digest}.{ref.size_bytes}.{part_bytes}"
    return blake3(told.encode()).hexdigest()[:_UPLOAD_ID_CHARS]


async def _pieces(path: Path) -> AsyncIterator[bytes]:
    position = 0
    while data := await asyncio.to_thread(_read_at, path, position):
        yield data
        position += len(data)


def _read_at(path: Path, position: int) -> bytes:
    with path.open("rb") as file:
        file.seek(position)
        return file.read(READ_BYTES)


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
