"""Replays a miner's log, or a prefix of it, from the public anchor, with the engine that the miner used.

Owns the comparison of every operation's output. Must not fetch anything or judge what was not delivered. A function of
its arguments alone; the real validator runs it on its device thread, the simulator in place.

What is compared: a forward's output, the gradient that the last stage sends back at once, a backward's input gradient.
An inner step leaves nothing to compare, nor does the first stage's backward, but what follows depends on them:
gradients that were not accumulated show in the first output after the next inner step. Each operation is given the
inputs that the miner handed over, not what was replayed, so that noise does not add up along the log. After a whole log
the pseudo-gradient is compared with the one that was uploaded, partition by partition. Both are taken through the run's
codec, so that what it loses is lost on both sides.

An overlapped outer step that was begun ahead of its anchor begins where everybody can: where the anchor before it leads
with what the miner uploaded there (`ahead_N`). What was done before a miner began anew, because it was left out of that
merge, began at no public point; it is passed over, and nothing of it is in a pseudo-gradient. So is all of a log whose
miner was late for that merge and never came: it took the merge in, and is in none itself.

Letters in names: B sequences, T tokens, U = T + 1, C boundary width, N flat parameters.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from orion.common.config import RunSpec
from orion.common.errors import DataError
from orion.common.ids import Operation
from orion.common.memory_plan import plan_stages
from orion.common.model.stage import Stage
from orion.common.protocol.records import LogEntry
from orion.common.protocol.reduction import decode_slice, through_codec
from orion.common.train.engine import EngineUseError, NonFiniteError, StageEngine
from orion.common.train.outer import OuterState
from orion.common.train.partition import partition_bounds
from orion.common.train.slice_codec import error_state_part, slice_codec
from orion.validator.compare import Comparison, compare
from orion.validator.events import ErrorStates, ReplayOperation, ReplayResult, ReplayTask, TensorBody

_WIRE_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


class TokenSource(Protocol):
    """The run's prepared data (`orion.common.train.data.TokenDataset`)."""

    def microbatch(self, run_seed: int, data_id: int) -> npt.NDArray[np.int64]:
        """ids_BU of a data id."""
        ...


def replay(
    task: ReplayTask,
    state: OuterState,
    *,
    spec: RunSpec,
    tokens: TokenSource | None,
    device: torch.device,
    compute_dtype: torch.dtype,
    uploaded: Sequence[bytearray | None] = (),
    ahead_N: Tensor | None = None,
    errors: ErrorStates | None = None,
) -> ReplayResult:
    """Replays all operations of `task`, up to the first that fails, from `state`, the anchor of its outer step.

    `uploaded` are the miner's objects of all partitions where the task has a contribution, None for one that has the
    wrong size. `ahead_N` is where a log begins that begins ahead of its anchor; None when nobody knows, because nothing
    of the miner's entered the merge before. `errors` are the miner's error states where the codec has them; None when
    they were not handed over. Device and compute dtype decide how alike the results can be: bit for bit only on what
    the miner has. `tokens` is needed for the first stage; elsewhere it serves to count inputs with foreign ids. Raises
    DataError without it, and ValueError when `state` is not of the task's stage and outer step.
    """
    if state.outer_step != task.outer_step:
        raise ValueError(f"anchor of outer step {state.outer_step} for a log of {task.outer_step}")
    run = _Replay(task, state, ahead_N, spec=spec, tokens=tokens, device=device, compute_dtype=compute_dtype)
    run.operations()
    if task.contribution is not None:
        run.pseudo_gradient(uploaded, errors)
    return run.result()


@dataclass(slots=True)
class _Tally:
    """What was found so far."""

    num_compared: int = 0
    num_bit_equal: int = 0
    cosine_least: float = 1.0
    norm_ratio_least: float = 1.0
    num_partitions: int = 0
    pseudo_gradient_cosine_least: float = 1.0
    pseudo_gradient_norm_ratio_least: float = 1.0
    foreign: set[int] = field(default_factory=set)
    """Data ids whose inputs came with other tokens."""

    def add(self, comparison: Comparison) -> str | None:
        self.num_compared += 1
        self.num_bit_equal += comparison.bit_equal
        self.cosine_least = min(self.cosine_least, comparison.cosine)
        self.norm_ratio_least = min(self.norm_ratio_least, comparison.norm_ratio)
        return comparison.failure

    def add_partition(self, comparison: Comparison) -> str | None:
        self.num_partitions += 1
        self.pseudo_gradient_cosine_least = min(self.pseudo_gradient_cosine_least, comparison.cosine)
        self.pseudo_gradient_norm_ratio_least = min(self.pseudo_gradient_norm_ratio_least, comparison.norm_ratio)
        return comparison.failure


class _Replay:
    def __init__(
        self,
        task: ReplayTask,
        state: OuterState,
        ahead_N: Tensor | None,
        *,
        spec: RunSpec,
        tokens: TokenSource | None,
        device: torch.device,
        compute_dtype: torch.dtype,
    ) -> None:
        self._task = task
        self._ahead_N = ahead_N
        self._is_blind = False
        """Where the engine should stand is not known."""
        self._spec = spec
        self._tokens = tokens
        layout = spec.layouts[task.stage_index]
        self._is_first, self._is_last = layout.is_first, layout.is_last
        if self._is_first and tokens is None:
            raise DataError("replaying the first stage needs the run's data; fetch it or name its folder")
        self._engine = StageEngine(
            Stage(spec.model, layout),
            inner=spec.inner,
            outer=spec.outer,
            total_params=sum(spec.stage_sizes),
            device=device,
            compute_dtype=compute_dtype,
            wire_dtype=_WIRE_DTYPES[spec.wire_dtype],
            graphs_max=plan_stages(spec, compute_dtype.itemsize)[task.stage_index].graphs_max,
        )
        self._state = state
        self._stand_at_anchor()
        self._tolerance = spec.validation.tensor_tolerance
        self._tally = _Tally()
        self._num_operations = 0
        self._failure: str | None = None

    def _stand_at_anchor(self) -> None:
        """At the start of the outer step, with nothing in hand."""
        self._is_blind = False
        self._engine.load(self._state)
        self._engine.begin_outer_step()

    def operations(self) -> None:
        """All operations, up to the first that fails."""
        for number, operation in enumerate(self._task.operations):
            self._num_operations += 1
            try:
                failure = self._operation(operation)
            except (EngineUseError, NonFiniteError) as error:
                failure = str(error)
            if failure is not None:
                self._failure = f"{operation.entry.operation} {number} of the log: {failure}"
                return

    def pseudo_gradient(self, uploaded: Sequence[bytearray | None], errors: ErrorStates | None) -> None:
        """Every partition of what the log leads to, unless the log has failed already; and with a codec that has an
        error state, that what was lost before is what was added, and what is lost now what the miner says."""
        if self._failure is not None:
            return
        if self._is_blind or self._engine.is_ahead:
            self._failure = "pseudo-gradient: it follows from no anchor, the merge before was not taken in"
            return
        replayed_N = self._engine.pseudo_gradient_N().cpu()
        tolerance = self._spec.validation.pseudo_gradient_tolerance
        if self._spec.codec == "topk" and errors is None:
            self._failure = "pseudo-gradient: the error state that was told with it was not handed over"
            return
        partitions = partition_bounds(replayed_N.numel(), self._spec.num_partitions)
        for partition, body in zip(partitions, uploaded, strict=True):
            codec = slice_codec(self._spec, self._task.stage_index, partition)
            claimed_N = decode_slice(codec, partition.num_params, body)
            if isinstance(claimed_N, str):
                failure: str | None = claimed_N
            else:
                part = slice(partition.start, partition.end)
                before_N = None if errors is None or errors.before_N is None else errors.before_N[part]
                own_N, lost_N = through_codec(codec, replayed_N[part], before_N)
                failure = self._tally.add_partition(compare(claimed_N, own_N, tolerance))
                if failure is None and errors is not None and lost_N is not None:
                    # What was to be sent, less what was.
                    expected_N = error_state_part(codec, torch.sub(torch.add(lost_N, own_N), claimed_N))
                    found = compare(errors.after_N[part], expected_N, tolerance).failure
                    failure = None if found is None else f"error state: {found}"
            if failure is not None:
                self._failure = f"pseudo-gradient, partition {partition.index}: {failure}"
                return

    def result(self) -> ReplayResult:
        """What was found."""
        tally = self._tally
        return ReplayResult(
            num_operations=self._num_operations,
            num_compared=tally.num_compared,
            num_bit_equal=tally.num_bit_equal,
            cosine_least=tally.cosine_least,
            norm_ratio_least=tally.norm_ratio_least,
            num_partitions=tally.num_partitions,
            pseudo_gradient_cosine_least=tally.pseudo_gradient_cosine_least,
            pseudo_gradient_norm_ratio_least=tally.pseudo_gradient_norm_ratio_least,
            num_foreign_inputs=len(tally.foreign),
            failure=self._failure,
        )

    def _operation(self, operation: ReplayOperation) -> str | None:
        if self._is_blind and operation.entry.operation is not Operation.BEGIN_ANEW:
            is_merge = operation.entry.operation is Operation.TAKE_MERGED and not self._task.was_late
            return "takes in a merge of which it was no part" if is_merge else None
        match operation.entry.operation:
            case Operation.FORWARD:
                return self._forward(operation)
            case Operation.BACKWARD:
                return self._backward(operation)
            case Operation.INNER_STEP:
                self._inner_step(operation.entry)
                return None
            case Operation.BEGIN_ANEW:
                self._stand_at_anchor()
                return None
            case Operation.BEGIN_AHEAD:
                self._is_blind = self._ahead_N is None
                if self._ahead_N is not None:
                    self._engine.begin_ahead(self._ahead_N)
                return None
            case Operation.ENCODE:
                return "is no operation of a log"
            case Operation.TAKE_MERGED:
                self._engine.take_merged(self._state)
                return None

    def _forward(self, operation: ReplayOperation) -> str | None:
        entry = operation.entry
        assert entry.microbatch_id is not None
        assert entry.data_id is not None
        ids_BU = self._ids(entry.data_id, operation.input)
        if not bool(((ids_BU >= 0) & (ids_BU < self._spec.model.vocab_size)).all()):
            return "token ids beyond the vocabulary"
        x_BTC = None if operation.input is None else operation.input["z"]
        result = self._engine.forward(entry.microbatch_id, x_BTC, ids_BU)
        if operation.output is None:
            return None
        if self._is_last:
            assert result.input_grad_BTC is not None
            return self._tally.add(compare(operation.output["g"], result.input_grad_BTC, self._tolerance))
        if not torch.equal(operation.output["ids"].long(), ids_BU):
            return "sent on other token ids"
        assert result.output_BTC is not None
        return self._tally.add(compare(operation.output["z"], result.output_BTC, self._tolerance))

    def _backward(self, operation: ReplayOperation) -> str | None:
        assert operation.entry.microbatch_id is not None
        assert operation.input is not None
        result = self._engine.backward(operation.entry.microbatch_id, operation.input["g"])
        if operation.output is None or result.input_grad_BTC is None:
            return None
        return self._tally.add(compare(operation.output["g"], result.input_grad_BTC, self._tolerance))

    def _inner_step(self, entry: LogEntry) -> None:
        index = self._task.outer_step * self._spec.inner_steps + entry.inner_step
        self._engine.inner_step(index, share=entry.num_microbatches / self._spec.microbatches_per_step)

    def _ids(self, data_id: int, body: TensorBody | None) -> Tensor:
        """Token ids of a forward: the data's own on the first stage, those that came with the activation elsewhere.

        Ids that are not the data's are no fault of this miner: it cannot know the data, so somebody before it in the
        path may have changed them. They are counted.
        """
        if body is None:
            assert self._tokens is not None
            return torch.from_numpy(self._tokens.microbatch(self._spec.seed, data_id))
        ids_BU = body["ids"].long()
        if self._tokens is not None:
            true_BU = torch.from_numpy(self._tokens.microbatch(self._spec.seed, data_id))
            if not torch.equal(ids_BU, true_BU):
                self._tally.foreign.add(data_id)
        return ids_BU
