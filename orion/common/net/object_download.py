"""Where the bytes of an object go while it is downloaded: memory, or files that the next process finds again.

Invariants: no memory of the object's size is taken before somebody has announced that size; nobody gets bytes that do
not have the object's digest.
"""

from pathlib import Path

from blake3 import blake3

from orion.common.net.part_layout import part_ranges, part_size
from orion.common.net.partial_download import PartialDownload
from orion.common.protocol.messages import ObjectRef, RefusalCode
from orion.common.protocol.refusals import refused


class ObjectDownload:
    """One object, in parts that may come in any order."""

    def __init__(self, ref: ObjectRef, part_bytes: int, folder: Path | None) -> None:
        """With a folder, an object of several parts goes through files there, and goes on where they end. Raises
        OSError."""
        self.ref = ref
        self._part_bytes = part_size(ref.size_bytes, part_bytes)
        self.ranges = part_ranges(ref.size_bytes, self._part_bytes)
        """Which bytes each part holds."""
        self._folder = folder if len(self.ranges) > 1 else None
        self._files: PartialDownload | None = None
        self._buffer: bytearray | None = None
        if self._folder is not None and PartialDownload.exists(self._folder, ref, self._part_bytes):
            self.open()
        self.present: set[int] = set() if self._files is None else self._files.present
        """Indices of the parts that are there."""

    @property
    def in_parts(self) -> bool:
        return len(self.ranges) > 1

    def check_announced(self, index: int, size_bytes: int | None, content_range: str | None) -> None:
        """Compares what an answer says of a part with what is due. Raises RefusedError TOO_LARGE or BAD_TENSOR."""
        part, total = self.ranges[index], str(self.ref.size_bytes)
        announced = (content_range or "").rpartition("/")[2] if self.in_parts else str(size_bytes)
        if announced != total:
            is_larger = announced.isdecimal() and int(announced) > self.ref.size_bytes
            code = RefusalCode.TOO_LARGE if is_larger else RefusalCode.BAD_TENSOR
            raise refused(code, f"{self.ref.key} is announced with {announced} bytes, {total} were due")
        if size_bytes != len(part):
            raise refused(RefusalCode.BAD_TENSOR, f"part {index} of {self.ref.key}: {size_bytes} bytes announced")

    def open(self) -> memoryview:
        """The object's memory, taken now if it was not before. Quick: no byte is read or written. Raises OSError."""
        if self._folder is not None:
            if self._files is None:
                self._files = PartialDownload(self._folder, self.ref, self._part_bytes)
            return self._files.view
        if self._buffer is None:
            self._buffer = bytearray(self.ref.size_bytes)
        return memoryview(self._buffer)

    def note(self, index: int) -> None:
        """A part is there."""
        if self._files is not None:
            self._files.note(index)
        self.present.add(index)

    def take(self) -> bytearray:
        """The whole object, all of whose parts are there; its files are removed. Blocks while it is hashed. Raises
        RefusedError DIGEST_MISMATCH."""
        view = self.open()
        is_right = blake3(view).hexdigest() == self.ref.digest
        body = self._buffer if self._buffer is not None else bytearray(view if is_right else b"")
        if self._files is not None:
            self._files.discard()
        if not is_right:
            raise refused(RefusalCode.DIGEST_MISMATCH, f"{self.ref.key} is not what its digest says")
        return body

    def close(self) -> None:
        """Lets go of the files."""
        if self._files is not None:
            self._files.close()
            self._files = None
