"""The door to the training data: its settings, preparing it, and the tokens of any microbatch.

Owns which tokens a data id stands for. Changes nothing on the disk; preparing is `data_prepare`'s part.
Shapes: B sequences of a microbatch, T tokens that a sequence is trained on, U = T + 1 tokens that it takes.
Invariants: the tokens of a data id are a pure function of (dataset, run seed, data id); no two ids of one data pass
share a token of the stream; held-out tokens are in no microbatch.
"""

from bisect import bisect_right
from collections.abc import Iterator
from itertools import accumulate
from pathlib import Path
from typing import Self

import numpy as np
import numpy.typing as npt
from blake3 import blake3

from orion.common.errors import DataError
from orion.common.train.data_config import DataConfig
from orion.common.train.data_index import (
    TOKEN_DTYPES,
    TOKENIZER_FILE,
    DatasetFile,
    DatasetIndex,
    Shard,
    check_file,
    check_sizes,
    dataset_files,
    read_index,
)
from orion.common.train.data_prepare import prepare
from orion.common.train.permutation import KeyedPermutation
from orion.common.train.tokenizer import Tokenizer, load_tokenizer

__all__ = [
    "DataConfig",
    "DatasetFile",
    "DatasetIndex",
    "TokenDataset",
    "check_file",
    "dataset_files",
    "prepare",
    "read_index",
]


class TokenDataset:
    """A prepared folder, memory-mapped. Safe to share between threads; build it with `open`."""

    def __init__(self, folder: Path, index: DatasetIndex) -> None:
        """`folder` holds the files of `index` in full length."""
        self.folder = folder
        self.index = index
        self._train = _Sequences(folder, index, index.train)
        self._heldout = _Sequences(folder, index, (index.heldout,))
        self.num_sequences = self._train.num_sequences
        """Training sequences in one data pass."""
        self.microbatches_per_pass = self.num_sequences // index.config.sequences_per_microbatch
        """Data ids in one data pass; at least 1."""
        if self.microbatches_per_pass < 1:
            raise DataError(f"{folder}: {self.num_sequences} sequences are less than one microbatch")

    @classmethod
    def open(cls, folder: Path, expect_digest: str | None = None) -> Self:
        """Opens a prepared folder. Raises DataError when a file is missing or cut short, or the index is not the
        expected one; the files' contents are checked by `verify`, not here."""
        index = read_index(folder)
        if expect_digest is not None and index.digest != expect_digest:
            raise DataError(f"{folder}: holds data {index.digest}, the run needs {expect_digest}; fetch the run's data")
        check_sizes(index, folder)
        return cls(folder, index)

    def microbatch(self, run_seed: int, data_id: int) -> npt.NDArray[np.int64]:
        """Token ids ids_BU of any data id ≥ 0: inputs are ids_BU[:, :-1], targets ids_BU[:, 1:].

        Each data pass goes over the training sequences in another order; ids beyond one pass go on in the next.
        """
        if data_id < 0:
            raise ValueError(f"data id {data_id} is negative")
        data_pass, place = divmod(int(data_id), self.microbatches_per_pass)
        key = blake3(f"orion data order {int(run_seed)} {data_pass}".encode()).digest()
        return self._batch(self._train, KeyedPermutation(self.num_sequences, key), place)

    def heldout(self, max_microbatches: int) -> Iterator[npt.NDArray[np.int64]]:
        """At most `max_microbatches` whole microbatches ids_BU of held-out text, always the same ones.

        They are drawn from all over the held-out text, so that the first few already speak for it.
        """
        num_sequences = self._heldout.num_sequences
        num_microbatches = min(max_microbatches, num_sequences // self.index.config.sequences_per_microbatch)
        if num_microbatches > 0:
            order = KeyedPermutation(num_sequences, blake3(b"orion held-out order").digest())
            yield from (self._batch(self._heldout, order, place) for place in range(num_microbatches))

    def tokenizer(self) -> Tokenizer:
        """The tokenizer that the shards were made with."""
        return load_tokenizer(self.folder / TOKENIZER_FILE, self.index.config.eos_token)

    def verify(self) -> None:
        """Reads every file and checks its digest. Raises DataError naming the first one that differs."""
        for file in dataset_files(self.index):
            check_file(self.folder / file.name, file.size_bytes, file.blake3)

    def _batch(self, sequences: "_Sequences", order: KeyedPermutation, place: int) -> npt.NDArray[np.int64]:
        config = self.index.config
        first = place * config.sequences_per_microbatch
        ids_BU = np.empty((config.sequences_per_microbatch, config.sequence_width), dtype=np.int64)
        for row, ids_U in enumerate(ids_BU):
            ids_U[:] = sequences.tokens(order(first + row))
        return ids_BU


class _Sequences:
    """The whole sequences of some shards, numbered through; what is left at a shard's end is not used."""

    def __init__(self, folder: Path, index: DatasetIndex, shards: tuple[Shard, ...]) -> None:
        self._width = index.config.sequence_width
        self._shards = [_map(folder / shard.name, shard, TOKEN_DTYPES[index.dtype]) for shard in shards]
        self._ends = list(accumulate(shard.num_tokens // self._width for shard in shards))
        self.num_sequences = self._ends[-1]

    def tokens(self, sequence: int) -> npt.NDArray[np.unsignedinteger]:
        """Token ids ids_U of one sequence, a view into the file."""
        shard_index = bisect_right(self._ends, sequence)
        shard = self._shards[shard_index]
        start = (sequence - (self._ends[shard_index - 1] if shard_index else 0)) * self._width
        return shard[start : start + self._width]


def _map(path: Path, shard: Shard, dtype: np.dtype[np.unsignedinteger]) -> npt.NDArray[np.unsignedinteger]:
    if shard.num_tokens == 0:
        return np.empty(0, dtype=dtype)  # an empty file cannot be mapped
    return np.memmap(path, dtype=dtype, mode="r", shape=(shard.num_tokens,))
