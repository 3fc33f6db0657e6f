"""`orion generate` and `orion export`, against transformers."""

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from orion.cli.main import app
from orion.common.model.checkpoint import save_checkpoint
from orion.common.model.config import ModelConfig
from orion.common.model.params import init_params
from orion.common.model.stage import Transformer
from orion.common.train.tokenizer import load_tokenizer, train_bpe

TEXT = "In the beginning God created the heaven and the earth. "
runner = CliRunner()


def write_checkpoint(folder: Path, num_stages: int, boundary: str) -> Path:
    """A random nano model with a tokenizer of its own vocabulary's size."""
    config = ModelConfig.preset("nano")
    config = config.with_fields(boundary=config.boundary.model_copy(update={"kind": boundary}))
    model = Transformer(config, num_stages)
    init_params(model, 7)
    tokenizer = folder / "trained.json"
    eos_id = train_bpe([TEXT * 20], config.vocab_size, tokenizer).eos_id
    checkpoint = folder / "checkpoint"
    save_checkpoint(checkpoint, config, num_stages, dict(model.named_parameters()), tokenizer, eos_ids=(eos_id,))
    return checkpoint


def generated(folder: Path, tokens: int = 12) -> dict[str, object]:
    arguments = [
        "generate",
        "--checkpoint",
        str(folder),
        "--prompt",
        "In the",
        "--max-new-tokens",
        str(tokens),
        "--json",
    ]
    result = runner.invoke(app, arguments)
    assert result.exit_code == 0, result.output
    answer: dict[str, object] = json.loads(result.stdout.splitlines()[-1])
    return answer


@pytest.mark.parametrize("num_stages", [1, 2])
def test_an_exported_folder_generates_the_same_in_transformers(tmp_path: Path, num_stages: int) -> None:
    checkpoint = write_checkpoint(tmp_path, num_stages, "none")
    out = tmp_path / "exported"
    result = runner.invoke(app, ["export", "--checkpoint", str(checkpoint), "--out", str(out), "--json"])
    assert json.loads(result.stdout) == {"folder": str(out), "layout": "huggingface"}
    model = AutoModelForCausalLM.from_pretrained(out)
    prompt = load_tokenizer(out / "tokenizer.json").encode_prompt("In the")
    with torch.no_grad():
        theirs = model.generate(torch.tensor([prompt]), max_new_tokens=12, do_sample=False)[0, len(prompt) :].tolist()
    for folder in (checkpoint, out):
        ours = generated(folder)
        assert ours["token_ids"] == theirs
        assert ours["prompt_token_ids"] == prompt


def test_a_model_with_boundaries_keeps_orions_layout(tmp_path: Path) -> None:
    checkpoint = write_checkpoint(tmp_path, 2, "anchored")
    out = tmp_path / "exported"
    result = runner.invoke(app, ["export", "--checkpoint", str(checkpoint), "--out", str(out)])
    assert "orion layout" in result.stdout
    assert generated(out) == generated(checkpoint)
