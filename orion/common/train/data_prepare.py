"""Turns a text source into a folder of token shards, once.

Owns the tokenizer's training, the order of the tokens, and that the folder appears whole or not at all. Several
processes may prepare the same folder at once: one works, the others wait for it.
Invariants: the same config over the same text gives the same bytes; no document is in both splits, not even as a copy;
of a source only one batch is in memory.
"""

import fcntl
import os
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import numpy.typing as npt
from blake3 import blake3

from orion.common.clock import Clock, SystemClock
from orion.common.errors import DataError
from orion.common.train.data_config import DataConfig
from orion.common.train.data_index import (
    HELDOUT_FILE,
    INDEX_FILE,
    TOKEN_DTYPES,
    TOKENIZER_FILE,
    TRAIN_FILE_PATTERN,
    DatasetIndex,
    TokenizerInfo,
    TokenType,
    check_sizes,
    read_index,
)
from orion.common.train.heldout import HeldoutSplit, Side, is_heldout
from orion.common.train.shard_writer import ShardWriter
from orion.common.train.text import TextSource, open_source
from orion.common.train.tokenizer import Tokenizer, load_tokenizer, locate_tokenizer, train_bpe

BPE_TRAIN_CHARS_MAX = 64 << 20
"""Characters a tokenizer is trained on; more text changes small vocabularies little and costs memory."""

_BATCH_CHARS = 1 << 20
_LOCK_POLL_S = 0.05


def prepare(
    config: DataConfig,
    folder: Path,
    *,
    on_tokens: Callable[[int], None] = lambda _num_tokens: None,
    wait_s: float = 6 * 3600.0,
    clock: Clock | None = None,
) -> DatasetIndex:
    """Makes `folder` hold the data of `config`, unless it already does (then only the files' sizes are checked).

    `on_tokens` hears how many training tokens are written so far. Waits at most `wait_s` for another process that is at
    work on the same folder. Raises DataError when the source or tokenizer cannot be had, the text is too short for one
    microbatch, or `folder` holds something else; an interrupted call leaves nothing that a later one cannot replace.
    """
    folder = folder.absolute()
    if _is_ready(config, folder):
        return read_index(folder)
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with _lock(folder.with_name(f".{folder.name}.lock"), wait_s, clock or SystemClock()):
            if not _is_ready(config, folder):
                _build_atomically(config, folder, on_tokens)
    except OSError as error:
        raise DataError(f"{folder}: the data cannot be written: {error}") from error
    return read_index(folder)


def _is_ready(config: DataConfig, folder: Path) -> bool:
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return False
    if not (folder / INDEX_FILE).exists():
        raise DataError(f"{folder}: neither empty nor a dataset's folder; use another one or empty it")
    index = read_index(folder)
    if index.config != config:
        wanted, found = config.model_dump(), index.config.model_dump()
        differences = [f"{key} {found[key]!r} not {wanted[key]!r}" for key in wanted if wanted[key] != found[key]]
        raise DataError(f"{folder}: holds other data ({'; '.join(differences)}); use another folder or delete this one")
    check_sizes(index, folder)
    return True


@contextmanager
def _lock(path: Path, wait_s: float, clock: Clock) -> Iterator[None]:
    """Holds `path` against other processes; the system frees it when its holder dies."""
    deadline_s = clock.monotonic_s() + wait_s
    with path.open("ab") as file:
        while not _try_lock(file.fileno()):
            if clock.monotonic_s() >= deadline_s:
                raise DataError(f"{path}: another process has been at work on this data for {wait_s:g} s; see to it")
            time.sleep(_LOCK_POLL_S)
        yield


def _try_lock(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _build_atomically(config: DataConfig, folder: Path, on_tokens: Callable[[int], None]) -> None:
    # Only the lock's holder uses this name; what lies there was left by one that died.
    unfinished = folder.with_name(f".{folder.name}.unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir()
    try:
        index = _build(config, unfinished, on_tokens)
        (unfinished / INDEX_FILE).write_bytes(index.to_bytes())
        for path in (*unfinished.iterdir(), unfinished):
            _sync(path)
        unfinished.replace(folder)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    _sync(folder.parent)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _build(config: DataConfig, folder: Path, on_tokens: Callable[[int], None]) -> DatasetIndex:
    source = open_source(config)
    tokenizer = _make_tokenizer(config, source, folder / TOKENIZER_FILE)
    token_type: TokenType = "uint16" if tokenizer.vocab_size <= 1 << 16 else "uint32"
    dtype = TOKEN_DTYPES[token_type]
    split = HeldoutSplit(config.heldout_fraction, config.heldout_tokens_max)
    num_documents = 0
    with (
        ShardWriter(folder, TRAIN_FILE_PATTERN, dtype, config.shard_tokens_max) as train,
        ShardWriter(folder, HELDOUT_FILE, dtype, config.heldout_tokens_max) as heldout,
    ):
        for document, tokens in _encode(source, tokenizer, dtype):
            side = split.choose(document, len(tokens))
            if side is Side.HELDOUT:
                heldout.write(tokens)
            elif side is Side.TRAIN:
                room = len(tokens) if config.tokens_max is None else config.tokens_max - train.num_tokens
                train.write(tokens[:room])
                on_tokens(train.num_tokens)
            num_documents += side is not Side.NEITHER
            if train.num_tokens == config.tokens_max:
                break
        train_shards, (heldout_shard,) = train.finish(), heldout.finish()
    tokenizer_bytes = (folder / TOKENIZER_FILE).read_bytes()
    index = DatasetIndex(
        config=config,
        source=source.info,
        tokenizer=TokenizerInfo(
            size_bytes=len(tokenizer_bytes),
            blake3=blake3(tokenizer_bytes).hexdigest(),
            vocab_size=tokenizer.vocab_size,
            eos_id=tokenizer.eos_id,
        ),
        dtype=token_type,
        num_documents=num_documents,
        train=train_shards,
        heldout=heldout_shard,
    )
    _check_enough(index)
    return index


def _check_enough(index: DatasetIndex) -> None:
    """A run needs one whole microbatch to train on and, when text is held out, one to measure on."""
    config = index.config
    splits = {Side.TRAIN: index.train}
    if config.heldout_fraction > 0:
        splits[Side.HELDOUT] = (index.heldout,)
    for side, shards in splits.items():
        num_sequences = sum(shard.num_tokens // config.sequence_width for shard in shards)
        if num_sequences < config.sequences_per_microbatch:
            num_tokens = sum(shard.num_tokens for shard in shards)
            raise DataError(
                f"data source {config.source}: its {num_tokens} {side} tokens make {num_sequences} sequences of "
                f"{config.sequence_width}, a microbatch needs {config.sequences_per_microbatch}; "
                "give more text, shorter sequences or another heldout_fraction"
            )


def _make_tokenizer(config: DataConfig, source: TextSource, path: Path) -> Tokenizer:
    """Trains the tokenizer into `path`, or copies it there."""
    if config.bpe_vocab_size is not None:
        return train_bpe(_tokenizer_text(source, config.heldout_fraction), config.bpe_vocab_size, path)
    located = locate_tokenizer(config.tokenizer)
    tokenizer = load_tokenizer(located, config.eos_token)
    shutil.copyfile(located, path)
    return tokenizer


def _tokenizer_text(source: TextSource, heldout_fraction: float) -> Iterator[str]:
    num_chars = 0
    for document in source.documents():
        if not is_heldout(document, heldout_fraction):
            yield document
            num_chars += len(document)
        if num_chars >= BPE_TRAIN_CHARS_MAX:
            return


def _encode(
    source: TextSource, tokenizer: Tokenizer, dtype: np.dtype[np.unsignedinteger]
) -> Iterator[tuple[str, npt.NDArray[np.unsignedinteger]]]:
    """Each document with its token ids [num_tokens], the end-of-text token last."""
    for batch in _batches(source.documents()):
        for document, ids in zip(batch, tokenizer.encode_batch(batch), strict=True):
            yield document, np.array([*ids, tokenizer.eos_id], dtype=dtype)


def _batches(documents: Iterator[str]) -> Iterator[Sequence[str]]:
    """Groups documents until they reach `_BATCH_CHARS`; empty ones are left out."""
    batch: list[str] = []
    num_chars = 0
    for document in documents:
        if document:
            batch.append(document)
            num_chars += len(document)
        if num_chars >= _BATCH_CHARS:
            yield batch
            batch, num_chars = [], 0
    if batch:
        yield batch
