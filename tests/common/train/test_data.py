"""Microbatches: pure, disjoint within a pass, random access; held-out text apart; damage is noticed and named."""

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from blake3 import blake3
from hypothesis import given, settings
from hypothesis import strategies as st

from orion.common.errors import DataError
from orion.common.train.data import (
    DataConfig,
    DatasetIndex,
    TokenDataset,
    check_file,
    dataset_files,
    prepare,
    read_index,
)
from orion.common.train.data_index import TOKEN_DTYPES, SourceInfo, TokenizerInfo
from orion.common.train.shard_writer import ShardWriter

HELDOUT_FIRST = 1_000_000
TOKENIZER = b"{}"


def write_numbered(folder: Path, num_tokens: int, config: DataConfig, num_heldout: int = 0) -> DatasetIndex:
    """A dataset whose token ids are their own places in the stream; the held-out ones count from HELDOUT_FIRST."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    dtype = TOKEN_DTYPES["uint32"]
    with (
        ShardWriter(folder, "train-{:05d}.bin", dtype, config.shard_tokens_max) as train,
        ShardWriter(folder, "heldout.bin", dtype, 1 << 20) as heldout,
    ):
        train.write(np.arange(num_tokens))
        heldout.write(np.arange(num_heldout) + HELDOUT_FIRST)
        shards, (heldout_shard,) = train.finish(), heldout.finish()
    (folder / "tokenizer.json").write_bytes(TOKENIZER)
    index = DatasetIndex(
        config=config,
        source=SourceInfo(title="numbers", origin="the test", licence="none"),
        tokenizer=TokenizerInfo(
            size_bytes=len(TOKENIZER), blake3=blake3(TOKENIZER).hexdigest(), vocab_size=1 << 21, eos_id=0
        ),
        dtype="uint32",
        num_documents=1,
        train=shards,
        heldout=heldout_shard,
    )
    (folder / "index.json").write_bytes(index.to_bytes())
    return index


def cut_as(sequence_length: int, sequences: int, shard_tokens_max: int = 1 << 20) -> DataConfig:
    return DataConfig(
        sequence_length=sequence_length, sequences_per_microbatch=sequences, shard_tokens_max=shard_tokens_max
    )


@settings(deadline=None, max_examples=60)
@given(
    num_tokens=st.integers(200, 1500),
    sequence_length=st.integers(1, 20),
    sequences=st.integers(1, 5),
    shard_tokens_max=st.integers(60, 2000),
    run_seed=st.integers(0, 2**63 - 1),
)
def test_a_pass_takes_every_microbatch_s_tokens_once(
    *,
    tmp_path_factory: pytest.TempPathFactory,
    num_tokens: int,
    sequence_length: int,
    sequences: int,
    shard_tokens_max: int,
    run_seed: int,
) -> None:
    folder = tmp_path_factory.getbasetemp() / "numbered"
    config = cut_as(sequence_length, sequences, shard_tokens_max)
    write_numbered(folder, num_tokens, config)
    dataset = TokenDataset.open(folder)
    num_ids = dataset.microbatches_per_pass
    for first in (0, 3 * num_ids):
        batches = [dataset.microbatch(run_seed, data_id) for data_id in range(first, first + num_ids)]
        assert all(ids_BU.shape == (sequences, sequence_length + 1) for ids_BU in batches)
        assert all(ids_BU.dtype == np.int64 for ids_BU in batches)
        stacked = np.concatenate(batches)
        assert (np.diff(stacked, axis=1) == 1).all()  # each row is a run of the stream
        assert len(np.unique(stacked)) == stacked.size
    # Less than a microbatch of sequences, and less than a sequence per shard, stays out of a pass.
    used = num_ids * sequences * (sequence_length + 1)
    num_shards = len(dataset.index.train)
    assert num_tokens - used < sequences * (sequence_length + 1) + num_shards * (sequence_length + 1)


@pytest.fixture
def numbered(tmp_path: Path) -> TokenDataset:
    write_numbered(tmp_path / "data", 5000, cut_as(9, 4, shard_tokens_max=1300), num_heldout=2000)
    return TokenDataset.open(tmp_path / "data")


def test_a_data_id_means_the_same_in_any_order_and_any_process(numbered: TokenDataset) -> None:
    data_ids = [10**12, 0, 3, numbered.microbatches_per_pass, 3, 0, 10**12]
    batches = [numbered.microbatch(7, data_id) for data_id in data_ids]
    again = TokenDataset.open(numbered.folder)
    for data_id, ids_BU in zip(data_ids, batches, strict=True):
        assert (again.microbatch(7, data_id) == ids_BU).all()
    # What a batch holds is the caller's own: writing into it changes nothing.
    batches[1][:] = 0
    assert numbered.microbatch(7, 0).any()


def test_seeds_and_passes_have_orders_of_their_own(numbered: TokenDataset) -> None:
    num_ids = numbered.microbatches_per_pass

    def order(run_seed: int, data_pass: int) -> tuple[int, ...]:
        first = data_pass * num_ids
        batches = [numbered.microbatch(run_seed, data_id) for data_id in range(first, first + num_ids)]
        return tuple(int(ids_U[0]) for ids_BU in batches for ids_U in ids_BU)

    orders = {order(run_seed, data_pass) for run_seed in (1, 2) for data_pass in (0, 1)}
    assert len(orders) == 4
    assert all(list(starts) != sorted(starts) for starts in orders)


def test_the_order_of_a_run_is_fixed_for_good(numbered: TokenDataset) -> None:
    # Golden values: a change here would silently give running swarms other data.
    assert numbered.microbatch(1, 0)[:, 0].tolist() == [590, 960, 4140, 1580]
    assert numbered.microbatch(1, 999)[:, 0].tolist() == [2490, 4190, 3700, 3140]


def test_heldout_text_is_apart_repeatable_and_spread(numbered: TokenDataset) -> None:
    batches = list(numbered.heldout(1000))
    assert len(batches) == 50
    stacked = np.concatenate(batches)
    assert stacked.min() >= HELDOUT_FIRST
    assert len(np.unique(stacked)) == stacked.size
    first = list(numbered.heldout(3))
    assert len(first) == 3
    assert all((a == b).all() for a, b in zip(first, batches[:3], strict=True))
    assert np.ptp(np.concatenate(first)) > 1000
    assert list(numbered.heldout(0)) == []
    train = [numbered.microbatch(0, data_id) for data_id in range(numbered.microbatches_per_pass)]
    assert np.concatenate(train).max() < HELDOUT_FIRST


def test_a_negative_id_is_refused(numbered: TokenDataset) -> None:
    with pytest.raises(ValueError, match="negative"):
        numbered.microbatch(0, -1)


def test_less_than_one_microbatch_is_refused(tmp_path: Path) -> None:
    write_numbered(tmp_path / "data", 39, cut_as(9, 4))
    with pytest.raises(DataError, match="3 sequences are less than one microbatch"):
        TokenDataset.open(tmp_path / "data")


def test_open_wants_the_run_s_data(numbered: TokenDataset) -> None:
    digest = numbered.index.digest
    assert TokenDataset.open(numbered.folder, expect_digest=digest).index == numbered.index
    with pytest.raises(DataError, match=f"holds data {digest}, the run needs {'0' * 64}; fetch"):
        TokenDataset.open(numbered.folder, expect_digest="0" * 64)


def test_verify_notices_one_flipped_bit_in_any_file(numbered: TokenDataset) -> None:
    numbered.verify()
    for file in dataset_files(numbered.index):
        path = numbered.folder / file.name
        data = bytearray(path.read_bytes())
        data[len(data) // 2] ^= 1
        path.write_bytes(data)
        with pytest.raises(DataError, match=rf"{file.name}: digest .* is not the index's"):
            TokenDataset.open(numbered.folder).verify()
        data[len(data) // 2] ^= 1
        path.write_bytes(data)
    numbered.verify()


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda path: path.unlink(), r"train-00001\.bin: No such file.*fetch or prepare it again"),
        (lambda path: path.write_bytes(path.read_bytes()[:-4]), r"train-00001\.bin: 5196 bytes, the index says 5200"),
    ],
)
def test_open_notices_a_missing_or_short_file(
    numbered: TokenDataset, damage: Callable[[Path], object], message: str
) -> None:
    damage(numbered.folder / "train-00001.bin")
    with pytest.raises(DataError, match=message):
        TokenDataset.open(numbered.folder)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (b'"train-00000.bin"', b'"../../etc/passwd"'),
        (b'"format_version": 1', b'"format_version": 2'),
        (b'"dtype"', b'"d_type"'),
        (b"{", b"["),
    ],
)
def test_an_index_of_another_kind_is_refused(numbered: TokenDataset, old: bytes, new: bytes) -> None:
    path = numbered.folder / "index.json"
    path.write_bytes(path.read_bytes().replace(old, new))
    with pytest.raises(DataError, match=r"index\.json: not a dataset's index of this version"):
        read_index(numbered.folder)


def test_a_folder_fetched_file_by_file_is_the_same_data(numbered: TokenDataset, tmp_path: Path) -> None:
    far, near = numbered.folder, tmp_path / "near"
    near.mkdir()
    index = DatasetIndex.from_bytes((far / "index.json").read_bytes(), "the far side")
    assert index.digest == numbered.index.digest
    for name, size_bytes, digest in dataset_files(index):
        shutil.copyfile(far / name, near / name)
        check_file(near / name, size_bytes, digest)
        with pytest.raises(DataError, match="bytes, the index says"):
            check_file(near / name, size_bytes + 1, digest)
    (near / "index.json").write_bytes(index.to_bytes())
    fetched = TokenDataset.open(near, expect_digest=index.digest)
    assert (fetched.microbatch(5, 5) == numbered.microbatch(5, 5)).all()


def test_no_prepared_data_says_so(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"index\.json: No such file.*prepare the data first"):
        TokenDataset.open(tmp_path)


def test_the_default_data_is_ready_to_train_on(tmp_path: Path) -> None:
    config = DataConfig()
    index = prepare(config, tmp_path / config.folder_name())
    dataset = TokenDataset.open(tmp_path / config.folder_name(), expect_digest=index.digest)
    assert index.tokenizer.vocab_size == 2048
    assert 1_000_000 < index.num_train_tokens < 1_200_000
    assert dataset.microbatches_per_pass > 1000
    assert len(list(dataset.heldout(100))) > 30
    tokenizer = dataset.tokenizer()
    text = tokenizer.decode(dataset.microbatch(0, 0)[0])
    assert len(text) > 300
    assert dataset.microbatch(0, 0).max() < tokenizer.vocab_size
