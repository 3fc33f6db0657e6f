"""Folders go out and come in with the same values, and damaged ones are refused with their reason."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from orion.common.errors import ConfigError, DataError
from orion.common.model.checkpoint import export_hf, load_checkpoint, load_hf_folder, save_checkpoint, untied
from orion.common.model.config import BoundaryKind, ModelConfig
from orion.common.model.generate import generate, load_any
from orion.common.model.params import flatten_params, init_params
from orion.common.model.splits import SplitRule
from orion.common.model.stage import Transformer

NANO = ModelConfig.preset("nano")
KINDS: tuple[BoundaryKind, ...] = ("anchored", "resbm", "linear", "iota", "subspace", "none")


def some_model(kind: BoundaryKind = "anchored", num_stages: int = 2, rule: SplitRule = "balanced") -> Transformer:
    model = Transformer(NANO.with_boundary(kind, ratio=8), num_stages, rule)
    init_params(model, seed=4)
    return model


def save(path: Path, model: Transformer, **options: Any) -> None:
    save_checkpoint(path, model.config, len(model.layouts), dict(model.named_parameters()), **options)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("num_stages", "rule"), [(1, "balanced"), (3, "balanced"), (3, "cost")])
def test_a_checkpoint_comes_back_as_it_was(
    tmp_path: Path, kind: BoundaryKind, num_stages: int, rule: SplitRule
) -> None:
    model = some_model(kind, num_stages, rule)
    save(tmp_path / "deep" / "folder", model, rule=rule, extra={"outer_step": 7}, eos_ids=[0])
    checkpoint = load_checkpoint(tmp_path / "deep" / "folder")
    assert checkpoint.model.config == model.config
    assert checkpoint.model.layouts == model.layouts
    assert torch.equal(flatten_params(checkpoint.model), flatten_params(model))
    assert checkpoint.extra == {"outer_step": 7}
    assert checkpoint.eos_ids == (0,)
    assert checkpoint.tokenizer is None
    ids = torch.arange(10)[None]
    assert torch.equal(checkpoint.model(ids), model(ids))


def test_a_folder_holds_only_documents_and_safetensors(tmp_path: Path) -> None:
    tokenizer = tmp_path / "words.json"
    tokenizer.write_text("{}", encoding="utf-8")
    save(tmp_path / "out", some_model(), tokenizer=tokenizer)
    assert {file.name for file in (tmp_path / "out").iterdir()} == {
        "orion_config.json",
        "model.safetensors",
        "tokenizer.json",
    }
    assert load_checkpoint(tmp_path / "out").tokenizer == tmp_path / "out" / "tokenizer.json"


def test_a_checkpoint_can_be_written_again_over_itself(tmp_path: Path) -> None:
    tokenizer = tmp_path / "tokenizer.json"
    tokenizer.write_text("{}", encoding="utf-8")
    save(tmp_path, some_model(), tokenizer=tokenizer)
    save(tmp_path, some_model(num_stages=3), tokenizer=tokenizer)
    assert len(load_checkpoint(tmp_path).model.layouts) == 3


def test_parameters_of_another_model_are_not_written(tmp_path: Path) -> None:
    params = dict(some_model(num_stages=3).named_parameters())
    with pytest.raises(ConfigError, match=r"boundaries\.1"):
        save_checkpoint(tmp_path, NANO, 2, params)
    assert not list(tmp_path.iterdir())


def test_both_layouts_open_through_one_door(tmp_path: Path) -> None:
    model = some_model("none", 1)
    save(tmp_path / "ours", model)
    export_hf(model, tmp_path / "theirs")
    texts = [generate(load_any(tmp_path / name).model, [1, 2], max_new_tokens=10) for name in ("ours", "theirs")]
    assert texts[0] == texts[1]
    with pytest.raises(DataError, match="holds no model"):
        load_any(tmp_path)


def test_a_model_with_boundaries_is_not_exported_as_llama(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="anchored boundaries"):
        export_hf(some_model(), tmp_path)
    assert not list(tmp_path.iterdir())


def test_untying_gives_the_head_its_own_copy() -> None:
    tied = Transformer(NANO.with_boundary("none").with_fields(tie_embeddings=True))
    init_params(tied, seed=0)
    cut = untied(tied, num_stages=2)
    ids = torch.arange(10)[None]
    torch.testing.assert_close(cut(ids), tied(ids))
    assert torch.equal(cut.get_parameter("head.weight"), tied.get_parameter("embedding.weight"))
    with pytest.raises(ConfigError, match="boundaries"):
        untied(some_model())


def edit_json(file: Path, **fields: Any) -> None:
    file.write_text(json.dumps({**json.loads(file.read_text(encoding="utf-8")), **fields}), encoding="utf-8")


def edit_tensors(folder: Path, **changed: torch.Tensor | None) -> None:
    tensors = {**load_file(folder / "model.safetensors"), **changed}
    save_file({name: tensor for name, tensor in tensors.items() if tensor is not None}, folder / "model.safetensors")


@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        ({"norm.weight": None}, r"missing: \['norm.weight'\]"),
        ({"surplus": torch.zeros(1)}, r"not of this model: \['surplus'\]"),
        ({"norm.weight": torch.zeros(3)}, r"norm.weight has shape \(3,\)"),
    ],
)
def test_tensors_that_do_not_fit_are_refused(tmp_path: Path, changed: dict[str, Any], reason: str) -> None:
    save(tmp_path, some_model())
    edit_tensors(tmp_path, **changed)
    with pytest.raises(DataError, match=reason):
        load_checkpoint(tmp_path)


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"version": 2}, "version"),
        ({"format": "other"}, "format"),
        ({"num_stages": 0}, "num_stages"),
        ({"surprise": 1}, "surprise"),
        ({"model": {"name": "x"}}, "vocab_size"),
    ],
)
def test_descriptions_that_do_not_fit_are_refused(tmp_path: Path, fields: dict[str, Any], reason: str) -> None:
    save(tmp_path, some_model())
    edit_json(tmp_path / "orion_config.json", **fields)
    with pytest.raises(DataError, match=reason):
        load_checkpoint(tmp_path)


@pytest.mark.parametrize("content", [b"", b"\x80\x04pickle", b"\xff" * 64])
def test_files_that_are_not_safetensors_are_refused(tmp_path: Path, content: bytes) -> None:
    save(tmp_path, some_model())
    (tmp_path / "model.safetensors").write_bytes(content)
    with pytest.raises(DataError, match="safetensors"):
        load_checkpoint(tmp_path)


@pytest.mark.parametrize("content", ["", "[]", "{", "null"])
def test_descriptions_that_are_not_objects_are_refused(tmp_path: Path, content: str) -> None:
    save(tmp_path, some_model())
    (tmp_path / "orion_config.json").write_text(content, encoding="utf-8")
    with pytest.raises(DataError, match=r"orion_config\.json"):
        load_checkpoint(tmp_path)


def test_missing_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"orion_config\.json cannot be read"):
        load_checkpoint(tmp_path)
    with pytest.raises(DataError, match=r"config\.json cannot be read"):
        load_hf_folder(tmp_path)
    save(tmp_path, some_model())
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(DataError, match=r"model\.safetensors"):
        load_checkpoint(tmp_path)


@pytest.mark.parametrize(
    ("index", "reason"),
    [
        ({"weight_map": {"norm.weight": "../norm.safetensors"}}, "not a file of this folder"),
        ({"weight_map": {"norm.weight": "/etc/passwd"}}, "not a file of this folder"),
        ({"weight_map": {"norm.weight": 3}}, "weight_map"),
        ({}, "weight_map"),
    ],
)
def test_an_index_cannot_point_outside_its_folder(tmp_path: Path, index: dict[str, Any], reason: str) -> None:
    save(tmp_path, some_model())
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
    with pytest.raises(DataError, match=reason):
        load_checkpoint(tmp_path)


def test_an_index_that_lies_about_a_file_is_refused(tmp_path: Path) -> None:
    model = some_model()
    save(tmp_path, model)
    save_file({"other": torch.zeros(1)}, tmp_path / "other.safetensors")
    names = dict.fromkeys((name for name, _ in model.named_parameters()), "model.safetensors")
    index = {"weight_map": {**names, "norm.weight": "other.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
    with pytest.raises(DataError, match=r"other\.safetensors does not hold norm\.weight"):
        load_checkpoint(tmp_path)


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"model_type": "mistral"}, "model_type"),
        ({"attention_bias": True}, "attention_bias"),
        ({"mlp_bias": True}, "mlp_bias"),
        ({"hidden_act": "gelu"}, "hidden_act"),
        ({"rope_parameters": {"rope_type": "yarn", "factor": 2.0}}, "yarn"),
        ({"rope_parameters": {"rope_type": "llama3", "factor": 2.0}}, "low_freq_factor"),
        ({"num_attention_heads": 3}, "num_kv_heads"),
        ({"vocab_size": "many"}, "vocab_size"),
    ],
)
def test_a_llama_we_cannot_compute_is_refused(tmp_path: Path, fields: dict[str, Any], reason: str) -> None:
    export_hf(some_model("none", 1), tmp_path)
    edit_json(tmp_path / "config.json", **fields)
    with pytest.raises(DataError, match=reason):
        load_hf_folder(tmp_path)


def test_older_hugging_face_descriptions_are_understood(tmp_path: Path) -> None:
    export_hf(some_model("none", 1), tmp_path)
    scaling = {
        "rope_type": "llama3",
        "factor": 4.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 32,
    }
    older = json.loads((tmp_path / "config.json").read_text(encoding="utf-8"))
    del older["rope_parameters"], older["head_dim"], older["hidden_act"]
    older.update(rope_theta=10_000.0, rope_scaling=scaling, eos_token_id=3)
    (tmp_path / "config.json").write_text(json.dumps(older), encoding="utf-8")
    config, _ = load_hf_folder(tmp_path)
    assert config.rope_theta == 10_000.0
    assert config.rope_scaling is not None
    assert config.rope_scaling.original_context_length == 32
    assert load_any(tmp_path).eos_ids == (3,)
    edit_json(tmp_path / "config.json", eos_token_id="end")
    with pytest.raises(DataError, match="eos_token_id"):
        load_any(tmp_path)
