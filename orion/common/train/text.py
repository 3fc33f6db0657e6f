"""Where the training text comes from, as a stream of documents.

Owns reading: the King James Bible, Python's own library, text, JSONL and Parquet files, datasets of the hub. A document
is a piece of text that belongs together; long ones are cut, so that none is a burden on memory.
Reads as it goes: never more of a source in memory than one block, line, record batch or document.
"""

import json
import sys
import sysconfig
import tokenize
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO

from orion.common.errors import DataError
from orion.common.train.data_config import DataConfig, parse_hub_name
from orion.common.train.data_index import SourceInfo
from orion.common.train.kjv import find_kjv, kjv_chapters, kjv_origin

PASSAGE_CHARS_MAX = 4 << 10
"""Plain text files have no documents; they are cut into passages of this size, so that some can be held out."""
DOCUMENT_CHARS_MAX = 64 << 10
"""Longer documents are cut; about 16 k tokens, far longer than a sequence."""

_BLOCK_CHARS = 64 << 10
_LINE_BYTES_MAX = 64 << 20
_RECORDS_PER_BATCH = 256
_TEXT_SUFFIXES = frozenset({".txt", ".text", ".md", ".rst"})
_LICENCE_NAMES = ("LICENSE", "LICENSE.txt", "LICENSE.md", "LICENCE", "LICENCE.txt", "COPYING")
_LICENCE_CHARS_MAX = 64 << 10
_NO_LICENCE = "not stated by the source"
_KJV_LICENCE = (
    "The King James Version is in the public domain; in the United Kingdom its printing is under Crown "
    "letters patent. The package that carries the text is under the MIT licence, copyright Nathan Patton."
)
# Tests are data for tests, not prose; the others are not part of the library.
_NOT_LIBRARY = frozenset({"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"})


@dataclass(frozen=True, slots=True)
class TextSource:
    """A text that can be read any number of times."""

    info: SourceInfo
    documents: Callable[[], Iterator[str]]
    """Starts reading from the beginning; raises DataError on what cannot be read."""


def open_source(config: DataConfig) -> TextSource:
    """The source that the config names; no text is read yet. Raises DataError saying what to do when it is missing."""
    kind, _, rest = config.source.partition(":")
    if kind == "kjv":
        path = find_kjv()
        source = TextSource(
            SourceInfo(title="The King James Bible", origin=kjv_origin(), licence=_KJV_LICENCE),
            lambda: kjv_chapters(path),
        )
    elif kind == "python-docs":
        source = _python_source()
    elif kind == "path":
        source = _path_source(Path(rest), config.text_field)
    else:
        source = _hub_source(config)
    if config.licence:
        info = source.info.model_copy(update={"licence": config.licence})
        return TextSource(info, source.documents)
    return source


def cut(blocks: Iterable[str], chars_max: int) -> Iterator[str]:
    """Cuts a text that arrives in blocks into pieces of at most `chars_max` characters; joined they are the text.

    A piece ends after a paragraph where it can, else after a line, else after a word.
    """
    rest = ""
    for block in blocks:
        rest += block
        start = 0
        while len(rest) - start > chars_max:
            end = _cut_before(rest, start, start + chars_max)
            yield rest[start:end]
            start = end
        rest = rest[start:]
    if rest:
        yield rest


def _cut_before(text: str, start: int, end: int) -> int:
    for mark in ("\n\n", "\n", " "):
        place = text.rfind(mark, start, end)
        if place >= 0:
            return place + len(mark)
    return end


def _python_source() -> TextSource:
    folder = Path(sysconfig.get_path("stdlib"))
    files = sorted(path for path in folder.rglob("*.py") if not _NOT_LIBRARY & set(path.relative_to(folder).parts))
    if not files:
        raise DataError(f"Python's library has no sources in {folder}; choose another data source")

    def documents() -> Iterator[str]:
        for path in files:
            yield from cut(_blocks(path, tokenize.open), DOCUMENT_CHARS_MAX)

    version = ".".join(str(part) for part in sys.version_info[:3])
    licence = f"Python Software Foundation License Version 2. {sys.copyright}"
    return TextSource(
        SourceInfo(title="The Python standard library", origin=f"Python {version}", licence=licence), documents
    )


def _path_source(root: Path, field: str) -> TextSource:
    files = _files(root)

    def documents() -> Iterator[str]:
        for path in files:
            yield from _file_documents(path, field)

    return TextSource(SourceInfo(title=root.name, origin=str(root), licence=_licence_beside(root)), documents)


def _files(root: Path) -> list[Path]:
    if root.is_file():
        return [root]
    known = _TEXT_SUFFIXES | {".jsonl", ".parquet"}
    files = sorted(
        path
        for path in root.rglob("*")
        if path.suffix.lower() in known and path.name not in _LICENCE_NAMES and path.is_file()
    )
    if not files:
        what = "holds no text" if root.is_dir() else "does not exist"
        raise DataError(f"data source {root} {what}; give a file or a folder with {', '.join(sorted(known))} files")
    return files


def _licence_beside(root: Path) -> str:
    folder = root if root.is_dir() else root.parent
    for name in _LICENCE_NAMES:
        path = folder / name
        if path.is_file():
            with path.open(encoding="utf-8", errors="replace") as file:
                return file.read(_LICENCE_CHARS_MAX)
    return _NO_LICENCE


def _file_documents(path: Path, field: str) -> Iterator[str]:
    suffix = path.suffix.lower()
    if suffix not in (".jsonl", ".parquet"):
        yield from cut(_blocks(path, lambda name: name.open(encoding="utf-8-sig")), PASSAGE_CHARS_MAX)
        return
    records = _jsonl_records(path, field) if suffix == ".jsonl" else _parquet_records(path, field)
    for document in records:
        yield from cut([document], DOCUMENT_CHARS_MAX)


def _blocks(path: Path, opener: Callable[[Path], TextIO]) -> Iterator[str]:
    try:
        with opener(path) as file:
            while block := file.read(_BLOCK_CHARS):
                yield block
    except (OSError, UnicodeDecodeError, SyntaxError) as error:
        raise DataError(f"{path}: cannot be read as text: {error}") from error


def _jsonl_records(path: Path, field: str) -> Iterator[str]:
    try:
        with path.open("rb") as file:
            number = 0
            while line := file.readline(_LINE_BYTES_MAX):
                number += 1
                if line.strip():
                    yield _json_text(line, f"{path}: line {number}", field)
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}") from error


def _json_text(line: bytes, where: str, field: str) -> str:
    try:
        record = json.loads(line)
    except ValueError as error:
        raise DataError(f"{where}: not JSON, or longer than {_LINE_BYTES_MAX} bytes: {error}") from None
    text = record.get(field) if isinstance(record, dict) else None
    if not isinstance(text, str):
        raise DataError(f"{where}: no text in field {field!r}; name the field with text_field")
    # An escaped lone surrogate is legal JSON but no text; it becomes a question mark.
    return text.encode("utf-8", errors="replace").decode("utf-8")


def _parquet_records(path: Path, field: str) -> Iterator[str]:
    try:
        import pyarrow as pa  # noqa: PLC0415  # optional, heavy, and needed by this branch alone
        import pyarrow.parquet as pq  # noqa: PLC0415
    except ImportError as error:
        raise DataError(f"{path}: reading Parquet needs pyarrow; run: python -m pip install pyarrow") from error
    try:
        with pq.ParquetFile(path, pre_buffer=False) as file:
            schema = file.schema_arrow
            kinds = {name: schema.field(name).type for name in schema.names}
            if field not in kinds or not (pa.types.is_string(kinds[field]) or pa.types.is_large_string(kinds[field])):
                raise DataError(f"{path}: no text column {field!r} among {', '.join(kinds)}; name it with text_field")
            for batch in file.iter_batches(batch_size=_RECORDS_PER_BATCH, columns=[field]):
                yield from (text for text in batch.column(0).to_pylist() if text is not None)
    except (OSError, pa.ArrowException) as error:
        raise DataError(f"{path}: cannot be read as Parquet: {error}") from error


def _hub_source(config: DataConfig) -> TextSource:
    try:
        import datasets  # noqa: PLC0415  # optional, heavy, and needed by this branch alone
    except ImportError as error:
        raise DataError(
            f"data source {config.source} needs the datasets package; run: python -m pip install 'orion-swarm[hub]'"
        ) from error
    hub = parse_hub_name(config.source)
    field = config.text_field

    def documents() -> Iterator[str]:
        try:
            rows = datasets.load_dataset(hub.name, hub.subset, split="train", streaming=True, revision=hub.revision)
            for row in rows:
                text = row.get(field)
                if not isinstance(text, str):
                    raise DataError(f"{config.source}: no text column {field!r} among {', '.join(row)}; set text_field")
                yield from cut([text], DOCUMENT_CHARS_MAX)
        except (OSError, ValueError) as error:
            raise DataError(
                f"data source {config.source} cannot be read: {error} - check the network and the name, "
                "or choose the source kjv, python-docs or path:FILE_OR_FOLDER"
            ) from error

    return TextSource(SourceInfo(title=hub.name, origin=config.source, licence=_NO_LICENCE), documents)
