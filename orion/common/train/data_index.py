"""`DatasetIndex`: what a folder of prepared data holds, and the checks that it does.

Owns the format of `index.json` and the list of files beside it. The file is written in one canonical form, so its
digest names the data: two folders with the same digest hold the same tokens, byte for byte.
A dataset folder holds `index.json`, `tokenizer.json`, `train-00000.bin` … and `heldout.bin`: little-endian token ids.
"""

import json
from pathlib import Path
from typing import Annotated, Literal, NamedTuple

import numpy as np
from blake3 import blake3
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from orion.common.errors import DataError
from orion.common.ids import Digest
from orion.common.train.data_config import DataConfig

INDEX_FILE = "index.json"
TOKENIZER_FILE = "tokenizer.json"
HELDOUT_FILE = "heldout.bin"
TRAIN_FILE_PATTERN = "train-{:05d}.bin"
INDEX_BYTES_MAX = 64 << 20
"""An index lists about 150 bytes a shard; this is room for 30 T tokens."""

TokenType = Literal["uint16", "uint32"]
TOKEN_DTYPES: dict[TokenType, np.dtype[np.unsignedinteger]] = {"uint16": np.dtype("<u2"), "uint32": np.dtype("<u4")}
"""How a token id lies in a shard, on machines of either byte order."""

_HASH_BLOCK_BYTES = 4 << 20
_HexDigest = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class SourceInfo(_Part):
    """Where the text comes from and under which licence."""

    title: str
    origin: str
    """Package, path or dataset that it was read from."""
    licence: str
    """The licence's text or name."""


class TokenizerInfo(_Part):
    """The tokenizer that all shards were made with; it lies beside them as `tokenizer.json`."""

    size_bytes: Annotated[int, Field(ge=1)]
    blake3: _HexDigest
    vocab_size: Annotated[int, Field(ge=1)]
    """Token ids lie below this."""
    eos_id: Annotated[int, Field(ge=0)]
    """Token that ends each document."""


class Shard(_Part):
    """One file of token ids."""

    name: Annotated[str, Field(pattern=r"^(train-[0-9]{5,8}|heldout)\.bin$")]
    num_tokens: Annotated[int, Field(ge=0)]
    size_bytes: Annotated[int, Field(ge=0)]
    blake3: _HexDigest


class DatasetFile(NamedTuple):
    """A file that belongs to a dataset, for those who fetch it from elsewhere."""

    name: str
    size_bytes: int
    blake3: str
    """Lower-case hex."""


class DatasetIndex(_Part):
    """Contents of `index.json`."""

    format_version: Literal[1] = 1
    config: DataConfig
    source: SourceInfo
    tokenizer: TokenizerInfo
    dtype: TokenType
    """Of the token ids in the shards, little-endian."""
    num_documents: Annotated[int, Field(ge=0)]
    """Documents in the training and the held-out shards together."""
    train: Annotated[tuple[Shard, ...], Field(min_length=1)]
    heldout: Shard

    @property
    def digest(self) -> Digest:
        """blake3 of `index.json`: names config, tokenizer and every token."""
        return Digest(blake3(self.to_bytes()).hexdigest())

    @property
    def num_train_tokens(self) -> int:
        return sum(shard.num_tokens for shard in self.train)

    def to_bytes(self) -> bytes:
        """The one canonical form in which `index.json` is written."""
        tree = self.model_dump(mode="json")
        return (json.dumps(tree, sort_keys=True, indent=1, ensure_ascii=True) + "\n").encode()

    @classmethod
    def from_bytes(cls, data: bytes, where: str) -> "DatasetIndex":
        """Reads what `to_bytes` wrote; `where` names the file in errors. Raises DataError."""
        if len(data) > INDEX_BYTES_MAX:
            raise DataError(f"{where}: larger than {INDEX_BYTES_MAX} bytes, this is not a dataset's index")
        try:
            return cls.model_validate_json(data)
        except ValidationError as error:
            first = error.errors()[0]
            key = ".".join(str(part) for part in first["loc"])
            raise DataError(f"{where}: not a dataset's index of this version: {key}: {first['msg']}") from None


def read_index(folder: Path) -> DatasetIndex:
    """Reads `index.json` of a dataset folder. Raises DataError when there is none or it is damaged."""
    path = folder / INDEX_FILE
    try:
        with path.open("rb") as file:
            data = file.read(INDEX_BYTES_MAX + 1)
    except OSError as error:
        raise DataError(f"{path}: {error.strerror}; prepare the data first, or fetch the folder again") from None
    return DatasetIndex.from_bytes(data, str(path))


def dataset_files(index: DatasetIndex) -> list[DatasetFile]:
    """All files that `index.json` speaks for, in a fixed order: fetch each, `check_file` it, write the index last."""
    tokenizer = DatasetFile(TOKENIZER_FILE, index.tokenizer.size_bytes, index.tokenizer.blake3)
    shards = [DatasetFile(shard.name, shard.size_bytes, shard.blake3) for shard in (*index.train, index.heldout)]
    return [tokenizer, *shards]


def check_sizes(index: DatasetIndex, folder: Path) -> None:
    """The cheap check: every file is there in its full length. Raises DataError naming the file."""
    for file in dataset_files(index):
        _check_size(folder / file.name, file.size_bytes)


def check_file(path: Path, size_bytes: int, digest: str) -> None:
    """The full check of one file: length, then blake3 (lower-case hex). Raises DataError naming the file."""
    _check_size(path, size_bytes)
    hasher = blake3()
    with path.open("rb") as file:
        while block := file.read(_HASH_BLOCK_BYTES):
            hasher.update(block)
    if hasher.hexdigest() != digest:
        raise DataError(f"{path}: digest {hasher.hexdigest()} is not the index's {digest}; fetch or prepare it again")


def _check_size(path: Path, size_bytes: int) -> None:
    try:
        actual_bytes = path.stat().st_size
    except OSError as error:
        raise DataError(f"{path}: {error.strerror}; fetch or prepare it again") from None
    if actual_bytes != size_bytes:
        raise DataError(f"{path}: {actual_bytes} bytes, the index says {size_bytes}; fetch or prepare it again")
