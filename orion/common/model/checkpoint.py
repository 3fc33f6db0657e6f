"""Models in folders: Orion's own layout, and Hugging Face's for Llama.

Owns both file layouts. Must not generate or train, and never unpickles. Invariants: what is loaded has exactly the
expected names and shapes, or nothing is returned; a folder's description is written after its tensors, so a folder
that has one is whole.

Orion's layout, for models with boundaries and for resuming:

    orion_config.json    one object: "format" ("orion-checkpoint"), "version" (1), "model" (every field of ModelConfig),
                         "num_stages" and "split_rule" (which fix where the boundaries are), "eos_ids" (token ids that
                         end a text), "extra" (whatever the writer adds: run, outer step, seeds; JSON)
    model.safetensors    every parameter under its global name: "embedding.weight",
    "blocks.I.attention.{q,k,v,o}.weight",
                         "blocks.I.ffn.{gate,up,down}.weight", "blocks.I.{attention,ffn}_norm.weight", "norm.weight",
                         "head.weight" (absent when tied), "boundaries.J.sender.…" and "boundaries.J.receiver.…", J
                         being the stage that sends
    tokenizer.json       of the `tokenizers` library; may be absent
    resume/              anchors and momenta of the stages, for a run to go on from; may be absent
                         (`orion.common.net.checkpoint_folder`)

Tensors may be spread over several safetensors files with a `model.safetensors.index.json`, in either layout.
"""

import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from orion.common.errors import ConfigError, DataError
from orion.common.model.config import ModelConfig
from orion.common.model.huggingface import config_from_hf, config_to_hf, hf_name
from orion.common.model.splits import SplitRule
from orion.common.model.stage import Transformer

ORION_CONFIG = "orion_config.json"
HF_CONFIG = "config.json"
TENSORS = "model.safetensors"
TENSOR_INDEX = "model.safetensors.index.json"
TOKENIZER = "tokenizer.json"


class _Description(BaseModel):
    """The content of `orion_config.json`."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    format: Literal["orion-checkpoint"] = "orion-checkpoint"
    version: Literal[1] = 1
    model: ModelConfig
    num_stages: int = Field(ge=1)
    split_rule: SplitRule = "balanced"
    eos_ids: tuple[int, ...] = ()
    extra: dict[str, Any] = {}


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """What an Orion folder holds."""

    model: Transformer
    eos_ids: tuple[int, ...]
    tokenizer: Path | None
    extra: Mapping[str, Any]
    rule: SplitRule = "balanced"
    """Where the model's stages begin, and with them the boundaries."""


def save_checkpoint(
    path: Path,
    config: ModelConfig,
    num_stages: int,
    params: Mapping[str, Tensor],
    tokenizer: Path | None = None,
    *,
    extra: Mapping[str, Any] | None = None,
    rule: SplitRule = "balanced",
    eos_ids: Sequence[int] = (),
) -> None:
    """Writes a model with its boundaries in Orion's layout (see the module's text).

    `params` are all parameters of `Transformer(config, num_stages, rule)` by name, in any dtype, on any device;
    `tokenizer` is copied; `extra` must be JSON. Raises ConfigError when names or shapes are not that model's.
    """
    with torch.device("meta"):
        expected = {
            name: tuple(param.shape) for name, param in Transformer(config, num_stages, rule).named_parameters()
        }
    given = {name: tuple(param.shape) for name, param in params.items()}
    if given != expected:
        wrong = sorted(name for name in given.keys() | expected.keys() if given.get(name) != expected.get(name))
        raise ConfigError(
            f"these are not the parameters of {config.name} in {num_stages} stages: {', '.join(wrong[:5])}"
        )
    description = _Description(
        model=config, num_stages=num_stages, split_rule=rule, eos_ids=tuple(eos_ids), extra=dict(extra or {})
    )
    _write_folder(path, params, tokenizer, {ORION_CONFIG: description.model_dump(mode="json")})


def load_checkpoint(path: Path, dtype: torch.dtype = torch.float32) -> Checkpoint:
    """Opens a folder in Orion's layout; parameters become `dtype`. Raises DataError."""
    try:
        description = _Description.model_validate(_read_json(path / ORION_CONFIG))
    except ValidationError as error:
        raise DataError(f"{path / ORION_CONFIG}: {error}") from error
    model = Transformer(description.model, description.num_stages, description.split_rule).to(dtype)
    _fill(path, dict(model.named_parameters()))
    tokenizer = path / TOKENIZER
    return Checkpoint(
        model,
        description.eos_ids,
        tokenizer if tokenizer.is_file() else None,
        description.extra,
        description.split_rule,
    )


def load_hf_folder(path: Path, dtype: torch.dtype = torch.float32) -> tuple[ModelConfig, Transformer]:
    """Opens a Hugging Face Llama folder; parameters become `dtype`. Raises DataError."""
    config = config_from_hf(_read_json(path / HF_CONFIG), name=path.resolve().name)
    model = Transformer(config).to(dtype)
    tied_head = {hf_name("head.weight")} if config.tie_embeddings else set()
    _fill(path, {hf_name(name): param for name, param in model.named_parameters()}, ignored=tied_head)
    return config, model


def hf_eos_ids(path: Path) -> tuple[int, ...]:
    """The token ids that end a text, as a Hugging Face folder declares them. Raises DataError."""
    for name in ("generation_config.json", HF_CONFIG):
        file = path / name
        declared = _read_json(file).get("eos_token_id") if file.is_file() else None
        if declared is not None:
            ids = declared if isinstance(declared, list) else [declared]
            if not all(isinstance(token, int) for token in ids):
                raise DataError(f"{file}: eos_token_id is {declared!r}, not a token id or a list of them")
            return tuple(ids)
    return ()


def export_hf(model: Transformer, path: Path, tokenizer_path: Path | None = None, eos_ids: Sequence[int] = ()) -> None:
    """Writes a folder that `transformers` loads.

    Raises ConfigError for a model with boundaries, which Llama does not have.
    """
    config = model.config
    if len(model.layouts) > 1 and config.boundary.kind != "none":
        raise ConfigError(
            f"{config.name} has {config.boundary.kind} boundaries, which transformers' Llama lacks; "
            "keep it in Orion's own layout"
        )
    params = {hf_name(name): param for name, param in model.named_parameters()}
    dtype = str(next(model.parameters()).dtype).removeprefix("torch.")
    documents: dict[str, Any] = {HF_CONFIG: config_to_hf(config, dtype, eos_ids)}
    if tokenizer_path is not None:
        documents["tokenizer_config.json"] = {"tokenizer_class": "PreTrainedTokenizerFast"}
    _write_folder(path, params, tokenizer_path, documents)


def untied(model: Transformer, num_stages: int = 1) -> Transformer:
    """A copy of a model without boundaries whose head is its own, cut into that many stages.

    A head that shares the embedding's values cannot be in another stage. Raises ConfigError for a model with
    boundaries.
    """
    if model.config.boundary.kind != "none":
        raise ConfigError(f"{model.config.name} has boundaries: only a plain Llama can be cut anew")
    copy = Transformer(model.config.with_fields(tie_embeddings=False), num_stages).to(next(model.parameters()).dtype)
    params = dict(model.named_parameters())
    params.setdefault("head.weight", params["embedding.weight"])
    with torch.no_grad():
        for name, param in copy.named_parameters():
            param.copy_(params[name])
    return copy


def _read_json(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise DataError(f"{file} cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise DataError(f"{file} is not JSON: {error}") from error
    if not isinstance(content, dict):
        raise DataError(f"{file} does not hold a JSON object")
    return content


def _write_folder(
    path: Path, params: Mapping[str, Tensor], tokenizer: Path | None, documents: Mapping[str, Mapping[str, Any]]
) -> None:
    """Tensors first, then the tokenizer, then the descriptions; each file appears whole."""
    path.mkdir(parents=True, exist_ok=True)
    partial = path / f"{TENSORS}.partial"
    save_file({name: param.detach().cpu().contiguous() for name, param in params.items()}, partial, {"format": "pt"})
    partial.replace(path / TENSORS)
    if tokenizer is not None and tokenizer.resolve() != (path / TOKENIZER).resolve():
        shutil.copyfile(tokenizer, path / TOKENIZER)
    for name, document in documents.items():
        partial = path / f"{name}.partial"
        partial.write_text(json.dumps(document, indent=2, allow_nan=False) + "\n", encoding="utf-8")
        partial.replace(path / name)


def _tensor_files(path: Path) -> dict[str, Path]:
    """The file that holds each tensor of a folder."""
    if not (path / TENSOR_INDEX).is_file():
        with _open_tensors(path / TENSORS) as tensors:
            return dict.fromkeys(tensors.keys(), path / TENSORS)
    index = _read_json(path / TENSOR_INDEX).get("weight_map")
    if not isinstance(index, dict) or not all(isinstance(file, str) for file in index.values()):
        raise DataError(f"{path / TENSOR_INDEX} has no weight_map of tensor names to files")
    outside = [file for file in index.values() if Path(file).name != file]
    if outside:
        raise DataError(f"{path / TENSOR_INDEX} names {outside[0]!r}, which is not a file of this folder")
    return {name: path / file for name, file in index.items()}


def _open_tensors(file: Path) -> Any:
    try:
        return safe_open(file, framework="pt")
    except (OSError, SafetensorError) as error:
        raise DataError(f"{file} cannot be read as safetensors: {error}") from error


@torch.no_grad()
def _fill(path: Path, params: Mapping[str, Tensor], ignored: set[str] | None = None) -> None:
    """Copies a folder's tensors into parameters by their stored names, one tensor in memory at a time."""
    files = _tensor_files(path)
    missing = sorted(params.keys() - files.keys())
    unknown = sorted(files.keys() - params.keys() - (ignored or set()))
    if missing or unknown:
        raise DataError(f"{path}: tensors missing: {missing[:3] or 'none'}; not of this model: {unknown[:3] or 'none'}")
    for file in sorted({files[name] for name in params}):
        with _open_tensors(file) as tensors:
            held = set(tensors.keys())
            for name in (name for name in params if files[name] == file):
                if name not in held:
                    raise DataError(f"{file} does not hold {name}, although the index says so")
                shape = tuple(tensors.get_slice(name).get_shape())
                if shape != tuple(params[name].shape):
                    raise DataError(f"{file}: {name} has shape {shape}, the model's is {tuple(params[name].shape)}")
                params[name].copy_(tensors.get_tensor(name))
