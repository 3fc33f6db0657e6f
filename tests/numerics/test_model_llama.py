"""The model is Llama: the same logits and the same greedy tokens as `transformers`, both ways, whole and in stages."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from orion.common.model.checkpoint import export_hf, load_hf_folder, untied
from orion.common.model.config import ModelConfig, RopeScaling
from orion.common.model.generate import generate, load_any
from orion.common.model.layers import rotary_frequencies
from orion.common.model.params import init_params
from orion.common.model.splits import stage_layouts
from orion.common.model.stage import Stage, Transformer

LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
SHAPES: dict[str, dict[str, Any]] = {
    "grouped": {"num_key_value_heads": 2},
    "every head its own keys": {"num_key_value_heads": 4},
    "one key head": {"num_key_value_heads": 1, "head_dim": 32},
    "scaled rotary": {
        "num_key_value_heads": 2,
        "rope_parameters": {**LLAMA3, "rope_theta": 500_000.0, "original_max_position_embeddings": 16},
    },
    "tied": {"num_key_value_heads": 2, "tie_word_embeddings": True},
}


def llama(seed: int = 0, **fields: Any) -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=300,
        hidden_size=64,
        num_hidden_layers=5,
        num_attention_heads=4,
        intermediate_size=160,
        max_position_embeddings=96,
        rms_norm_eps=1e-5,
        eos_token_id=None,
        bos_token_id=None,
        **fields,
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = LlamaForCausalLM(config)
        for param in model.parameters():
            # transformers starts norms at one and matrices small, where many mistakes would not show.
            param.data.add_(0.1 * torch.randn_like(param))
    return model.eval()


def some_ids() -> Tensor:
    return torch.randint(300, (2, 80), generator=torch.Generator().manual_seed(5))


@pytest.mark.parametrize("fields", SHAPES.values(), ids=SHAPES.keys())
@torch.no_grad()
def test_logits_equal_those_of_transformers(fields: dict[str, Any], tmp_path: Path) -> None:
    reference = llama(**fields)
    reference.save_pretrained(tmp_path)
    config, model = load_hf_folder(tmp_path)
    expected = reference(some_ids()).logits
    torch.testing.assert_close(model(some_ids()), expected, atol=1e-4, rtol=1e-4)

    whole = untied(model, num_stages=3)
    params = dict(whole.named_parameters())
    x: Tensor | None = None
    for layout in stage_layouts(config, 3):
        stage = Stage(whole.config, layout)
        for name, param in stage.named_parameters():
            param.copy_(params[name])
        x = stage(x, some_ids())
    torch.testing.assert_close(x, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("fields", SHAPES.values(), ids=SHAPES.keys())
def test_greedy_tokens_equal_those_of_transformers(fields: dict[str, Any], tmp_path: Path) -> None:
    reference = llama(**fields)
    reference.save_pretrained(tmp_path)
    prompt = some_ids()[0, :7]
    expected = reference.generate(prompt[None], max_new_tokens=40, do_sample=False, pad_token_id=0)[0, 7:]
    assert generate(load_any(tmp_path).model, prompt.tolist(), max_new_tokens=40) == expected.tolist()


@pytest.mark.parametrize("num_stages", [1, 3])
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("scaled", [False, True])
@torch.no_grad()
def test_transformers_reads_what_we_export(num_stages: int, tied: bool, scaled: bool, tmp_path: Path) -> None:
    scaling = RopeScaling(factor=4.0, low_freq_factor=1.0, high_freq_factor=4.0, original_context_length=16)
    config = (
        ModelConfig.preset("nano")
        .with_boundary("none")
        .with_fields(tie_embeddings=tied and num_stages == 1, rope_scaling=scaling if scaled else None)
    )
    model = Transformer(config, num_stages)
    init_params(model, seed=1)
    export_hf(model, tmp_path)
    reference = LlamaForCausalLM.from_pretrained(tmp_path)
    ids = some_ids()[:, :60]
    torch.testing.assert_close(reference(ids).logits, model(ids), atol=1e-4, rtol=1e-4)
    prompt = ids[:1, :5]
    tokens = reference.generate(prompt, max_new_tokens=20, do_sample=False, pad_token_id=0)[0, 5:]
    assert tokens.tolist() == generate(model, prompt[0].tolist(), max_new_tokens=20)

    config_again, model_again = load_hf_folder(tmp_path)
    assert config_again == config.with_fields(name=tmp_path.name, boundary={"kind": "none"})
    assert torch.equal(model_again(ids), model(ids))


def test_an_exported_folder_stops_where_we_say_and_brings_its_tokenizer(tmp_path: Path, tokenizer_file: Path) -> None:
    model = Transformer(ModelConfig.preset("nano").with_boundary("none"))
    init_params(model, seed=1)
    free = generate(model, [1, 2, 3], max_new_tokens=12)
    end = free[5]
    export_hf(model, tmp_path, tokenizer_file, eos_ids=[end])
    tokens = LlamaForCausalLM.from_pretrained(tmp_path).generate(
        torch.tensor([[1, 2, 3]]), max_new_tokens=12, do_sample=False, pad_token_id=0
    )
    loaded = load_any(tmp_path)
    assert loaded.eos_ids == (end,)
    ours = generate(loaded.model, [1, 2, 3], max_new_tokens=12, eos_ids=loaded.eos_ids)
    assert ours == tokens[0, 3:].tolist() == free[: free.index(end) + 1]
    assert AutoTokenizer.from_pretrained(tmp_path).decode([1]) != ""


@torch.no_grad()
def test_a_folder_in_several_files_loads(tmp_path: Path) -> None:
    reference = llama(num_key_value_heads=2)
    reference.save_pretrained(tmp_path, max_shard_size="200KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 2
    _, model = load_hf_folder(tmp_path)
    torch.testing.assert_close(model(some_ids()), reference(some_ids()).logits, atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_a_bfloat16_folder_keeps_its_values(tmp_path: Path) -> None:
    llama(num_key_value_heads=2).to(torch.bfloat16).save_pretrained(tmp_path)
    reference = LlamaForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    _, model = load_hf_folder(tmp_path)
    torch.testing.assert_close(model(some_ids()), reference(some_ids()).logits, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("factor", "original", "theta", "head_dim"), [(8.0, 8192, 500_000.0, 128), (32.0, 8192, 500_000.0, 64)]
)
def test_scaled_rotary_frequencies_are_llama_3s(factor: float, original: int, theta: float, head_dim: int) -> None:
    config = LlamaConfig(
        hidden_size=head_dim * 4,
        num_attention_heads=4,
        max_position_embeddings=131_072,
        rope_parameters={
            **LLAMA3,
            "factor": factor,
            "rope_theta": theta,
            "original_max_position_embeddings": original,
        },
        num_hidden_layers=1,
        vocab_size=8,
        intermediate_size=8,
    )
    expected = LlamaForCausalLM(config).model.rotary_emb.inv_freq
    scaling = RopeScaling(factor=factor, low_freq_factor=1.0, high_freq_factor=4.0, original_context_length=original)
    torch.testing.assert_close(rotary_frequencies(head_dim, theta, scaling), expected, rtol=1e-6, atol=0)
