"""`DeviceWorker`: does what the core gives the device to do. Synchronous; one thread at a time calls it.

Owns the engine and what lies between it and the cache: tokens, encoding, digests, evidence, the outbox. Knows nothing
of peers, phases or time. The real miner calls it from its device thread, the simulator in place.

Invariants: what it hands on is finite; each operation that changed or could have shown anything is counted in the order
of the log, so that evidence and log agree.

Letters in names: B sequences, T tokens, U = T + 1, C boundary width, N flat parameters.
"""

from collections.abc import Callable
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch

from orion.common.config import RunSpec
from orion.common.ids import DataId, Digest, Hotkey, MicrobatchId, Operation
from orion.common.memory_plan import StagePlan, plan_stages
from orion.common.model.stage import Stage
from orion.common.protocol.age import AGE_MAX
from orion.common.protocol.codec import Body, body_size, decode, encode, error_spec
from orion.common.protocol.keys import checkpoint_key, parse_key, pseudo_gradient_key
from orion.common.protocol.messages import ObjectRef
from orion.common.protocol.reduction import encode_slice_and_read, encode_slice_with_error
from orion.common.train.anchor import checkpoint_tensors
from orion.common.train.compress import all_finite
from orion.common.train.engine import ForwardResult, NonFiniteError, StageEngine
from orion.common.train.outer import OuterState, ahead_start, state_digest
from orion.common.train.partition import partition_bounds
from orion.common.train.slice_codec import slice_codec
from orion.miner.archive import Evidence
from orion.miner.cache import Parcel, Slot, TensorCache
from orion.miner.events import (
    Backward,
    BackwardDone,
    BodyRef,
    ComputeRefused,
    EncodePseudoGradient,
    Forward,
    ForwardDone,
    InnerStep,
    InnerStepDone,
    Job,
    JobResult,
    MergedTaken,
    PseudoGradientEncoded,
    TakeMerged,
)

WIRE_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


class TokenSource(Protocol):
    """The run's prepared data (`orion.common.train.data.TokenDataset`)."""

    def microbatch(self, run_seed: int, data_id: int) -> npt.NDArray[np.int64]:
        """ids_BU of a data id."""
        ...


class DeviceWorker:
    """The device of one miner."""

    def __init__(
        self,
        spec: RunSpec,
        hotkey: Hotkey,
        *,
        cache: TensorCache,
        evidence: Evidence,
        device: torch.device,
        compute_dtype: torch.dtype,
        engine_type: Callable[..., StageEngine] | None = None,
        device_memory_bytes: int | None = None,
    ) -> None:
        """`engine_type` makes the engine: None = `StageEngine`. `device_memory_bytes`: None = as much as it takes."""
        self._spec = spec
        self._hotkey = hotkey
        self._cache = cache
        self._evidence = evidence
        self._engine_type = engine_type
        self.tokens: TokenSource | None = None
        """The run's data; must be there before the first stage is loaded."""
        self._device = device
        self._compute_dtype = compute_dtype
        self._device_memory_bytes = device_memory_bytes
        self._plan: StagePlan | None = None
        self._stage_index = -1
        self._engine: StageEngine | None = None
        self._held: set[MicrobatchId] = set()
        """What the engine holds."""
        self._is_fresh = True
        """Nothing was computed in the outer step that the engine stands in yet."""
        self._is_ahead = False
        """That outer step was begun before its anchor was there."""
        self.merged: OuterState | None = None
        """The state after the outer step whose anchor the engine stands on, once it was fetched for `TakeMerged`."""
        self.outbox: dict[str, Body] = {}
        """Encoded pseudo-gradients by object key, until they are uploaded: that of the outer step, and that of the one
        before, which may be late."""

    @property
    def outer_state(self) -> OuterState | None:
        """The anchor that the engine stands on; nobody writes into its tensors."""
        return None if self._engine is None else self._engine.outer_state

    @property
    def num_held(self) -> int:
        """Microbatches between forward and backward."""
        return len(self._held)

    def run(self, job: Job) -> JobResult:
        """Does one job. An anchor must have been loaded."""
        result = self._do(job)
        self.check_memory()
        return result

    def check_memory(self) -> None:
        """Raises AssertionError when more is held than the run's memory plan allows."""
        plan, engine = self._plan, self._engine
        if plan is None or engine is None:
            return
        assert engine.num_held <= plan.credits, "the device holds more microbatches than there are credits"
        assert engine.num_graphs <= plan.graphs_max, "more graphs are kept than the memory plan has room for"
        assert engine.num_versions <= plan.versions_max, "more versions of the parameters live than may be needed"
        assert self._cache.size_bytes <= plan.cache_bytes_max, "more bodies are kept than the memory plan has room for"

    def _do(self, job: Job) -> JobResult:
        match job:
            case Forward(microbatch_id, data_id):
                return self._forward(microbatch_id, data_id)
            case Backward(microbatch_id):
                return self._backward(microbatch_id)
            case InnerStep(inner_step_index, share):
                report = self._current.inner_step(inner_step_index, share)
                self._keep_evidence(Operation.INNER_STEP)
                return InnerStepDone(report.num_microbatches, report.refused_reason)
            case EncodePseudoGradient(outer_step, adds_error):
                return self._encode_pseudo_gradient(outer_step, adds_error=adds_error)
            case TakeMerged(outer_step):
                return self._take_merged(outer_step)

    def load(self, stage_index: int, state: OuterState) -> Digest:
        """Stands at the start of the state's outer step; whatever was held is let go. The state's digest.

        Raises ConfigError when the stage doesn't fit the device.
        """
        if self._engine is None or self._stage_index != stage_index:
            self._engine = self._build(stage_index)
            self._stage_index = stage_index
            self.outbox = {}
        self._engine.load(state)
        self._engine.begin_outer_step()
        self._held.clear()
        self._drop_uploads_before(state.outer_step - AGE_MAX)
        self._is_fresh, self._is_ahead, self.merged = True, False, None
        return state_digest(state)

    def free(self, microbatch_id: MicrobatchId) -> None:
        """Lets go of all that is held of a microbatch."""
        self._cache.free(microbatch_id)
        self.drop(microbatch_id)

    def drop(self, microbatch_id: MicrobatchId) -> None:
        """Lets go of what the engine holds for a microbatch's backward, if anything."""
        if microbatch_id in self._held:
            self._held.remove(microbatch_id)
            self._current.drop(microbatch_id)

    def encode_checkpoint(self, stage_index: int, outer_step: int) -> tuple[str, Body] | None:
        """Key and body of the anchor's checkpoint; None when the engine stands elsewhere by now."""
        if self._engine is None or (self._stage_index, self._outer_step) != (stage_index, outer_step):
            return None
        key = checkpoint_key(outer_step, stage_index, self._hotkey)
        return key, encode(checkpoint_tensors(self._engine.outer_state))

    # --- inside -------------------------------------------------------------------------------------------------------

    @property
    def _current(self) -> StageEngine:
        assert self._engine is not None, "no anchor was loaded"
        return self._engine

    @property
    def _outer_step(self) -> int:
        return self._current.outer_state.outer_step

    def _build(self, stage_index: int) -> StageEngine:
        spec = self._spec
        assert stage_index > 0 or self.tokens is not None, "the first stage has no data"
        make = StageEngine if self._engine_type is None else self._engine_type
        plan = plan_stages(spec, self._compute_dtype.itemsize)[stage_index]
        memory_bytes = self._device_memory_bytes
        graphs_max = plan.graphs_max if memory_bytes is None else plan.graphs_within(memory_bytes)
        self._plan = plan
        return make(
            Stage(spec.model, spec.layouts[stage_index]),
            inner=spec.inner,
            outer=spec.outer,
            total_params=sum(spec.stage_sizes),
            device=self._device,
            compute_dtype=self._compute_dtype,
            wire_dtype=WIRE_DTYPES[spec.wire_dtype],
            graphs_max=graphs_max,
        )

    def _forward(self, microbatch_id: MicrobatchId, data_id: DataId) -> ForwardDone | ComputeRefused:
        came_in = self._cache.get(microbatch_id, Slot.ACTIVATION_IN)
        x_BTC = None if came_in is None else came_in.tensors["z"]
        ids_BU = self._ids(data_id) if came_in is None else came_in.tensors["ids"].to(torch.int64)
        # Ids index tables: one that a peer made up must not reach the model.
        if int(ids_BU.min()) < 0 or int(ids_BU.max()) >= self._spec.model.vocab_size:
            return ComputeRefused(microbatch_id, "token ids are outside of the vocabulary")
        try:
            result = self._current.forward(microbatch_id, x_BTC, ids_BU)
        except NonFiniteError as error:
            return ComputeRefused(microbatch_id, str(error))
        if result.loss is None:
            self._held.add(microbatch_id)
        body = self._keep_output(microbatch_id, result, ids_BU)
        self._keep_evidence(Operation.FORWARD, microbatch_id, came_in, body)
        return ForwardDone(microbatch_id, _ref(body), result.loss)

    def _keep_output(self, microbatch_id: MicrobatchId, result: ForwardResult, ids_BU: torch.Tensor) -> Body | None:
        """Puts what is to be sent into the cache: the activation, or on the last stage the input gradient."""
        if result.output_BTC is not None:
            tensors = {"z": result.output_BTC, "ids": ids_BU.to(torch.int32)}
            return self._put(microbatch_id, Slot.ACTIVATION_OUT, tensors)
        if result.input_grad_BTC is not None:
            return self._put(microbatch_id, Slot.GRADIENT_OUT, {"g": result.input_grad_BTC})
        return None

    def _backward(self, microbatch_id: MicrobatchId) -> BackwardDone | ComputeRefused:
        came_in = self._cache.get(microbatch_id, Slot.GRADIENT_IN)
        assert came_in is not None, f"no gradient of microbatch {microbatch_id} is there"
        self._held.remove(microbatch_id)
        try:
            result = self._current.backward(microbatch_id, came_in.tensors["g"])
        except NonFiniteError as error:
            return ComputeRefused(microbatch_id, str(error))
        body = None
        if result.input_grad_BTC is not None:
            body = self._put(microbatch_id, Slot.GRADIENT_OUT, {"g": result.input_grad_BTC})
        self._keep_evidence(Operation.BACKWARD, microbatch_id, came_in, body)
        return BackwardDone(microbatch_id, _ref(body))

    def _keep_evidence(
        self,
        operation: Operation,
        microbatch_id: MicrobatchId | None = None,
        came_in: Parcel | None = None,
        went_out: Body | None = None,
    ) -> None:
        """Counts an operation of the log. The log is begun, or begun anew, with the first operation on an anchor."""
        log_step = self._outer_step + self._is_ahead
        if self._is_fresh:
            self._evidence.begin(log_step)
            if self._is_ahead:
                self._evidence.add(log_step, Operation.BEGIN_AHEAD)
            self._is_fresh = False
        self._evidence.add(
            log_step,
            operation,
            microbatch_id,
            came_in=None if came_in is None else came_in.body,
            went_out=went_out,
        )

    def _put(self, microbatch_id: MicrobatchId, slot: Slot, tensors: dict[str, torch.Tensor]) -> Body:
        body = encode(tensors)
        self._cache.put(microbatch_id, slot, Parcel(tensors, body))
        return body

    def _encode_pseudo_gradient(self, outer_step: int, *, adds_error: bool) -> PseudoGradientEncoded:
        assert self._outer_step == outer_step, f"the engine stands at outer step {self._outer_step}"
        self._drop_uploads_before(outer_step - AGE_MAX)
        bodies: dict[str, Body] = {}
        values_N = self._pseudo_gradient_N()
        if not all_finite(values_N):
            return PseudoGradientEncoded(outer_step, ())
        goes_on = self._spec.sync == "overlapped"
        # Begun ahead partition by partition, as the outer step is elementwise: a vector less at a time.
        start_N = torch.empty_like(values_N) if goes_on else None
        errors: list[torch.Tensor] = []
        error_N = self._error(outer_step - 1, values_N.numel()) if adds_error else None
        for partition in partition_bounds(values_N.numel(), self._spec.num_partitions):
            key = pseudo_gradient_key(outer_step, self._stage_index, self._hotkey, partition.index)
            part = slice(partition.start, partition.end)
            error_part = None if error_N is None else error_N[part]
            slice_N, codec = values_N[part], slice_codec(self._spec, self._stage_index, partition)
            if start_N is None:
                bodies[key], lost = encode_slice_with_error(codec, slice_N, error_part)
            else:
                bodies[key], read_N, lost = encode_slice_and_read(codec, slice_N, error_part)
                before = self._current.outer_state.slice(partition.start, partition.end)
                start_N[part] = ahead_start(before, read_N, self._spec.outer)
            if lost is not None:
                errors.append(lost)
        self.outbox = self.outbox | bodies  # a new one, because what was uploaded is taken out by another thread
        error_digest = self._keep_error(outer_step, torch.cat(errors)) if errors else None
        objects = tuple(
            ObjectRef(key=key, digest=body.digest, size_bytes=body.size_bytes) for key, body in bodies.items()
        )
        if start_N is not None:
            self._current.begin_ahead(start_N)
            self._held.clear()
            self._is_fresh, self._is_ahead, self.merged = True, True, None
        return PseudoGradientEncoded(outer_step, objects, error_digest, goes_on)

    def _drop_uploads_before(self, outer_step: int) -> None:
        """What is too old to be merged is not kept for its upload."""
        names = ((key, body, parse_key(key)) for key, body in self.outbox.copy().items())
        self.outbox = {key: body for key, body, name in names if name is not None and name.outer_step >= outer_step}

    def _keep_error(self, outer_step: int, error_N: torch.Tensor) -> Digest:
        """What encoding has lost outlives this process: the next upload adds it, and validators ask for it."""
        body = encode({"error": error_N})
        self._evidence.keep_error(outer_step, body)
        return body.digest

    def _error(self, outer_step: int, num_params: int) -> torch.Tensor | None:
        """The error state that the upload of that outer step left; None where the codec has none, or it is lost."""
        expected = error_spec(num_params)
        found = self._evidence.error(outer_step)
        if found is None or len(found) != body_size(expected):
            return None
        return decode(bytearray(found), expected, len(found))["error"]

    def _take_merged(self, outer_step: int) -> MergedTaken:
        merged = self.merged
        assert merged is not None and merged.outer_step == outer_step + 1, "what was merged is not there"
        self._keep_evidence(Operation.TAKE_MERGED)
        self._current.take_merged(merged)
        self._is_ahead, self.merged = False, None
        return MergedTaken(outer_step)

    def _pseudo_gradient_N(self) -> torch.Tensor:
        return self._current.pseudo_gradient_N()

    def _ids(self, data_id: DataId) -> torch.Tensor:
        assert self.tokens is not None, "the first stage has no data"
        return torch.from_numpy(self.tokens.microbatch(self._spec.seed, data_id))


def _ref(body: Body | None) -> BodyRef | None:
    return None if body is None else BodyRef(body.digest, body.size_bytes)
