"""Miners with real engines, in memory: what they compute, log and answer, honest or not."""

from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from blake3 import blake3
from torch import Tensor

from orion.common.config import RunSpec
from orion.common.ids import DataId, Digest, Hotkey, MicrobatchId, Operation
from orion.common.model.params import num_params
from orion.common.model.stage import Stage
from orion.common.protocol.codec import encode
from orion.common.protocol.keys import pseudo_gradient_key
from orion.common.protocol.log import entry_bytes, log_root
from orion.common.protocol.merkle import MerkleTree
from orion.common.protocol.messages import (
    Commitment,
    Contribution,
    ObjectRef,
)
from orion.common.protocol.records import (
    CommitmentRecord,
    CommittedLog,
    LogEntry,
    LogRequest,
)
from orion.common.protocol.reduction import encode_slice
from orion.common.train.anchor import initial_anchor
from orion.common.train.engine import StageEngine
from orion.common.train.partition import partition_bounds
from orion.validator.replay import TokenSource

CPU = torch.device("cpu")


def hotkey(stage_index: int, replica: int = 0) -> Hotkey:
    """A well-formed name for a miner."""
    return Hotkey("5" + f"M{stage_index + 1}R{replica + 1}".ljust(47, "x"))


def make_spec(validation: Mapping[str, object] | None = None, **changes: object) -> RunSpec:
    """A run of three nano stages, with steps large enough to show whether they were taken; merges are not looked at
    where a test does not ask for it."""
    tree: dict[str, object] = {
        "run_id": "test",
        "seed": 3,
        "model": {"preset": "nano"},
        "data": {"sequence_length": 16, "sequences_per_microbatch": 2},
        "num_stages": 3,
        "replicas": 1,
        "outer_steps": 4,
        "inner_steps": 4,
        "microbatches_per_step": 2,
        "inner": {"lr_matrix": 0.05, "lr_other": 0.05, "schedule": {"num_warmup_steps": 0}},
        "time_limits": {"transfer_grace_s": 10.0},
        "validation": {"reductions_per_outer_step": 0, "whole_share": 0.0, **(validation or {})},
    }
    return RunSpec.parse({**tree, **changes}, "test")


class Tokens:
    """Made-up data."""

    def microbatch(self, run_seed: int, data_id: int) -> npt.NDArray[np.int64]:
        rng = np.random.default_rng([run_seed, data_id])
        return rng.integers(0, 512, size=(2, 17), dtype=np.int64)


Body = Mapping[str, Tensor]
Alter = Callable[[Tensor], Tensor]


@dataclass
class Cheat:
    """What a miner does otherwise than it says. The defaults are honest."""

    output: Alter = lambda tensor: tensor
    gradient: Alter = lambda tensor: tensor
    skips_backward: bool = False
    skips_steps: bool = False
    ids: Alter = lambda tensor: tensor
    pseudo_gradient: Alter = lambda tensor: tensor


def digest(body: Body | None) -> Digest | None:
    return None if body is None else encode(body).digest


class WorkingMiner:
    """Runs a real engine and keeps the log and bodies that the protocol asks for."""

    def __init__(
        self, spec: RunSpec, stage_index: int, cheat: Cheat | None = None, tokens: TokenSource | None = None
    ) -> None:
        self.tokens = tokens if tokens is not None else Tokens()
        self.spec, self.stage_index, self.cheat = spec, stage_index, cheat if cheat is not None else Cheat()
        layout = spec.layouts[stage_index]
        self.engine = StageEngine(
            Stage(spec.model, layout),
            inner=spec.inner,
            outer=spec.outer,
            total_params=num_params(spec.model, spec.num_stages, rule=spec.split),
            device=CPU,
            compute_dtype=torch.float32,
            wire_dtype=torch.float32,
            graphs_max=2,
        )
        self.engine.load(initial_anchor(spec, stage_index))
        self.engine.begin_outer_step()
        self.entries: list[LogEntry] = []
        self.bodies: dict[tuple[MicrobatchId, Operation, str], Body] = {}
        self.num_applied = 0
        self._waiting = 0
        self._steps = 0
        self._data_ids: dict[MicrobatchId, DataId] = {}

    def forward(self, microbatch_id: MicrobatchId, data_id: DataId, body: Body | None) -> Body:
        """The activation for the next stage, or the last one's gradient."""
        is_last = self.stage_index == self.spec.num_stages - 1
        ids_BU = (
            torch.from_numpy(self.tokens.microbatch(self.spec.seed, data_id)) if body is None else body["ids"].long()
        )
        result = self.engine.forward(microbatch_id, None if body is None else body["z"], ids_BU)
        self._data_ids[microbatch_id] = data_id
        output: Body
        if is_last:
            assert result.input_grad_BTC is not None
            output = {"g": self.cheat.gradient(result.input_grad_BTC)}
            self._applied()
        else:
            assert result.output_BTC is not None
            output = {"z": self.cheat.output(result.output_BTC), "ids": self.cheat.ids(ids_BU.int())}
        self._log(Operation.FORWARD, microbatch_id, body, output)
        if is_last:
            self.step_when_full()
        return output

    def backward(self, microbatch_id: MicrobatchId, body: Body) -> Body | None:
        """The gradient for the stage before."""
        output: Body | None
        if self.cheat.skips_backward:
            self.engine.drop(microbatch_id)
            output = {"g": body["g"].clone()} if self.stage_index > 0 else None
        else:
            gradient = self.engine.backward(microbatch_id, body["g"]).input_grad_BTC
            output = None if gradient is None else {"g": self.cheat.gradient(gradient)}
        self._applied()
        self._log(Operation.BACKWARD, microbatch_id, body, output)
        self.step_when_full()
        return output

    def step_when_full(self, last: bool = False) -> None:
        """The inner step, once enough has accumulated."""
        if self._waiting < self.spec.microbatches_per_step and not (last and self._waiting):
            return
        if not self.cheat.skips_steps and self.engine.num_accumulated:
            share = self._waiting / self.spec.microbatches_per_step
            self.engine.inner_step(self._steps, share)
        self.entries.append(
            LogEntry(
                operation=Operation.INNER_STEP,
                microbatch_id=None,
                data_id=None,
                inner_step=self._steps,
                input_digest=None,
                output_digest=None,
                num_microbatches=self._waiting,
            )
        )
        self._steps += 1
        self._waiting = 0

    def commitment(self, num_entries: int | None = None, *, is_final: bool = True) -> Commitment:
        """Over the log, or its first entries."""
        entries = self.entries[:num_entries]
        applying = Operation.FORWARD if self.stage_index == self.spec.num_stages - 1 else Operation.BACKWARD
        num_applied = sum(entry.operation is applying for entry in entries)
        return Commitment(
            outer_step=0,
            num_entries=len(entries),
            num_applied=num_applied,
            num_contributed=sum(entry.num_microbatches for entry in entries),
            num_kept=len(entries),
            root=log_root(entries),
            is_final=is_final,
        )

    def commitments(self) -> tuple[Commitment, ...]:
        """Two on the way, and the final one."""
        sizes = (len(self.entries) // 3, 2 * len(self.entries) // 3)
        return (*(self.commitment(size, is_final=False) for size in sizes), self.commitment())

    def pseudo_gradient_bodies(self) -> list[bytearray]:
        """The encoded slices that it uploads."""
        values_N = self.cheat.pseudo_gradient(self.engine.pseudo_gradient_N())
        return [
            bytearray(encode_slice(self.spec.codec, values_N[partition.start : partition.end]).tobytes())
            for partition in partition_bounds(values_N.numel(), self.spec.num_partitions)
        ]

    def contribution(self) -> Contribution:
        """What it says it has uploaded."""
        return Contribution(
            hotkey=hotkey(self.stage_index),
            num_microbatches=self.num_applied,
            objects=tuple(
                ObjectRef(
                    key=pseudo_gradient_key(0, self.stage_index, hotkey(self.stage_index), index),
                    digest=Digest(blake3(body).hexdigest()),
                    size_bytes=len(body),
                )
                for index, body in enumerate(self.pseudo_gradient_bodies())
            ),
        )

    def _applied(self) -> None:
        self._waiting += 1
        self.num_applied += 1

    def _log(self, operation: Operation, microbatch_id: MicrobatchId, received: Body | None, sent: Body | None) -> None:
        self.entries.append(
            LogEntry(
                operation=operation,
                microbatch_id=microbatch_id,
                data_id=self._data_ids[microbatch_id],
                inner_step=self._steps,
                input_digest=digest(received),
                output_digest=digest(sent),
            )
        )
        for side, body in (("input", received), ("output", sent)):
            if body is not None:
                self.bodies[microbatch_id, operation, side] = body


def train(miners: list[WorkingMiner], num_microbatches: int = 7) -> None:
    """One outer step of a whole pipeline, two microbatches in flight, the last inner step a short one."""
    gradients: deque[tuple[MicrobatchId, Body]] = deque()

    def bring_back() -> None:
        microbatch_id, body = gradients.popleft()
        for miner in reversed(miners[:-1]):
            gradient = miner.backward(microbatch_id, body)
            if gradient is not None:
                body = gradient

    for number in range(num_microbatches):
        microbatch_id, data_id = MicrobatchId(number), DataId(100 + number)
        body: Body | None = None
        for miner in miners:
            body = miner.forward(microbatch_id, data_id, body)
        assert body is not None
        gradients.append((microbatch_id, body))
        if len(gradients) == 2:
            bring_back()
    while gradients:
        bring_back()
    for miner in miners:
        miner.step_when_full(last=True)


def trained(
    spec: RunSpec, cheats: Mapping[int, Cheat] | None = None, tokens: TokenSource | None = None
) -> list[WorkingMiner]:
    """A pipeline after one outer step, with cheats by stage."""
    miners = [WorkingMiner(spec, stage_index, (cheats or {}).get(stage_index), tokens) for stage_index in range(3)]
    train(miners)
    return miners


def record_of(name: Hotkey, miner: WorkingMiner) -> CommitmentRecord:
    """What an honest miner has committed to."""
    *earlier, newest = miner.commitments()
    return CommitmentRecord(hotkey=name, stage_index=miner.stage_index, commitment=newest, earlier=tuple(earlier))


def answer_to(request: LogRequest, entries: Sequence[LogEntry]) -> CommittedLog:
    """What a miner with that log answers."""
    tree = MerkleTree([entry_bytes(entry) for entry in entries])
    return CommittedLog(
        outer_step=request.outer_step,
        start=request.start,
        entries=tuple(entries[request.start : request.stop]),
        proof=tree.proof(request.sizes, request.start, request.stop),
    )
