"""The object store: the seam, its embedded form in a directory, and the signed URLs through which others reach it.

Objects are write-once: whoever has seen an object durable can rely on its bytes for as long as it exists. Writing the
same bytes again changes nothing; writing others is refused. Invariants of the directory: an object is visible only
when it is whole, on disk and has its digest; a key never leads outside the root.
"""

import asyncio
import hashlib
import hmac
import itertools
import os
import shutil
import threading
from collections.abc import AsyncIterable, AsyncIterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol
from urllib.parse import quote, urlencode

from pydantic import TypeAdapter, ValidationError

from orion.common.ids import Digest
from orion.common.net.partial_file import PartialFile
from orion.common.protocol import routes
from orion.common.protocol.fields import ObjectKey
from orion.common.protocol.messages import RefusalCode
from orion.common.protocol.refusals import refused

READ_BYTES = 1024 * 1024
"""What is read from a file at a time."""

_KEY = TypeAdapter(ObjectKey)
_KEY_PART_CHARS_MAX = 200
"""File systems bound the length of a name."""
_NOT_THERE = (FileNotFoundError, NotADirectoryError, IsADirectoryError)
"""No such file; also where a part of the key is a file, or the key is only the beginning of others."""


@dataclass(frozen=True, slots=True)
class StoredObject:
    """A durable object."""

    size_bytes: int
    digest: Digest


class ObjectStore(Protocol):
    """Where objects lie. Keys are those of `protocol/keys.py`; a key of another form is refused with MALFORMED."""

    async def stat(self, key: str) -> StoredObject | None:
        """Size and digest of a durable object, None when there is none."""
        ...

    async def put(
        self, key: str, chunks: AsyncIterable[bytes | bytearray | memoryview], size_bytes_max: int
    ) -> StoredObject:
        """Takes an object in; durable on return. Raises RefusedError TOO_LARGE as soon as it exceeds the bound, and
        CONFLICT when the key holds other bytes. Whatever fails leaves nothing half-written behind."""
        ...

    def get(self, key: str) -> AsyncIterator[bytes]:
        """The object's bytes in pieces. Raises RefusedError NOT_FOUND before the first."""
        ...

    async def delete_prefix(self, prefix: str) -> None:
        """Deletes every object whose key starts with `prefix`, which ends with a slash. None there: no error."""
        ...


class DirectoryStore:
    """Objects as files under a root that belongs to one process."""

    def __init__(self, root: Path) -> None:
        """Makes the root, and removes what an interrupted write left there. Blocks on file I/O."""
        self._objects = root / "objects"
        self._digests = root / "digests"
        self._partial = root / "partial"
        shutil.rmtree(self._partial, ignore_errors=True)
        for folder in (self._objects, self._digests, self._partial):
            folder.mkdir(parents=True, exist_ok=True)
        self._commits = threading.Lock()
        self._numbers = itertools.count()

    async def stat(self, key: str) -> StoredObject | None:
        return await asyncio.to_thread(self._stat, check_key(key))

    async def put(
        self, key: str, chunks: AsyncIterable[bytes | bytearray | memoryview], size_bytes_max: int
    ) -> StoredObject:
        check_key(key)
        partial = PartialFile(self._partial / str(next(self._numbers)))
        try:
            await partial.fill(chunks, size_bytes_max)
            return await asyncio.to_thread(self._commit, key, partial)
        finally:
            await partial.discard()

    async def get(self, key: str) -> AsyncIterator[bytes]:
        check_key(key)
        position = 0
        # Opened anew for each piece: whoever stops reading in the middle leaves no open file behind.
        while data := await asyncio.to_thread(self._read, key, position):
            yield data
            position += len(data)

    async def delete_prefix(self, prefix: str) -> None:
        if not prefix.endswith("/"):
            raise ValueError(f"prefix {prefix!r} must end with a slash")
        await asyncio.to_thread(self._delete, check_key(prefix.removesuffix("/")))

    def _stat(self, key: str) -> StoredObject | None:
        try:
            size_bytes = (self._objects / key).stat().st_size
            return StoredObject(size_bytes, Digest((self._digests / key).read_text(encoding="ascii")))
        except _NOT_THERE:
            return None

    def _read(self, key: str, position: int) -> bytes:
        try:
            with (self._objects / key).open("rb") as file:
                file.seek(position)
                return file.read(READ_BYTES)
        except _NOT_THERE:
            raise refused(RefusalCode.NOT_FOUND, f"no object {key}") from None

    def _delete(self, key: str) -> None:
        with self._commits:
            for folder in (self._objects / key, self._digests / key):
                if folder.is_dir():
                    shutil.rmtree(folder)

    def _commit(self, key: str, partial: PartialFile) -> StoredObject:
        """Makes a finished file visible. The lock keeps others from coming between looking and moving."""
        stored = StoredObject(partial.size_bytes, partial.digest)
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
            partial.path.replace(target)
            for folder in (digest_file.parent, target.parent):
                _sync_folder(folder)
        return stored


def check_key(key: str) -> str:
    """The key, when it is one. Raises RefusedError MALFORMED."""
    try:
        _KEY.validate_python(key)
    except ValidationError:
        raise refused(RefusalCode.MALFORMED, f"{key[:200]!r} is no object key") from None
    if max(map(len, key.split("/"))) > _KEY_PART_CHARS_MAX:
        raise refused(RefusalCode.MALFORMED, f"a part of {key[:200]!r} is too long")
    return key


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


# --- signed URLs ------------------------------------------------------------------------------------------------------


class UrlSigner:
    """Makes and checks relative URLs that allow one method on one object until they expire. Pure."""

    def __init__(self, secret: bytes) -> None:
        """At least 32 random bytes that only the store's process knows; with new ones, old URLs end."""
        if len(secret) < 32:
            raise ValueError(f"a secret of {len(secret)} bytes is too short, 32 are the least")
        self._secret = secret

    def sign(self, method: Literal["GET", "PUT"], key: str, expires_s: float, size_bytes_max: int = 0) -> str:
        """A path and query. `expires_s` is Unix time; `size_bytes_max` bounds what a PUT may bring."""
        fields = {"method": method, "expires": str(int(expires_s)), "max": str(size_bytes_max)}
        fields["sig"] = self._signature(check_key(key), fields)
        return f"{routes.OBJECTS}/{quote(key)}?{urlencode(fields)}"

    def verify(self, method: str, key: str, query: Mapping[str, str], now_s: float) -> int:
        """The bound on the body's size, in bytes. Raises RefusedError FORBIDDEN when the URL isn't ours, is for
        another method or object, or has expired."""
        fields = {name: query.get(name, "") for name in ("method", "expires", "max")}
        if not hmac.compare_digest(self._signature(key, fields).encode(), query.get("sig", "").encode()):
            raise refused(RefusalCode.FORBIDDEN, "the URL's signature is wrong")
        # From here on the fields are ours, so they are well-formed.
        if fields["method"] != method:
            raise refused(RefusalCode.FORBIDDEN, f"the URL is for {fields['method']}")
        if now_s > int(fields["expires"]):
            raise refused(RefusalCode.FORBIDDEN, "the URL has expired; ask for a new one")
        return int(fields["max"])

    def _signature(self, key: str, fields: Mapping[str, str]) -> str:
        signed = "\n".join((fields["method"], key, fields["expires"], fields["max"]))
        return hmac.new(self._secret, signed.encode(), hashlib.sha256).hexdigest()
