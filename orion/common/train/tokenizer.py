"""Text to token ids and back: a thin wrapper on the `tokenizers` library.

Owns where a tokenizer comes from and how text is encoded. Text never becomes a control token: `<|endoftext|>` written
out in a document is encoded as the letters it consists of, so no document can end itself or another.
"""

import json
from collections.abc import Iterable, Sequence
from pathlib import Path

import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from orion.common.errors import DataError
from orion.common.train.data_config import parse_hub_name

LLAMA3_TOKENIZER = "hf:meta-llama/Llama-3.2-1B"
"""Llama 3's tokenizer (128,256 tokens), for the big presets; its licence must be accepted on the hub first."""
EOS_TOKEN = "<|endoftext|>"
"""Ends a document in tokenizers that are trained here."""

_EOS_NAMES = (EOS_TOKEN, "<|end_of_text|>", "</s>", "<eos>", "<|im_end|>", "[EOS]")
_BOS_NAMES = ("<|begin_of_text|>", "<s>", "<bos>", "[BOS]")
_TOKENIZER_BYTES_MAX = 256 << 20


class Tokenizer:
    """Encodes and decodes; knows its end-of-text token. Safe to share between threads."""

    def __init__(self, inner: tokenizers.Tokenizer, eos_token: str = "") -> None:
        """`eos_token` empty = look among the usual names. Raises DataError when there is no such token."""
        inner.no_truncation()
        inner.no_padding()
        inner.encode_special_tokens = True
        self._inner = inner
        vocab = inner.get_vocab(with_added_tokens=True)
        self.vocab_size: int = max(vocab.values()) + 1
        """Token ids lie below this."""
        names = (eos_token,) if eos_token else _EOS_NAMES
        eos_ids = [vocab[name] for name in names if name in vocab]
        if not eos_ids:
            raise DataError(f"the tokenizer has none of {', '.join(names)}; name its end-of-text token with eos_token")
        self.eos_id: int = eos_ids[0]
        """Ends a document."""
        self.bos_id: int | None = next((vocab[name] for name in _BOS_NAMES if name in vocab), None)
        """Begins a text, where the tokenizer has such a token; `encode` never adds it."""

    def encode(self, text: str) -> list[int]:
        """Token ids of `text`, with nothing added before or after."""
        return list(self._inner.encode(text, add_special_tokens=False).ids)

    def encode_prompt(self, text: str) -> list[int]:
        """Token ids of a text to go on from, begun as the tokenizer's own rules say (Llama's with its first token)."""
        return list(self._inner.encode(text, add_special_tokens=True).ids)

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """`encode` of each text, on all cores."""
        return [encoding.ids for encoding in self._inner.encode_batch_fast(list(texts), add_special_tokens=False)]

    def decode(self, ids: Iterable[int]) -> str:
        """Text of `ids`; special tokens are written out, bytes that are no UTF-8 become U+FFFD."""
        return str(self._inner.decode([int(token_id) for token_id in ids], skip_special_tokens=False))


def train_bpe(texts: Iterable[str], vocab_size: int, path: Path) -> Tokenizer:
    """Trains a byte-level BPE and writes it to `path` as a tokenizer.json.

    It has `vocab_size` tokens, or fewer when the text is too short for so many. `texts` is consumed once, streaming.
    The same texts give the same file. Any unicode text survives a round trip.
    """
    inner = tokenizers.Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[EOS_TOKEN],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    inner.train_from_iterator(iter(texts), trainer)
    inner.save(str(path), pretty=False)
    return Tokenizer(inner)


def load_tokenizer(spec_or_path: str | Path, eos_token: str = "") -> Tokenizer:
    """Loads `hf:NAME[@REVISION]` or a tokenizer.json. Raises DataError saying what to do when it cannot be had."""
    path = locate_tokenizer(str(spec_or_path))
    try:
        with path.open("rb") as file:
            data = file.read(_TOKENIZER_BYTES_MAX + 1)
    except OSError as error:
        raise DataError(f"{path}: {error.strerror}; give the path of a tokenizer.json") from None
    if len(data) > _TOKENIZER_BYTES_MAX:
        raise DataError(f"{path}: larger than {_TOKENIZER_BYTES_MAX} bytes, this is not a tokenizer.json")
    try:
        tree = json.loads(data)
    except ValueError as error:
        raise DataError(f"{path}: not a tokenizer.json: {error}") from None
    # The library reports any flaw as a bare Exception; the usual one, a file of another kind, is told apart here.
    if not isinstance(tree, dict) or not isinstance(tree.get("model"), dict):
        raise DataError(f"{path}: not a tokenizer.json: it describes no model")
    return Tokenizer(tokenizers.Tokenizer.from_buffer(data), eos_token)


def locate_tokenizer(spec_or_path: str) -> Path:
    """Path of the tokenizer.json; `hf:NAME[@REVISION]` is fetched into the hub's own cache. Raises DataError."""
    if not spec_or_path.startswith("hf:"):
        return Path(spec_or_path)
    import huggingface_hub  # noqa: PLC0415  # heavy, and needed by this branch alone

    try:
        hub = parse_hub_name(spec_or_path)
        return Path(huggingface_hub.hf_hub_download(hub.name, "tokenizer.json", revision=hub.revision))
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise DataError(
            f"tokenizer {spec_or_path} cannot be had: {reason} - check the network and the name; for a gated model "
            "accept its licence on its page and set HF_TOKEN; or copy its tokenizer.json here and give that path"
        ) from error
