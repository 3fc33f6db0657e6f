"""Preparing a folder: once, whole, the same everywhere, whoever else is at work or was killed."""

import json
import shutil
import signal
import subprocess
import sys
from collections import Counter
from pathlib import Path
from random import Random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from orion.common.errors import DataError
from orion.common.train.data import DataConfig, DatasetIndex, TokenDataset, prepare, read_index
from orion.common.train.data_index import TOKEN_DTYPES
from orion.common.train.heldout import HeldoutSplit, Side, is_heldout
from orion.common.train.tokenizer import train_bpe

NUM_DOCUMENTS = 300


def write_documents(folder: Path, copies: int = 1) -> None:
    """JSONL of documents that each name themselves, shuffled; `copies` of each."""
    folder.mkdir(exist_ok=True)
    lines = [
        json.dumps({"text": f"#{number}# {'some more words of it ' * (number % 7)}"})
        for number in list(range(NUM_DOCUMENTS)) * copies
    ]
    Random(0).shuffle(lines)
    (folder / "documents.jsonl").write_text("\n".join(lines))


def small_config(source: Path, **changes: object) -> DataConfig:
    return DataConfig.model_validate(
        {
            "source": f"path:{source}",
            "tokenizer": "bpe:300",
            "sequence_length": 15,
            "sequences_per_microbatch": 4,
            "heldout_fraction": 0.2,
            **changes,
        }
    )


@pytest.fixture
def source(tmp_path: Path) -> Path:
    write_documents(tmp_path / "source")
    return tmp_path / "source"


def documents_of(folder: Path, index: DatasetIndex, names: list[str]) -> list[str]:
    """Reads shards back as documents, independently of TokenDataset."""
    tokens = np.concatenate([np.fromfile(folder / name, dtype=TOKEN_DTYPES[index.dtype]) for name in names])
    text = TokenDataset.open(folder).tokenizer().decode(tokens.tolist())
    return [document for document in text.split("<|endoftext|>") if document]


def test_every_document_is_on_exactly_one_side_whole(source: Path, tmp_path: Path) -> None:
    index = prepare(small_config(source, shard_tokens_max=500), tmp_path / "data")
    train = documents_of(tmp_path / "data", index, [shard.name for shard in index.train])
    heldout = documents_of(tmp_path / "data", index, [index.heldout.name])
    originals = [json.loads(line)["text"] for line in (source / "documents.jsonl").read_text().splitlines()]
    assert Counter(train + heldout) == Counter(originals)
    assert [text for text in originals if not is_heldout(text, 0.2)] == train
    assert 0.1 < len(heldout) / NUM_DOCUMENTS < 0.3
    assert len(index.train) > 3
    assert all(shard.num_tokens == 500 for shard in index.train[:-1])
    assert index.num_documents == NUM_DOCUMENTS


def test_copies_of_a_heldout_document_are_not_trained_on(tmp_path: Path) -> None:
    write_documents(tmp_path / "source", copies=3)
    index = prepare(small_config(tmp_path / "source", heldout_tokens_max=150), tmp_path / "data")
    train = documents_of(tmp_path / "data", index, [shard.name for shard in index.train])
    heldout = documents_of(tmp_path / "data", index, [index.heldout.name])
    assert not set(train) & set(heldout)
    assert set(Counter(heldout).values()) == {1}
    assert set(Counter(train).values()) == {3}
    assert 0 < index.heldout.num_tokens <= 150


@settings(deadline=None)
@given(
    documents=st.lists(st.text(alphabet="abc", min_size=1, max_size=4), max_size=80),
    fraction=st.floats(0, 0.5),
    tokens_max=st.integers(1, 60),
)
def test_no_text_is_ever_on_both_sides(documents: list[str], fraction: float, tokens_max: int) -> None:
    split = HeldoutSplit(fraction, tokens_max)
    sides = [(split.choose(document, len(document)), document) for document in documents]
    heldout = [document for side, document in sides if side is Side.HELDOUT]
    train = {document for side, document in sides if side is Side.TRAIN}
    assert not train & set(heldout)
    assert train | set(heldout) == set(documents)
    assert sum(map(len, heldout)) <= tokens_max


def test_a_second_call_changes_nothing_and_a_second_folder_gets_the_same_bytes(source: Path, tmp_path: Path) -> None:
    config = small_config(source)
    first = prepare(config, tmp_path / "one")
    before = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "one").iterdir()}
    written: list[int] = []
    assert prepare(config, tmp_path / "one", on_tokens=written.append) == first
    assert written == []
    assert {path.name: path.stat().st_mtime_ns for path in (tmp_path / "one").iterdir()} == before
    second = prepare(config, tmp_path / "two", on_tokens=written.append)
    assert written[-1] == second.num_train_tokens
    assert second.digest == first.digest
    for name in before:
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()
    assert DatasetIndex.from_bytes(first.to_bytes(), "here") == first == read_index(tmp_path / "one")


def test_the_digest_follows_the_text_and_the_settings(source: Path, tmp_path: Path) -> None:
    config = small_config(source)
    digests = {prepare(config, tmp_path / "a").digest}
    digests.add(prepare(small_config(source, sequence_length=14), tmp_path / "b").digest)
    with (source / "documents.jsonl").open("a") as file:
        file.write('\n{"text": "one more"}')
    digests.add(prepare(config, tmp_path / "c").digest)
    assert len(digests) == 3
    assert config.folder_name() != small_config(source, sequence_length=14).folder_name()


def test_training_tokens_stop_at_the_bound(source: Path, tmp_path: Path) -> None:
    index = prepare(small_config(source, tokens_max=777), tmp_path / "data")
    assert index.num_train_tokens == 777


def test_a_given_tokenizer_is_kept_beside_the_shards(source: Path, tmp_path: Path) -> None:
    path = tmp_path / "mine.json"
    tokenizer = train_bpe(["some more words of it"] * 9, 280, path)
    index = prepare(small_config(source, tokenizer=str(path)), tmp_path / "data")
    assert (tmp_path / "data" / "tokenizer.json").read_bytes() == path.read_bytes()
    assert index.tokenizer.vocab_size == tokenizer.vocab_size
    with pytest.raises(DataError, match=r"absent\.json: No such file"):
        prepare(small_config(source, tokenizer=str(tmp_path / "absent.json")), tmp_path / "other")


def test_a_vocabulary_beyond_sixteen_bits_takes_wider_tokens(source: Path, tmp_path: Path) -> None:
    path = tmp_path / "wide.json"
    train_bpe(["words"], 300, path)
    tree = json.loads(path.read_text())
    tree["model"]["vocab"]["never"] = 70_000
    path.write_text(json.dumps(tree))
    index = prepare(small_config(source, tokenizer=str(path)), tmp_path / "data")
    assert index.dtype == "uint32"
    assert index.train[0].size_bytes == 4 * index.train[0].num_tokens
    assert len(documents_of(tmp_path / "data", index, [index.heldout.name])) > 1


def test_too_little_text_says_what_is_missing(tmp_path: Path) -> None:
    (tmp_path / "tiny.txt").write_text("a few words")
    config = small_config(tmp_path / "tiny.txt", heldout_fraction=0)
    with pytest.raises(DataError, match=r"train tokens make 0 sequences of 16, a microbatch needs 4; give more text"):
        prepare(config, tmp_path / "data")
    assert [path.name for path in tmp_path.iterdir() if path.suffix != ".lock"] == ["tiny.txt"]


def test_too_little_heldout_text_is_named_and_none_may_be_wanted(source: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="heldout tokens make 0 sequences of 16"):
        prepare(small_config(source, heldout_fraction=1e-9), tmp_path / "data")
    index = prepare(small_config(source, heldout_fraction=0), tmp_path / "data")
    assert index.heldout.num_tokens == 0
    assert list(TokenDataset.open(tmp_path / "data").heldout(5)) == []


def test_a_folder_that_holds_something_else_is_left_alone(source: Path, tmp_path: Path) -> None:
    folder = tmp_path / "data"
    folder.mkdir()
    prepare(small_config(source), folder)  # an empty folder is taken
    with pytest.raises(DataError, match=r"holds other data \(sequence_length 15 not 14\); use another folder"):
        prepare(small_config(source, sequence_length=14), folder)
    (folder / "heldout.bin").write_bytes(b"")
    with pytest.raises(DataError, match=r"heldout\.bin: 0 bytes, the index says"):
        prepare(small_config(source), folder)
    (folder / "index.json").unlink()
    with pytest.raises(DataError, match="neither empty nor a dataset's folder"):
        prepare(small_config(source), folder)
    shutil.rmtree(folder)
    folder.write_text("a file")
    with pytest.raises(DataError, match="data"):
        prepare(small_config(source), folder)


WORKER = """
import sys
from pathlib import Path
from orion.common.clock import SystemClock
from orion.common.train.data import DataConfig, prepare

class Reporting(SystemClock):
    reads = 0
    def monotonic_s(self):
        self.reads += 1
        if self.reads == 2:  # the first read sets the deadline, the second finds the lock taken
            print("waiting", flush=True)
        return super().monotonic_s()

started = False
def hold(num_tokens):
    global started
    if not started:
        started = True
        print("writing", flush=True)
        sys.stdin.readline()

index = prepare(DataConfig.model_validate_json(sys.argv[1]), Path(sys.argv[2]), on_tokens=hold, clock=Reporting())
print(index.digest, flush=True)
"""


def start_worker(config: DataConfig, folder: Path) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", WORKER, config.model_dump_json(), str(folder)]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def line_of(worker: subprocess.Popen[str]) -> str:
    assert worker.stdout is not None
    return worker.stdout.readline().strip()


def test_of_two_processes_one_works_and_the_other_waits_for_it(source: Path, tmp_path: Path) -> None:
    config, folder = small_config(source), tmp_path / "data"
    with start_worker(config, folder) as first:
        assert line_of(first) == "writing"
        assert not folder.exists()
        with pytest.raises(DataError, match="another process has been at work on this data"):
            prepare(config, folder, wait_s=0)
        with start_worker(config, folder) as second:
            assert line_of(second) == "waiting"
            assert first.stdin is not None
            first.stdin.write("go on\n")
            first.stdin.flush()
            digest = line_of(first)
            assert line_of(second) == digest  # it wrote nothing itself
    assert (first.returncode, second.returncode) == (0, 0)
    assert TokenDataset.open(folder, expect_digest=digest).index.config == config


def test_a_process_killed_at_work_leaves_nothing_in_the_way(source: Path, tmp_path: Path) -> None:
    config, folder = small_config(source), tmp_path / "data"
    with start_worker(config, folder) as worker:
        assert line_of(worker) == "writing"
        worker.kill()
    assert worker.returncode == -signal.SIGKILL
    assert [path.name for path in tmp_path.iterdir() if "unfinished" in path.name] != []
    prepare(config, folder)
    TokenDataset.open(folder).verify()
    assert [path.name for path in tmp_path.iterdir() if "unfinished" in path.name] == []


def test_a_broken_source_is_named_and_leaves_nothing_behind(source: Path, tmp_path: Path) -> None:
    with (source / "documents.jsonl").open("a") as file:
        file.write("\nbroken")
    with pytest.raises(DataError, match=r"documents\.jsonl: line 301: not JSON"):
        prepare(small_config(source), tmp_path / "data")
    assert {path.name for path in tmp_path.iterdir()} == {"source", ".data.lock"}


def test_a_place_that_cannot_be_written_is_named(source: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(DataError, match="file/data: the data cannot be written"):
        prepare(small_config(source), tmp_path / "file" / "data")
