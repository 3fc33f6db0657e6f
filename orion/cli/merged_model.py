"""The model that a run has trained, put together from its stages' newest anchors, and what it can do."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from orion.cli.single_process import mean_loss, untrained_model
from orion.common.config import RunSpec
from orion.common.errors import DataError
from orion.common.ids import Hotkey
from orion.common.model.checkpoint import TOKENIZER, save_checkpoint
from orion.common.model.generate import generate
from orion.common.model.params import load_flat_params
from orion.common.model.stage import Stage, Transformer
from orion.common.net.anchor_loader import AnchorLoader
from orion.common.net.checkpoint_folder import CheckpointFiles, check_file
from orion.common.net.object_client import ObjectClient
from orion.common.net.orchestrator_client import OrchestratorClient
from orion.common.net.rpc import RpcClient
from orion.common.protocol.codec import checkpoint_spec, decode, encode
from orion.common.protocol.messages import RunCheckpoint
from orion.common.protocol.refusals import RefusedError
from orion.common.protocol.signing import Keypair
from orion.common.train.anchor import checkpoint_tensors, state_from_checkpoint
from orion.common.train.data import TokenDataset
from orion.common.train.outer import OuterState

HELDOUT_MICROBATCHES_MAX = 40
SAMPLE_TOKENS = 60
SAMPLE_PROMPT = "In the beginning"
SAMPLE_TEMPERATURE = 0.7


@dataclass(frozen=True, slots=True)
class Trained:
    """What a run has come to: the outer state of every stage."""

    states: tuple[OuterState, ...]
    checkpoint: RunCheckpoint | None
    """All of them at one outer step, with which a run can go on; None while there has been no such checkpoint."""

    def bodies(self) -> list[bytes]:
        """The stages' objects."""
        return [encode(checkpoint_tensors(state)).tobytes() for state in self.states]


async def fetch_trained(spec: RunSpec, keypair: Keypair, base_url: str, orchestrator: Hotkey) -> Trained:
    """The newest checkpoint of the whole model; before the first one, every stage's newest. Raises RefusedError and
    TransportError."""
    async with RpcClient(keypair, spec.digest) as rpc:
        client = OrchestratorClient(rpc, base_url, orchestrator)
        status = await client.status(rpc.http, base_url)
        loader = AnchorLoader(client, ObjectClient(client), spec)
        whole = status.checkpoint
        newest = [stage.checkpoint for stage in status.stages] if whole is None else list(whole.stages)
        states = [
            await loader.load(index, spec.first_outer_step if ref is None else ref.outer_step, ref)
            for index, ref in enumerate(newest)
        ]
    return Trained(tuple(states), whole)


def stored_states(found: CheckpointFiles) -> tuple[OuterState, ...]:
    """The outer states in a checkpoint's files. Raises DataError when they are damaged."""
    states = []
    for path, ref in zip(found.paths, found.checkpoint.stages, strict=True):
        check_file(path, ref)
        body = bytearray(path.read_bytes())
        try:
            tensors = decode(body, checkpoint_spec(found.spec.stage_sizes[ref.stage_index]), len(body))
        except RefusedError as error:
            raise DataError(f"{path} is not a stage of {found.spec.model.name}: {error}") from error
        states.append(state_from_checkpoint(tensors, ref.outer_step))
    return tuple(states)


def merged_model(spec: RunSpec, states: Sequence[OuterState]) -> Transformer:
    """The whole model at these anchors."""
    model = untrained_model(spec)
    params = dict(model.named_parameters())
    for layout, state in zip(spec.layouts, states, strict=True):
        stage = Stage(spec.model, layout)
        load_flat_params(stage, state.anchor_N)
        with torch.no_grad():
            for name, value in stage.named_parameters():
                params[name].copy_(value)
    return model


@dataclass(frozen=True, slots=True)
class Evaluation:
    """What the merged model can do."""

    heldout_loss: float
    heldout_loss_untrained: float
    sample: str


def evaluate(spec: RunSpec, model: Transformer, dataset: TokenDataset) -> Evaluation:
    """Held-out losses and a sample; some seconds."""
    tokenizer = dataset.tokenizer()
    prompt = tokenizer.encode(SAMPLE_PROMPT)
    num_tokens = min(SAMPLE_TOKENS, spec.model.context_length - len(prompt))
    ids = generate(model, prompt, num_tokens, SAMPLE_TEMPERATURE, spec.seed)
    return Evaluation(
        heldout_loss=heldout_loss(model, dataset),
        heldout_loss_untrained=heldout_loss(untrained_model(spec), dataset),
        sample=tokenizer.decode([*prompt, *ids]),
    )


def heldout_loss(model: Transformer, dataset: TokenDataset) -> float:
    """Mean loss on text that no microbatch of a run contains."""
    return mean_loss(model, (torch.from_numpy(ids_BU) for ids_BU in dataset.heldout(HELDOUT_MICROBATCHES_MAX)))


def save_merged_model(path: Path, spec: RunSpec, model: Transformer, dataset: TokenDataset) -> None:
    """Writes a checkpoint that `orion generate` and `orion export` open."""
    save_checkpoint(
        path,
        spec.model,
        spec.num_stages,
        dict(model.named_parameters()),
        dataset.folder / TOKENIZER,
        extra={"run_id": spec.run_id, "run_digest": spec.digest},
        rule=spec.split,
        eos_ids=(dataset.tokenizer().eos_id,),
    )
