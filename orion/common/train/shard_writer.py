"""Writes a stream of token ids as files of bounded size.

Owns how shards are cut and digested. Holds no tokens back: what is written is on its way to the disk.
"""

from pathlib import Path
from types import TracebackType
from typing import Self

import numpy as np
import numpy.typing as npt
from blake3 import blake3

from orion.common.train.data_index import Shard


class ShardWriter:
    """Fills one file after another in `folder`; each holds `tokens_max` tokens but the last."""

    def __init__(self, folder: Path, name_pattern: str, dtype: np.dtype[np.unsignedinteger], tokens_max: int) -> None:
        """`name_pattern` takes the shard's number, as in `train-{:05d}.bin`."""
        self.num_tokens = 0
        """Written so far, over all files."""
        self._folder = folder
        self._name_pattern = name_pattern
        self._dtype = dtype
        self._tokens_max = tokens_max
        self._shards: list[Shard] = []
        self._open()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()

    def write(self, tokens: npt.ArrayLike) -> None:
        """Appends token ids [num_tokens]; a full file is closed only when more follows."""
        rest = np.asarray(tokens, dtype=self._dtype)
        while len(rest):
            if self._shard_tokens == self._tokens_max:
                self._close()
                self._open()
            part = rest[: self._tokens_max - self._shard_tokens]
            data = part.tobytes()
            self._file.write(data)
            self._hasher.update(data)
            self._shard_tokens += len(part)
            self.num_tokens += len(part)
            rest = rest[len(part) :]

    def finish(self) -> tuple[Shard, ...]:
        """Closes the last file, which is empty when nothing was written, and describes them all."""
        self._close()
        return tuple(self._shards)

    def _open(self) -> None:
        self._name = self._name_pattern.format(len(self._shards))
        self._file = (self._folder / self._name).open("wb")
        self._hasher = blake3()
        self._shard_tokens = 0

    def _close(self) -> None:
        self._file.close()
        size_bytes = self._shard_tokens * self._dtype.itemsize
        shard = Shard(
            name=self._name, num_tokens=self._shard_tokens, size_bytes=size_bytes, blake3=self._hasher.hexdigest()
        )
        self._shards.append(shard)
