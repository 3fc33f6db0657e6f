"""`DataConfig`: which text a run trains on and how it is cut into microbatches.

Owns the settings of the data and their spelling. Reads nothing; `data_prepare` acts on them.
"""

import re
from typing import Annotated, NamedTuple

from blake3 import blake3
from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

_HUB_NAME = re.compile(r"hf:(?P<name>[\w.-]+(?:/[\w.-]+)?)(?::(?P<subset>[\w.-]+))?(?:@(?P<revision>[\w./-]+))?")
_BPE = re.compile(r"bpe:(?P<vocab_size>\d+)")

BPE_VOCAB_MIN = 257
"""256 bytes and the token that ends a document: with less, some text could not be encoded."""
BPE_VOCAB_MAX = 1 << 20


class HubName(NamedTuple):
    """`hf:NAME[:SUBSET][@REVISION]` taken apart."""

    name: str
    subset: str | None
    revision: str | None


class DataConfig(BaseModel):
    """What is read, with which tokenizer, cut how. Every process of a run must have the same."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    source: str = "kjv"
    """Where the text comes from: `kjv` (the King James Bible), `python-docs` (the standard library's own sources, no
    download), `path:FILE_OR_FOLDER` (text, .jsonl, .parquet) or `hf:NAME[:SUBSET][@REVISION]` (streamed)."""
    text_field: Annotated[str, Field(min_length=1, max_length=256)] = "text"
    """JSONL field or column of the table that holds a document's text."""
    licence: Annotated[str, Field(max_length=65536)] = ""
    """Licence of the text, recorded with the data; empty = what the source itself states."""
    tokenizer: str = "bpe:2048"
    """`bpe:N` (byte-level BPE of N tokens, trained on the source), `hf:NAME[@REVISION]` or a tokenizer.json's path."""
    eos_token: Annotated[str, Field(max_length=256)] = ""
    """Token that ends a document; empty = the tokenizer's own, found among the usual names."""
    sequence_length: Annotated[int, Field(ge=1, le=1 << 20)] = 128
    """Tokens that a sequence is trained on (T)."""
    sequences_per_microbatch: Annotated[int, Field(ge=1, le=65536)] = 8
    """Sequences (B)."""
    heldout_fraction: Annotated[float, Field(ge=0, le=0.5)] = 0.05
    """Share of the documents that is never trained on; 0 = no held-out text."""
    heldout_tokens_max: Annotated[int, Field(ge=1, le=1 << 28)] = 1 << 20
    """Tokens; once this many are held out, all further documents are for training."""
    tokens_max: Annotated[int, Field(ge=1)] | None = None
    """Training tokens; reading stops there. None = the whole source; a streamed source must name a bound."""
    shard_tokens_max: Annotated[int, Field(ge=1, le=1 << 31)] = 1 << 26
    """Tokens in one shard file; 2^26 are 128 or 256 MiB, small enough to fetch again when a transfer breaks."""

    @field_validator("source")
    @classmethod
    def _check_source(cls, source: str) -> str:
        known = source in ("kjv", "python-docs") or (source.startswith("path:") and len(source) > len("path:"))
        if not known and _HUB_NAME.fullmatch(source) is None:
            raise ValueError(
                f"unknown data source {source!r}; "
                "use kjv, python-docs, path:FILE_OR_FOLDER or hf:NAME[:SUBSET][@REVISION]"
            )
        return source

    @field_validator("tokenizer")
    @classmethod
    def _check_tokenizer(cls, tokenizer: str) -> str:
        hub = _HUB_NAME.fullmatch(tokenizer)
        if (hub is not None and hub["subset"] is None) or tokenizer.endswith(".json"):
            return tokenizer
        bpe = _BPE.fullmatch(tokenizer)
        if bpe is None or not BPE_VOCAB_MIN <= int(bpe["vocab_size"]) <= BPE_VOCAB_MAX:
            raise ValueError(
                f"unknown tokenizer {tokenizer!r}; use bpe:N with {BPE_VOCAB_MIN} ≤ N ≤ {BPE_VOCAB_MAX}, "
                "hf:NAME[@REVISION] or the path of a tokenizer.json"
            )
        return tokenizer

    @model_validator(mode="after")
    def _check(self) -> "DataConfig":
        if self.source.startswith("hf:") and self.tokens_max is None:
            raise ValueError(f"source {self.source!r} is streamed and may be endless; set tokens_max")
        return self

    @property
    def bpe_vocab_size(self) -> int | None:
        """N of `bpe:N`; None when the tokenizer is not trained here."""
        bpe = _BPE.fullmatch(self.tokenizer)
        return None if bpe is None else int(bpe["vocab_size"])

    @property
    def sequence_width(self) -> int:
        """Tokens that a sequence takes from the stream (U = T + 1): the last one is only a target."""
        return self.sequence_length + 1

    def folder_name(self) -> str:
        """Name for the folder of the prepared data: readable, and another one for any other config."""
        readable = re.sub(r"[^a-z0-9]+", "-", f"{self.source} {self.tokenizer}".lower()).strip("-")[:48]
        return f"{readable}-{blake3(self.model_dump_json().encode()).hexdigest()[:16]}"


def parse_hub_name(spec: str) -> HubName:
    """Takes `hf:NAME[:SUBSET][@REVISION]` apart. Raises ValueError when it is spelled otherwise."""
    match = _HUB_NAME.fullmatch(spec)
    if match is None:
        raise ValueError(f"{spec!r} is not hf:NAME[:SUBSET][@REVISION]")
    return HubName(match["name"], match["subset"], match["revision"])
