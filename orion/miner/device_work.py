"""What the device does next, and what becomes of what it has done.

Owns the device's queue and the order of its jobs: passes as `scheduler` says, inner steps, and, once an outer step is
over, what `outer` wants of it; each end is logged in order. Must not decide what becomes of a microbatch (`flow`).
Invariants: one job runs and one waits at most; every gradient is applied and logged once.
"""

from orion.common.config import RunSpec
from orion.common.ids import MicrobatchId, Operation
from orion.miner import events
from orion.miner.device_queue import DeviceQueue
from orion.miner.effects import Compute
from orion.miner.events import Forward, Job
from orion.miner.flow import Flow
from orion.miner.injection import Injection
from orion.miner.moment import Emit, Moment
from orion.miner.oplog import OpLog
from orion.miner.outer import OuterSteps
from orion.miner.scheduler import DoBackward, DoForward, DoInnerStep, Readiness, next_work
from orion.miner.table import MicrobatchTable, Stand


class DeviceWork:
    """The jobs of one miner's device."""

    def __init__(
        self,
        spec: RunSpec,
        *,
        table: MicrobatchTable,
        flow: Flow,
        outer: OuterSteps,
        oplog: OpLog,
        injection: Injection,
        emit: Emit,
    ) -> None:
        self._spec = spec
        self._table = table
        self._flow = flow
        self._outer = outer
        self._oplog = oplog
        self._injection = injection
        self._emit = emit
        self._device = DeviceQueue()

    def __len__(self) -> int:
        """Jobs that it was given and has not ended."""
        return len(self._device)

    def advance(self, moment: Moment) -> None:
        """Gives the device what it has room for."""
        while self._device.has_room:
            job = self._next_job(moment)
            if job is None:
                break
            self._device.give(job, moment.now_s)
            self._emit(Compute(job))

    def ended(self, moment: Moment, result: events.JobResult) -> None:
        """A job has ended."""
        job = self._device.end(moment.now_s)
        assert _ends(job, result), f"{job} ended as {result}"
        local = self._outer.local
        assert local is not None, "a job ended outside of an outer step"
        match result:
            case events.ForwardDone() | events.BackwardDone():
                self._log_pass(result, local.inner_steps)
                if self._is_applying(_operation(result)):
                    self._outer.applied_one()
                if isinstance(result, events.ForwardDone):
                    self._flow.forwarded(moment, result)
                else:
                    self._flow.backwarded(moment, result)
            case events.ComputeRefused(microbatch_id, reason):
                self._flow.compute_refused(moment, microbatch_id, reason)
            case events.InnerStepDone():
                self._oplog.append(
                    Operation.INNER_STEP, inner_step=local.inner_steps, num_microbatches=result.num_microbatches
                )
                self._outer.inner_step_done(result)
            case events.PseudoGradientEncoded():
                self._outer.encoded(result)
            case events.MergedTaken():
                self._outer.merged_taken(moment.view, moment.now_s)

    def check_invariants(self) -> None:
        """Raises AssertionError when anything is as it must never be."""
        computing = [*self._table.standing(Stand.FORWARDING), *self._table.standing(Stand.BACKWARDING)]
        passes = [job.microbatch_id for job in self._device.jobs if isinstance(job, events.Forward | events.Backward)]
        assert sorted(passes) == sorted(item.microbatch_id for item in computing), f"the device does {passes}"
        applied = [entry.microbatch_id for entry in self._oplog.open_entries if self._is_applying(entry.operation)]
        assert len(applied) == len(set(applied)), "a microbatch is applied twice"
        local = self._outer.local
        if local is not None and not local.is_sealed:
            stepped, waiting = 0, 0
            for entry in self._oplog.open_entries:
                if entry.operation is Operation.BEGIN_ANEW:
                    stepped = waiting = 0
                stepped += entry.num_microbatches
                waiting += self._is_applying(entry.operation) - entry.num_microbatches
            if local.inner_steps or local.num_accumulated:
                assert waiting == local.num_accumulated, "a gradient was lost or counted twice"
                assert stepped >= local.num_stepped, "more was averaged than the log says"

    # --- inside -------------------------------------------------------------------------------------------------------

    def _log_pass(self, result: events.ForwardDone | events.BackwardDone, inner_step: int) -> None:
        item = self._table.get(result.microbatch_id)
        assert item is not None, f"microbatch {result.microbatch_id} was computed but is not held"
        operation = _operation(result)
        gradient_digest = None if item.gradient is None else item.gradient.digest
        self._oplog.append(
            operation,
            inner_step=inner_step,
            microbatch_id=item.microbatch_id,
            data_id=item.data_id,
            input_digest=item.input_digest if operation is Operation.FORWARD else gradient_digest,
            output_digest=None if result.output is None else result.output.digest,
            applied=self._is_applying(operation),
        )

    def _is_applying(self, operation: Operation) -> bool:
        """Whether the operation accumulates a gradient: backward, and on the last stage forward, which includes it."""
        anchor = self._outer.anchor
        assert anchor is not None
        is_last = anchor.stage_index == self._spec.num_stages - 1
        return operation is (Operation.FORWARD if is_last else Operation.BACKWARD)

    def _next_job(self, moment: Moment) -> Job | None:
        """Decides what the device does after all that it was given. Nothing while its state changes."""
        local = self._outer.local
        if self._outer.is_changing or local is None:
            return None
        if moment.outer_step is None:
            return None if len(self._device) else self._outer.next_job(moment.view)
        if self._outer.has_merged:
            return None if len(self._device) else self._outer.take_merged()
        match next_work(self._readiness(moment, local.num_accumulated)):
            case None:
                return None
            case DoInnerStep():
                self._flow.before_inner_step(moment)
                return self._outer.inner_step()
            case DoBackward(microbatch_id):
                self._flow.computing(moment, microbatch_id)
                return events.Backward(microbatch_id)
            case DoForward(microbatch_id):
                return Forward(microbatch_id, self._flow.computing(moment, microbatch_id).data_id)

    def _readiness(self, moment: Moment, num_accumulated: int) -> Readiness:
        """What could be done after all that the device was given."""
        device, steps_max = self._device, self._spec.flow.staleness_max
        is_last = self._is_applying(Operation.FORWARD)
        inner_steps = moment.inner_steps + device.has_inner_step
        may_forward = not len(device) or is_last or device.forwards_are_quick
        num_accumulated = 0 if device.has_inner_step else num_accumulated
        return Readiness(
            backward=[
                item.microbatch_id
                for item in self._table.standing(Stand.BACKWARD_QUEUED)
                if inner_steps - item.version <= steps_max
            ],
            forward=self._startable(moment, num_accumulated) if may_forward else [],
            num_accumulated=num_accumulated,
            num_accumulating=device.num_applying(is_last=is_last),
            microbatches_per_step=self._spec.microbatches_per_step,
        )

    def _startable(self, moment: Moment, num_accumulated: int) -> list[MicrobatchId]:
        """Forwards that may begin: on the first stage only as many as the pipeline needs in flight, and none whose
        gradient would come too stale. With `staleness_max` 0 that is one batch, and the next one after its step."""
        waiting = [item.microbatch_id for item in self._table.standing(Stand.FORWARD_QUEUED)]
        is_first = moment.view is not None and moment.view.stage_index == 0
        num_timely = (self._spec.flow.staleness_max + 1) * self._spec.microbatches_per_step - num_accumulated
        if is_first and self._table.num_started >= min(self._injection.target, num_timely):
            return []
        return waiting


def _operation(result: events.ForwardDone | events.BackwardDone) -> Operation:
    return Operation.FORWARD if isinstance(result, events.ForwardDone) else Operation.BACKWARD


def _ends(job: Job, result: events.JobResult) -> bool:
    """Whether a job may end as that."""
    match job:
        case Forward(microbatch_id) | events.Backward(microbatch_id):
            kind = events.ForwardDone if isinstance(job, Forward) else events.BackwardDone
            return isinstance(result, kind | events.ComputeRefused) and result.microbatch_id == microbatch_id
        case events.InnerStep():
            return isinstance(result, events.InnerStepDone)
        case events.EncodePseudoGradient():
            return isinstance(result, events.PseudoGradientEncoded)
        case events.TakeMerged(outer_step):
            return isinstance(result, events.MergedTaken) and result.outer_step == outer_step
