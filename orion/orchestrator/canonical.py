"""The digest of a state: equal digests mean equal states, whatever order dicts were filled in.

Pure. Walks dataclasses, dicts, lists, tuples, deques, arrays, messages and plain values; anything else is a mistake of
ours and raises TypeError, so that no part of a state can be left out unnoticed.
"""

from array import array
from collections import deque
from collections.abc import Iterator
from dataclasses import fields, is_dataclass

from blake3 import blake3
from pydantic import BaseModel

from orion.common.ids import Digest


def state_digest(state: object) -> Digest:
    """blake3 over the canonical form."""
    hasher = blake3()
    for piece in _pieces(state):
        hasher.update(piece)
    return Digest(hasher.hexdigest())


def _pieces(value: object) -> Iterator[bytes]:
    """The canonical form: every value with its kind and length, so that no two states spell the same bytes."""
    if isinstance(value, BaseModel):
        yield _framed(b"m", value.model_dump_json().encode())
    elif is_dataclass(value) and not isinstance(value, type):
        yield _framed(b"c", type(value).__name__.encode())
        for part in fields(value):
            yield _framed(b"f", part.name.encode())
            yield from _pieces(getattr(value, part.name))
    elif isinstance(value, dict):
        yield _framed(b"d", str(len(value)).encode())
        for key, item in sorted((b"".join(_pieces(key)), item) for key, item in value.items()):
            yield key
            yield from _pieces(item)
    elif isinstance(value, list | tuple | deque):
        yield _framed(b"l", str(len(value)).encode())
        for item in value:
            yield from _pieces(item)
    elif isinstance(value, array):
        yield _framed(b"a", value.typecode.encode() + value.tobytes())
    elif value is None or isinstance(value, bool | int | float | str):
        yield _framed(b"v", f"{type(value).__name__} {value!r}".encode())
    else:
        raise TypeError(f"a {type(value).__name__} has no canonical form")


def _framed(kind: bytes, content: bytes) -> bytes:
    return kind + len(content).to_bytes(8, "little") + content
