"""The model that a run has trained, put together from its stages' newest anchors, and what it can do."""

from dataclasses import dataclass
from pathlib import Path

import torch

from orion.cli.single_process import mean_loss, untrained_model
from orion.common.config import RunSpec
from orion.common.ids import Hotkey
from orion.common.model.checkpoint import TOKENIZER, save_checkpoint
from orion.common.model.generate import generate
from orion.common.model.params import load_flat_params
from orion.common.model.stage import Stage, Transformer
from orion.common.net.anchor_loader import AnchorLoader
from orion.common.net.object_client import ObjectClient
from orion.common.net.orchestrator_client import OrchestratorClient
from orion.common.net.rpc import RpcClient
from orion.common.protocol.messages import CheckpointRef
from orion.common.protocol.signing import Keypair
from orion.common.train.data import TokenDataset

HELDOUT_MICROBATCHES_MAX = 40
SAMPLE_TOKENS = 60
SAMPLE_PROMPT = "In the beginning"
SAMPLE_TEMPERATURE = 0.7


async def fetch_merged_model(spec: RunSpec, keypair: Keypair, base_url: str, orchestrator: Hotkey) -> Transformer:
    """The model at the newest checkpoint of every stage. Raises RefusedError and TransportError."""
    async with RpcClient(keypair, spec.digest) as rpc:
        client = OrchestratorClient(rpc, base_url, orchestrator)
        status = await client.status(rpc.http, base_url)
        loader = AnchorLoader(client, ObjectClient(client), spec)
        model = untrained_model(spec)
        params = dict(model.named_parameters())
        for stage_state in status.stages:
            checkpoint: CheckpointRef | None = stage_state.checkpoint
            outer_step = 0 if checkpoint is None else checkpoint.outer_step
            state = await loader.load(stage_state.stage_index, outer_step, checkpoint)
            stage = Stage(spec.model, spec.layouts[stage_state.stage_index])
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
