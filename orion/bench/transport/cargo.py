"""What is carried: activations of the public 100B run, with keys and descriptions, the same in both processes.

Owns the run, the two miners' identities and the tensors; sends nothing.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from orion.common.config import RunSpec
from orion.common.ids import DataId, Direction, Hotkey, MicrobatchId
from orion.common.protocol.codec import Body, activation_spec, body_size
from orion.common.protocol.messages import Transfer
from orion.common.protocol.signing import Keypair, hotkey_of, keypair_from_uri

STAGE_INDEX = 1
"""The receiver's stage; the sender runs the one before."""
NUM_ACTIVATIONS = 8
"""Different ones that are sent in turn: together they do not fit into a core's own cache, as in a real miner."""
DEADLINE_S = 3600.0

SENDER_URI, RECEIVER_URI = "//orion/bench/sender", "//orion/bench/receiver"


def run_spec() -> RunSpec:
    """A run with the boundary of the public 100B run: 10 × 800 tokens, 144 values each, and the token ids."""
    return RunSpec.parse(
        {
            "run_id": "transport",
            "seed": 1,
            "model": {"preset": "100b"},
            "data": {
                "source": "python-docs",
                "tokenizer": "bpe:512",
                "sequence_length": 800,
                "sequences_per_microbatch": 10,
            },
            "num_stages": 16,
            "replicas": 1,
            "outer_steps": 1,
            "inner_steps": 1,
            "microbatches_per_step": 1,
            "num_partitions": 1,
            "wire_dtype": "bfloat16",
            "time_limits": {"train_s": DEADLINE_S, "microbatch_s": DEADLINE_S},
        },
        "orion bench transport",
    )


def sender_key() -> Keypair:
    return keypair_from_uri(SENDER_URI)


def receiver_key() -> Keypair:
    return keypair_from_uri(RECEIVER_URI)


@dataclass(frozen=True, slots=True, eq=False)
class Cargo:
    """Tensors to send, and how they are described."""

    spec: RunSpec
    sender: Hotkey
    receiver: Hotkey
    activations: Sequence[dict[str, Tensor]]
    size_bytes: int

    def transfer(self, number: int, body: Body, now_s: float) -> Transfer:
        """Describes a body; every number is another microbatch."""
        return Transfer(
            direction=Direction.ACTIVATION,
            microbatch_id=MicrobatchId(number),
            data_id=DataId(number),
            outer_step=0,
            to_stage=STAGE_INDEX,
            path=(self.sender,),
            deadline_s=now_s + DEADLINE_S,
            digest=body.digest,
            size_bytes=body.size_bytes,
        )


def make_cargo(seed: int) -> Cargo:
    """Activations as a stage puts them out: finite, in host memory, of the wire's type."""
    spec = run_spec()
    generator = torch.Generator().manual_seed(seed)
    expected = activation_spec(spec, STAGE_INDEX)
    activations = [
        {
            "z": torch.randn(expected["z"].shape, generator=generator).to(expected["z"].dtype),
            "ids": torch.randint(0, 512, expected["ids"].shape, generator=generator).to(expected["ids"].dtype),
        }
        for _ in range(NUM_ACTIVATIONS)
    ]
    return Cargo(spec, hotkey_of(sender_key()), hotkey_of(receiver_key()), activations, body_size(expected))
