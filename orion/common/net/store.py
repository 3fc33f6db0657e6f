"""The object store: the seam between what the orchestrator decides and where objects lie.

Objects are write-once: whoever has seen an object durable can rely on its bytes for as long as it exists. Writing the
same bytes again changes nothing; writing others is refused. The orchestrator moves no bytes itself: it hands out URLs,
through which others read and write, large objects in parts. What a store knows of an unfinished upload outlives the
process, so that parts which are there need not be sent again.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from pydantic import TypeAdapter, ValidationError

from orion.common.ids import Digest
from orion.common.protocol.fields import ObjectKey
from orion.common.protocol.messages import ObjectRef, RefusalCode, UploadGrant
from orion.common.protocol.refusals import refused

_KEY = TypeAdapter(ObjectKey)
_KEY_PART_CHARS_MAX = 200
"""File systems bound the length of a name."""


@dataclass(frozen=True, slots=True)
class StoredObject:
    """A durable object."""

    size_bytes: int
    digest: Digest


class ObjectStore(Protocol):
    """Where objects lie. Keys are those of `protocol/keys.py`; a key of another form is refused with MALFORMED.

    Every method raises TransportError when the store cannot be reached, and may be called again.
    """

    async def stat(self, key: str) -> StoredObject | None:
        """Size and digest of a durable object, None when there is none."""
        ...

    async def wait_until_there(self, keys: Sequence[str], timeout_s: float) -> None:
        """Returns once all these objects are durable, or after the time; at once from a store that cannot tell."""
        ...

    async def grant_read(self, key: str, expires_s: float) -> str:
        """A URL for GET requests, of ranges too; absolute, or a path of the orchestrator's. It must be used before
        `expires_s` (Unix time). Says nothing about whether the object is there."""
        ...

    async def grant_write(self, ref: ObjectRef, expires_s: float) -> UploadGrant:
        """What is missing of an object, and where it goes. Whoever writes through these URLs cannot write more bytes
        than `ref` names. Raises RefusedError CONFLICT when the key holds other bytes."""
        ...

    async def complete(self, ref: ObjectRef) -> None:
        """Makes an object of the parts that were sent; durable on return. Raises RefusedError NOT_FOUND when parts are
        missing, CONFLICT when the key holds other bytes."""
        ...

    async def put_file(self, path: Path, ref: ObjectRef) -> None:
        """Makes an object of a file on this machine, which holds just that; durable on return. Raises RefusedError
        CONFLICT when the key holds other bytes, and OSError."""
        ...

    async def delete_prefix(self, prefix: str) -> None:
        """Deletes every object whose key starts with `prefix`, which ends with a slash, and what was begun there. None
        there: no error."""
        ...

    def close(self) -> None:
        """Lets go of what it holds; nothing is asked afterwards."""
        ...


def check_key(key: str) -> str:
    """The key, when it is one. Raises RefusedError MALFORMED."""
    try:
        _KEY.validate_python(key)
    except ValidationError:
        raise refused(RefusalCode.MALFORMED, f"{key[:200]!r} is no object key") from None
    if max(map(len, key.split("/"))) > _KEY_PART_CHARS_MAX:
        raise refused(RefusalCode.MALFORMED, f"a part of {key[:200]!r} is too long")
    return key


def check_prefix(prefix: str) -> str:
    """The prefix without its slash, when it is the beginning of keys. Raises ValueError, RefusedError MALFORMED."""
    if not prefix.endswith("/"):
        raise ValueError(f"prefix {prefix!r} must end with a slash")
    return check_key(prefix.removesuffix("/"))


def check_writable(ref: ObjectRef, present: StoredObject | None) -> bool:
    """Whether the object is there already. Raises RefusedError CONFLICT when the key holds other bytes."""
    if present is None:
        return False
    if present != StoredObject(ref.size_bytes, ref.digest):
        raise refused(RefusalCode.CONFLICT, f"{ref.key} holds other bytes; objects are written once")
    return True
