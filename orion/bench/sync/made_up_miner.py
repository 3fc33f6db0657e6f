"""A real miner whose device computes nothing: `python -m orion.bench.sync.made_up_miner TASK`.

Everything between two train phases is production's: commitments, encoding, uploads, reductions, the outer step. Its
pseudo-gradient is noise, made before training so that nobody waits for it. The liar alone has one function replaced.
"""

import asyncio
import signal
import sys
from functools import partial

import torch
from pydantic import BaseModel, ConfigDict
from torch import Tensor

from orion.bench.pipeline.orion_roles import log_json
from orion.bench.workers import stop_when_stdin_closes
from orion.common.ids import Digest, Operation
from orion.common.protocol.codec import Body, encode
from orion.common.protocol.keys import checkpoint_key
from orion.common.protocol.reduction import Reduction, reduce_partition
from orion.common.protocol.signing import keypair_from_uri
from orion.common.train.anchor import checkpoint_tensors
from orion.common.train.outer import OuterState, state_digest
from orion.miner import hands, service
from orion.miner.config import MinerConfig
from orion.miner.events import Forward, ForwardDone, InnerStep, InnerStepDone, Job, JobResult
from orion.miner.worker import DeviceWorker

_SCALE = 1e-4
"""Of the noise."""


class SyncMinerTask(BaseModel):
    """What a miner's process is told on its command line."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    config: MinerConfig
    key_uri: str
    lies: bool = False


class MadeUpWorker(DeviceWorker):
    """Answers at once, and keeps the anchor without a model around it."""

    _state: OuterState | None = None
    _noise: tuple[Tensor, Tensor] | None = None
    """For even outer steps, and its opposite for odd ones: both are there before anything is timed."""
    _num_waiting = 0

    @property
    def outer_state(self) -> OuterState | None:
        return self._state

    def load(self, stage_index: int, state: OuterState) -> Digest:
        self._stage_index = stage_index
        self._state = state
        self.outbox = {}
        self._is_fresh = True
        self._num_waiting = 0
        if self._noise is None:
            generator = torch.Generator().manual_seed(int.from_bytes(self._hotkey.encode()[-6:], "little"))
            noise_N = torch.randn(state.anchor_N.numel(), generator=generator).mul_(_SCALE)
            self._noise = (noise_N, noise_N.neg())
        return state_digest(state)

    def encode_checkpoint(self, stage_index: int, outer_step: int) -> tuple[str, Body] | None:
        state = self._state
        if state is None or (stage_index, outer_step) != (self._stage_index, state.outer_step):
            return None
        return checkpoint_key(outer_step, stage_index, self._hotkey), encode(checkpoint_tensors(state))

    def _do(self, job: Job) -> JobResult:
        match job:
            case Forward(microbatch_id):
                self._num_waiting += 1
                self._keep_evidence(Operation.FORWARD, microbatch_id)
                return ForwardDone(microbatch_id, None, 1.0)
            case InnerStep():
                num_microbatches, self._num_waiting = self._num_waiting, 0
                self._keep_evidence(Operation.INNER_STEP)
                return InnerStepDone(num_microbatches, None)
            case _:
                return super()._do(job)

    @property
    def _outer_step(self) -> int:
        assert self._state is not None
        return self._state.outer_step

    def _pseudo_gradient_N(self) -> Tensor:
        assert self._noise is not None
        return self._noise[self._outer_step % 2]


def _lie(*arguments: object) -> Reduction:
    """Another mean than the rule's."""
    honest = reduce_partition(*arguments)  # type: ignore[arg-type]
    if honest.mean is None:
        return honest
    num_values = (honest.mean.size_bytes - len(honest.mean.header)) // 4
    return Reduction(encode({"mean": torch.full((num_values,), _SCALE)}), honest.excluded)


async def _mine(task: SyncMinerTask) -> None:
    this = asyncio.current_task()
    assert this is not None
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, this.cancel)
    await service.serve(task.config, keypair_from_uri(task.key_uri), make_worker=partial(MadeUpWorker))


def main() -> None:
    """Mines until it is told to stop."""
    log_json()
    stop_when_stdin_closes()
    task = SyncMinerTask.model_validate_json(sys.argv[1])
    if task.lies:
        vars(hands)["reduce_partition"] = _lie
    try:
        asyncio.run(_mine(task))
    except (asyncio.CancelledError, KeyboardInterrupt):
        sys.exit(0)


if __name__ == "__main__":
    main()
