"""Shared by the numerical tests."""

from pathlib import Path

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers


@pytest.fixture
def tokenizer_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small tokenizer in its file."""
    tokenizer = Tokenizer(models.WordLevel({"[unk]": 0, "in": 1, "the": 2, "beginning": 3}, unk_token="[unk]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    path = tmp_path_factory.mktemp("tokenizer") / "words.json"
    tokenizer.save(str(path))
    return path
