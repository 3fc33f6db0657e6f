"""Plain training of the same model on the same tokens in one process: what a swarm is compared with."""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from orion.common.clock import Clock
from orion.common.config import RunSpec
from orion.common.model.params import init_params, matrix_params, project_params
from orion.common.model.stage import Transformer, token_loss
from orion.common.train.data import TokenDataset
from orion.common.train.inner import build_inner_optimizer, clip_in_place
from orion.common.train.schedule import learning_rate_factor


@dataclass(frozen=True, slots=True)
class SingleProcessResult:
    """What plain training reached."""

    model: Transformer
    tokens: int
    seconds: float

    @property
    def tokens_per_s(self) -> float:
        return self.tokens / self.seconds


def untrained_model(spec: RunSpec) -> Transformer:
    """The model at the start of the run, boundaries included."""
    model = Transformer(spec.model, spec.num_stages, spec.split)
    init_params(model, spec.seed)
    return model


def train_single_process(
    spec: RunSpec, dataset: TokenDataset, *, microbatches_per_step: int, num_steps: int, clock: Clock, threads: int
) -> SingleProcessResult:
    """As many optimizer steps as each miner took inner steps, each over all replicas' microbatches together.

    Data ids 0, 1, 2 … as the swarm leased them. Same model with its boundaries, same optimizer and learning rates,
    no outer optimizer. Uses `threads` threads and gives the former number back.
    """
    model = untrained_model(spec)
    params = dict(model.named_parameters())
    optimizer = build_inner_optimizer(
        {name: param.data for name, param in params.items()}, matrix_params(model), spec.inner
    )
    threads_before = torch.get_num_threads()
    torch.set_num_threads(threads)
    started_s = clock.monotonic_s()
    try:
        for step in range(num_steps):
            first_id = step * microbatches_per_step
            batch = [dataset.microbatch(spec.seed, first_id + offset) for offset in range(microbatches_per_step)]
            gradients = _mean_gradients(model, [torch.from_numpy(ids_BU) for ids_BU in batch])
            norm = clip_in_place(list(gradients.values()), spec.inner.clip_norm)
            assert norm.is_finite, f"the gradient of step {step} is not finite"
            optimizer.step(gradients, learning_rate_factor(spec.inner.schedule, step))
            project_params(model)
        seconds = clock.monotonic_s() - started_s
    finally:
        torch.set_num_threads(threads_before)
    return SingleProcessResult(model, num_steps * microbatches_per_step * spec.tokens_per_microbatch, seconds)


def _mean_gradients(model: Transformer, batch: list[Tensor]) -> dict[str, Tensor]:
    model.zero_grad(set_to_none=True)
    for ids_BU in batch:
        loss = token_loss(model(ids_BU[:, :-1]), ids_BU[:, 1:]) / len(batch)
        torch.autograd.backward(loss)
    return {
        name: torch.zeros_like(param) if param.grad is None else param.grad for name, param in model.named_parameters()
    }


@torch.no_grad()
def mean_loss(model: Transformer, microbatches: Iterable[Tensor]) -> float:
    """Loss per token in nats over microbatches ids [B, T+1]. Raises ValueError when there are none."""
    total, count = 0.0, 0
    for ids_BU in microbatches:
        total += float(token_loss(model(ids_BU[:, :-1]), ids_BU[:, 1:]))
        count += 1
    if count == 0:
        raise ValueError("no held-out text: data.heldout_fraction is too small for one microbatch")
    return total / count
