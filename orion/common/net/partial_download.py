"""A large object on its way in, kept in files so that another process can go on where this one ended.

Two files in a folder of one process: the bytes, and the indices of the parts that are there. A part is noted only after
it was written; whether the whole is what it should be is the reader's to find out, by its digest.
"""

import mmap
import os
from pathlib import Path

from orion.common.protocol.messages import ObjectRef

_KEPT_MAX = 2
"""Unfinished downloads that stay in a folder; older ones go when another begins."""


class PartialDownload:
    """One object. `view` is its memory, of the object's size; parts may be written to it in any order."""

    def __init__(self, folder: Path, ref: ObjectRef, part_bytes: int) -> None:
        """Opens or makes the files; blocks. Raises OSError, also when the disk cannot take them."""
        folder.mkdir(parents=True, exist_ok=True)
        self._bytes_path, self._parts_path = _paths(folder, ref, part_bytes)
        _remove_others(folder, self._bytes_path)
        with self._bytes_path.open("a+b") as file:
            if file.seek(0, 2) != ref.size_bytes:
                self._parts_path.unlink(missing_ok=True)
                # The space is taken now: on a full disk, writing to mapped memory would end the process.
                os.posix_fallocate(file.fileno(), 0, ref.size_bytes)
                file.truncate(ref.size_bytes)
            self._map = mmap.mmap(file.fileno(), ref.size_bytes)
        self.view = memoryview(self._map)
        num_parts = -(-ref.size_bytes // part_bytes)
        self._notes = self._parts_path.open("a+", encoding="ascii")
        self._notes.seek(0)
        # The last line may be cut off in the middle: without its end it does not count.
        lines = [line for line in self._notes if line.endswith("\n")]
        found = {int(line) for line in lines if line.strip().isdecimal()}
        self.present = {index for index in found if index < num_parts}
        """Parts that are there."""

    @staticmethod
    def exists(folder: Path, ref: ObjectRef, part_bytes: int) -> bool:
        """Whether an earlier download of it left something."""
        return _paths(folder, ref, part_bytes)[1].exists()

    def note(self, index: int) -> None:
        """A part is there."""
        self.present.add(index)
        self._notes.write(f"\n{index}\n")
        self._notes.flush()

    def close(self) -> None:
        """Lets go of the files; they stay."""
        self._notes.close()
        self.view.release()
        self._map.close()

    def discard(self) -> None:
        """Removes the files, they may be open: the object has been taken over, or is not what it should be."""
        self._bytes_path.unlink(missing_ok=True)
        self._parts_path.unlink(missing_ok=True)


def _paths(folder: Path, ref: ObjectRef, part_bytes: int) -> tuple[Path, Path]:
    name = f"{ref.digest}-{ref.size_bytes}-{part_bytes}"
    return folder / f"{name}.bytes", folder / f"{name}.parts"


def _remove_others(folder: Path, mine: Path) -> None:
    others = sorted((path for path in folder.glob("*.bytes") if path != mine), key=lambda path: path.stat().st_mtime_ns)
    for path in others[: max(0, len(others) - _KEPT_MAX + 1)]:
        path.unlink()
        path.with_suffix(".parts").unlink(missing_ok=True)
