"""`orion generate` and `orion export`: what a checkpoint is good for."""

from dataclasses import dataclass
from pathlib import Path

from orion.common.errors import ConfigError, DataError
from orion.common.model.checkpoint import export_hf, load_checkpoint, save_checkpoint
from orion.common.model.generate import generate, load_any
from orion.common.train.tokenizer import load_tokenizer


@dataclass(frozen=True, slots=True)
class Generated:
    """What the model went on with."""

    prompt_token_ids: list[int]
    token_ids: list[int]
    """New tokens only."""
    text: str
    """Of the new tokens."""


def generate_text(
    folder: Path, prompt: str, *, max_new_tokens: int, temperature: float, seed: int, tokenizer: Path | None
) -> Generated:
    """Continues a prompt with the model of an Orion or Hugging Face folder. Raises DataError or ConfigError."""
    loaded = load_any(folder)
    path = tokenizer or loaded.tokenizer
    if path is None:
        raise DataError(f"{folder} holds no tokenizer.json; name one with --tokenizer")
    text_codec = load_tokenizer(path)
    prompt_ids = text_codec.encode_prompt(prompt)
    if not prompt_ids:
        raise ConfigError("the prompt is empty and this tokenizer has no token to begin with; give --prompt some text")
    new_ids = generate(loaded.model, prompt_ids, max_new_tokens, temperature, seed, eos_ids=loaded.eos_ids)
    return Generated(prompt_ids, new_ids, text_codec.decode(new_ids))


def export_checkpoint(folder: Path, out: Path) -> str:
    """Writes a checkpoint for others to use; returns which layout it got.

    Without boundaries a Hugging Face Llama folder; with boundaries, which `transformers` does not know, Orion's own
    layout (`orion.common.model.checkpoint` describes it). Raises ConfigError when `out` is there already, DataError
    when the checkpoint is damaged.
    """
    if out.exists() and any(out.iterdir()):
        raise ConfigError(f"{out} is not empty; choose a new folder")
    checkpoint = load_checkpoint(folder)
    model = checkpoint.model
    if len(model.layouts) == 1 or model.config.boundary.kind == "none":
        export_hf(model, out, checkpoint.tokenizer, checkpoint.eos_ids)
        return "huggingface"
    save_checkpoint(
        out,
        model.config,
        len(model.layouts),
        dict(model.named_parameters()),
        checkpoint.tokenizer,
        extra=checkpoint.extra,
        eos_ids=checkpoint.eos_ids,
    )
    return "orion"
