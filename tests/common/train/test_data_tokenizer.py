"""Tokenizers: any text survives, text is never taken for a control token, and errors say what to do."""

import json
from pathlib import Path

import huggingface_hub.constants
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from orion.common.errors import DataError
from orion.common.train.tokenizer import EOS_TOKEN, Tokenizer, load_tokenizer, train_bpe

TEXTS = ["In the beginning was the word, and the word was long.", "naïve café — 日本語", "x = f(y)\n\n\tz"] * 5


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    train_bpe(TEXTS, 300, path)
    return path


@pytest.fixture(scope="module")
def tokenizer(path: Path) -> Tokenizer:
    return load_tokenizer(path)


@settings(deadline=None)
@given(text=st.text())
def test_any_unicode_text_survives_a_round_trip(tokenizer: Tokenizer, text: str) -> None:
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert tokenizer.encode_batch([text, ""]) == [ids, []]
    assert all(0 <= token_id < tokenizer.vocab_size for token_id in ids)
    assert tokenizer.eos_id not in ids


def test_text_that_spells_a_control_token_is_only_text(tokenizer: Tokenizer) -> None:
    text = f"one{EOS_TOKEN}two"
    assert tokenizer.eos_id not in tokenizer.encode(text)
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.decode([tokenizer.eos_id]) == EOS_TOKEN


def test_training_again_gives_the_same_file(path: Path, tmp_path: Path) -> None:
    train_bpe(iter(TEXTS), 300, tmp_path / "again.json")
    assert (tmp_path / "again.json").read_bytes() == path.read_bytes()


def test_a_short_text_gives_fewer_tokens_than_asked(tmp_path: Path) -> None:
    assert train_bpe(["ab"], 5000, tmp_path / "tokenizer.json").vocab_size < 300


def test_a_template_of_the_file_adds_nothing(path: Path, tmp_path: Path) -> None:
    tree = json.loads(path.read_text())
    tree["truncation"] = {"direction": "Right", "max_length": 2, "strategy": "LongestFirst", "stride": 0}
    tree["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [{"SpecialToken": {"id": EOS_TOKEN, "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 0}}],
        "special_tokens": {EOS_TOKEN: {"id": EOS_TOKEN, "ids": [0], "tokens": [EOS_TOKEN]}},
    }
    (tmp_path / "tokenizer.json").write_text(json.dumps(tree))
    assert load_tokenizer(tmp_path / "tokenizer.json").encode(TEXTS[0]) == load_tokenizer(path).encode(TEXTS[0])


def test_the_end_of_text_token_can_be_named(path: Path, tmp_path: Path) -> None:
    renamed = tmp_path / "tokenizer.json"
    renamed.write_text(path.read_text().replace(EOS_TOKEN, "<stop>"))
    assert load_tokenizer(renamed, eos_token="<stop>").eos_id == 0
    with pytest.raises(DataError, match="name its end-of-text token with eos_token"):
        load_tokenizer(renamed)


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"model": 3}', "\x00\x01"])
def test_a_file_of_another_kind_is_refused(tmp_path: Path, content: str) -> None:
    (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(DataError, match=r"tokenizer\.json: not a tokenizer\.json"):
        load_tokenizer(tmp_path / "tokenizer.json")


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"none/tokenizer\.json: No such file"):
        load_tokenizer(tmp_path / "none" / "tokenizer.json")


def test_a_hub_tokenizer_comes_from_the_cache_when_offline(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    revision = "0123456789abcdef0123456789abcdef01234567"
    snapshot = tmp_path / "models--someone--small" / "snapshots" / revision
    snapshot.mkdir(parents=True)
    (snapshot / "tokenizer.json").write_bytes(path.read_bytes())
    assert load_tokenizer(f"hf:someone/small@{revision}").encode("word") == load_tokenizer(path).encode("word")


def test_a_hub_tokenizer_that_cannot_be_had_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(DataError, match=r"hf:someone/absent cannot be had.*HF_TOKEN.*give that path"):
        load_tokenizer("hf:someone/absent")
