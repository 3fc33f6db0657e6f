"""Sampling: what is drawn, when it stops, and the window of a text longer than the context."""

import math
from collections import Counter

import pytest
import torch

from orion.common.errors import ConfigError
from orion.common.model.config import BoundaryKind, ModelConfig
from orion.common.model.generate import generate
from orion.common.model.params import init_params
from orion.common.model.stage import Transformer

NANO = ModelConfig.preset("nano")
KINDS: tuple[BoundaryKind, ...] = ("anchored", "resbm", "linear", "iota", "subspace", "none")


def some_model(kind: BoundaryKind = "anchored", num_stages: int = 2, **fields: object) -> Transformer:
    model = Transformer(NANO.with_boundary(kind, ratio=8).with_fields(**fields), num_stages)
    init_params(model, seed=2)
    with torch.no_grad():
        model.get_parameter("head.weight").mul_(10)  # decided enough that rounding cannot change a choice
    return model


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_kept_keys_and_values_change_no_token(kind: BoundaryKind) -> None:
    model = some_model(kind, num_stages=3)
    text = [5, 6, 7]
    for _ in range(30):
        text.append(int(model(torch.tensor([text]))[0, -1].argmax()))
    assert generate(model, [5, 6, 7], max_new_tokens=30) == text[3:]


def test_greedy_ignores_the_seed_and_sampling_follows_it() -> None:
    model = some_model()
    assert generate(model, [1], 20, rng_seed=1) == generate(model, [1], 20, rng_seed=2)
    assert generate(model, [1], 20, 1.0, rng_seed=1) == generate(model, [1], 20, 1.0, rng_seed=1)
    assert generate(model, [1], 20, 1.0, rng_seed=1) != generate(model, [1], 20, 1.0, rng_seed=2)


def test_a_tiny_temperature_is_greedy() -> None:
    model = some_model()
    assert generate(model, [1], 20, temperature=1e-300, rng_seed=3) == generate(model, [1], 20)


@torch.no_grad()
def test_tokens_are_drawn_as_often_as_their_probability_says() -> None:
    model = some_model(vocab_size=4)
    expected = model(torch.tensor([[2]]))[0, -1].div(2.0).softmax(-1)
    num_draws = 400
    drawn = Counter(generate(model, [2], 1, temperature=2.0, rng_seed=seed)[0] for seed in range(num_draws))
    for token in range(4):
        probability = float(expected[token])
        deviation = math.sqrt(probability * (1 - probability) / num_draws)
        assert drawn[token] / num_draws == pytest.approx(probability, abs=5 * deviation)


def test_a_text_ends_with_the_first_end_token() -> None:
    model = some_model()
    free = generate(model, [1, 2], max_new_tokens=20)
    end = free[8]
    stopped = generate(model, [1, 2], max_new_tokens=20, eos_ids={end, 99_999})
    assert stopped == free[: free.index(end) + 1]


@torch.no_grad()
def test_a_full_context_goes_on_from_its_later_half() -> None:
    model = some_model(context_length=8)
    text = generate(model, [1, 2, 3], max_new_tokens=12)
    assert len(text) == 12
    whole = [1, 2, 3, *text]
    # Eight tokens are read, the ninth is drawn; it and the three before it open the next window.
    assert whole[9] == int(model(torch.tensor([whole[5:9]]))[0, -1].argmax())


@torch.no_grad()
def test_only_the_end_of_a_long_prompt_is_read() -> None:
    model = some_model(context_length=8)
    prompt = list(range(20))
    assert generate(model, prompt, 1) == [int(model(torch.tensor([prompt[-8:]]))[0, -1].argmax())]


def test_no_tokens_asked_for_none_given() -> None:
    assert generate(some_model(), [1], max_new_tokens=0) == []


@pytest.mark.parametrize("ids", [[], [-1], [NANO.vocab_size]])
def test_prompts_outside_the_vocabulary_are_refused(ids: list[int]) -> None:
    with pytest.raises(ConfigError, match="token"):
        generate(some_model(), ids, 1)


@pytest.mark.parametrize("temperature", [-0.1, math.nan, math.inf])
def test_impossible_temperatures_are_refused(temperature: float) -> None:
    with pytest.raises(ConfigError, match="temperature"):
        generate(some_model(), [1], 1, temperature)
