"""`orion generate` and `orion export`: what a checkpoint is good for."""

from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

from orion.cli.merged_model import merged_model, stored_states
from orion.cli.resume_source import find_checkpoint, is_run_state
from orion.common.errors import ConfigError, DataError
from orion.common.model.checkpoint import ORION_CONFIG, Checkpoint, export_hf, load_checkpoint, save_checkpoint
from orion.common.model.generate import generate, load_any
from orion.common.net.checkpoint_folder import CheckpointFiles, fetched, write_checkpoint
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


def export_checkpoint(folder: Path, out: Path, *, resumable: bool = False, outer_step: int | None = None) -> str:
    """Writes a checkpoint for others to use; returns which layout it got.

    Without boundaries a Hugging Face Llama folder; with boundaries, which `transformers` does not know, Orion's own
    layout (`orion.common.model.checkpoint` describes it). `folder` is a checkpoint, or a run's state, of which
    `outer_step` (None = the newest) is taken. `resumable`: Orion's layout with all that a run needs to go on from it.
    Raises ConfigError when `out` is there already, DataError when the checkpoint is damaged or not there.
    """
    if out.exists() and any(out.iterdir()):
        raise ConfigError(f"{out} is not empty; choose a new folder")
    if resumable or outer_step is not None or is_run_state(folder):
        with TemporaryDirectory() as downloads:
            stored = fetched(find_checkpoint(folder, outer_step), Path(downloads))
            checkpoint = _from_states(folder, stored)
            if resumable:
                _save(out, checkpoint)
                write_checkpoint(out, stored.spec, stored.checkpoint, [path.read_bytes() for path in stored.paths])
                return "resumable"
    else:
        checkpoint = load_checkpoint(folder)
    model = checkpoint.model
    if len(model.layouts) == 1 or model.config.boundary.kind == "none":
        export_hf(model, out, checkpoint.tokenizer, checkpoint.eos_ids)
        return "huggingface"
    _save(out, checkpoint)
    return "orion"


def _from_states(folder: Path, stored: CheckpointFiles) -> Checkpoint:
    """The model at the outer states of a run; with the tokenizer, where it lies beside them."""
    spec = stored.spec
    places = [folder, *(folder / "checkpoint",)]
    described = next((load_checkpoint(place) for place in places if (place / ORION_CONFIG).is_file()), None)
    return Checkpoint(
        model=merged_model(spec, stored_states(stored)),
        eos_ids=() if described is None else described.eos_ids,
        tokenizer=None if described is None else described.tokenizer,
        extra={
            "run_id": spec.run_id,
            "run_digest": spec.digest,
            "outer_step": stored.checkpoint.outer_step,
            "seed": spec.seed,
        },
        rule=spec.split,
    )


def _save(out: Path, checkpoint: Checkpoint) -> None:
    save_checkpoint(
        out,
        checkpoint.model.config,
        len(checkpoint.model.layouts),
        dict(checkpoint.model.named_parameters()),
        checkpoint.tokenizer,
        extra=checkpoint.extra,
        rule=checkpoint.rule,
        eos_ids=checkpoint.eos_ids,
    )
