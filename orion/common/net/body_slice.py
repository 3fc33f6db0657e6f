"""A range of a body, to be sent as one part of it. Aliases the body's memory."""

from collections.abc import Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from orion.common.protocol.codec import Body

_CHUNK_BYTES = 256 * 1024
"""As bodies are handed to sockets (`protocol/codec.py`)."""


class BodySlice:
    """Some of a body's bytes."""

    def __init__(self, body: "Body", part: range) -> None:
        """`part`: which bytes, in steps of one, within the body."""
        self._body = body
        self._part = part
        self.size_bytes = len(part)

    def chunks(self, chunk_bytes: int = _CHUNK_BYTES) -> Iterator[memoryview]:
        """The bytes in order, in pieces of at most `chunk_bytes`."""
        begin = 0
        for piece in (memoryview(self._body.header), *self._body.parts):
            start, stop = max(self._part.start - begin, 0), min(self._part.stop - begin, len(piece))
            for position in range(start, stop, chunk_bytes):
                yield piece[position : min(position + chunk_bytes, stop)]
            begin += len(piece)
