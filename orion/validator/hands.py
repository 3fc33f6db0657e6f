"""Carries out the core's effects: requests to the orchestrator, the miners and the chain, and replays.

Owns what each failure means as an event. Decides nothing else and keeps no state. Every effect ends as exactly one
event, whatever happens; only a mistake of our own raises. What it asks and where it computes is given to it, so it
needs no event loop of its own: the simulator runs it too.
"""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Protocol, TypeVar

import torch
from blake3 import blake3
from pydantic import ValidationError

from orion.common.clock import Clock
from orion.common.config import RunSpec
from orion.common.errors import DataError, TransportError
from orion.common.ids import Digest, Direction, Hotkey, MicrobatchId, Operation
from orion.common.net.anchor_loader import AnchorLoader, ObjectSource
from orion.common.net.chain import Chain, ChainError
from orion.common.offload import Offload, in_thread
from orion.common.protocol import routes
from orion.common.protocol.codec import body_size, check_finite, decode, error_spec, transfer_spec
from orion.common.protocol.fields import MINERS_MAX
from orion.common.protocol.messages import (
    Contribution,
    Done,
    Message,
    ObjectRef,
    Receipt,
    RefusalCode,
)
from orion.common.protocol.records import (
    Boundaries,
    BoundaryRecord,
    Commitments,
    CommittedLog,
    EvidenceRequest,
    Ledger,
    MergeRecord,
    Pathways,
    ScoreSheet,
    Verdict,
)
from orion.common.protocol.reduction import join_slices, reduce_partition, slice_refs, slices_in_order
from orion.common.protocol.refusals import RefusedError
from orion.common.train.outer import OuterState, ahead_start
from orion.common.train.partition import partition_bounds
from orion.common.train.slice_codec import slice_codec
from orion.validator.bundle import BundleShelf
from orion.validator.clasp import PATHWAYS_MAX
from orion.validator.events import (
    ChainFailed,
    ChainView,
    CommitmentsArrived,
    Effect,
    ErrorStates,
    Event,
    EvidenceArrived,
    EvidenceFailed,
    FetchCommitments,
    FetchEvidence,
    FetchLedger,
    FetchLog,
    FetchMerge,
    FetchMetagraph,
    FetchProblem,
    FetchSigns,
    LedgerArrived,
    LogArrived,
    LogFailed,
    MergeArrived,
    MetagraphArrived,
    Notice,
    OrchestratorErrand,
    OrchestratorFailed,
    Reduce,
    ReductionEnded,
    ReductionTask,
    ReductionUnavailable,
    Replay,
    ReplayEnded,
    ReplayTask,
    ReplayUnavailable,
    ScoresSent,
    SendScores,
    SendVerdict,
    SetWeights,
    SignsArrived,
    VerdictSent,
    WeightsRefused,
    WeightsSet,
)
from orion.validator.replay import TokenSource, replay

ResultT = TypeVar("ResultT")

_TIMEOUT_S_MIN = 0.1
"""Of a request whose deadline is about to pass; zero would mean none to the HTTP client."""


class Orchestrator(Protocol):
    """What is asked of the orchestrator (`OrchestratorClient`)."""

    async def commitments(self, outer_step: int) -> Commitments: ...

    async def merge(self, stage_index: int, outer_step: int) -> MergeRecord: ...

    async def pathways(self, outer_step: int, offset: int) -> Pathways: ...

    async def boundaries(self, after: Hotkey | None) -> Boundaries: ...

    async def verdict(self, verdict: Verdict) -> Done: ...

    async def scores(self, sheet: ScoreSheet) -> Done: ...


class LedgerSource(Protocol):
    """What follows from the public ledger (`LedgerReader`)."""

    async def ledger(self, from_outer_step: int) -> Ledger: ...

    def agreed_transfers(self, outer_step: int, hotkey: Hotkey) -> tuple[Receipt, ...]: ...


class Miners(Protocol):
    """How miners are asked (`RpcClient`)."""

    hotkey: Hotkey
    """Whose name is under the requests: the validator's own."""

    async def fetch_tensor(
        self, base_url: str, receiver: Hotkey, route: str, message: Message, *, size_bytes_max: int, timeout_s: float
    ) -> bytes: ...


class Hands:
    """What the loop needs to act."""

    def __init__(
        self,
        spec: RunSpec,
        orchestrator: Orchestrator,
        miners: Miners,
        anchors: AnchorLoader,
        chain: Chain,
        *,
        ledger: LedgerSource,
        objects: ObjectSource,
        tokens: TokenSource,
        device: torch.device,
        compute_dtype: torch.dtype,
        clock: Clock,
        shelf: BundleShelf | None = None,
        on_device: Offload,
        offload: Offload = in_thread,
    ) -> None:
        """`shelf` keeps what shows that a replay failed.
        `on_device` computes replays and reductions, one after the other; `offload` reads bodies."""
        self._spec = spec
        self._orchestrator = orchestrator
        self._miners = miners
        self._anchors = anchors
        self._ledger = ledger
        self._objects = objects
        self._chain = chain
        self._replay = partial(replay, spec=spec, tokens=tokens, device=device, compute_dtype=compute_dtype)
        self._tokens = tokens
        self._shelf = shelf
        self._clock = clock
        self._on_device = on_device
        self._offload = offload

    async def carry_out(self, effect: Effect) -> Event | None:
        """Does it, and gives the event that it ends as; a notice ends as nothing."""
        match effect:
            case FetchCommitments() | FetchLedger() | FetchMerge() | FetchSigns() | SendVerdict() | SendScores():
                return await self._ask_orchestrator(effect)
            case FetchLog():
                return await self._fetch_log(effect)
            case FetchEvidence():
                return await self._fetch_evidence(effect)
            case Replay():
                return await self._replay_task(effect.task)
            case Reduce():
                return await self._reduce(effect.task)
            case FetchMetagraph():
                return await self._read_chain(effect)
            case SetWeights():
                return await self._set_weights(effect)
            case Notice():
                return None

    async def _ask_orchestrator(self, effect: OrchestratorErrand) -> Event:
        try:
            match effect:
                case FetchCommitments():
                    return CommitmentsArrived(
                        effect.outer_step, await self._orchestrator.commitments(effect.outer_step)
                    )
                case FetchLedger():
                    return LedgerArrived(await self._ledger.ledger(effect.from_outer_step))
                case FetchMerge():
                    record = await self._orchestrator.merge(effect.stage_index, effect.outer_step)
                    return MergeArrived(record)
                case FetchSigns():
                    return await self._read_signs(effect)
                case SendVerdict():
                    await self._orchestrator.verdict(effect.verdict)
                    return VerdictSent(effect.verdict)
                case SendScores():
                    await self._orchestrator.scores(effect.sheet)
                    return ScoresSent(effect.sheet)
        except TransportError as error:
            return OrchestratorFailed(effect, str(error), retry=True)
        except (RefusedError, DataError) as error:  # a ledger that cannot be true is no ground for pay
            return OrchestratorFailed(effect, str(error), retry=_may_pass(error))

    async def _read_signs(self, effect: FetchSigns) -> SignsArrived:
        """Reads page after page; both are bounded, so that no orchestrator keeps a validator reading for ever."""
        pathways: list[Pathways] = []
        for outer_step in effect.outer_steps:
            offset = 0
            while offset < PATHWAYS_MAX:
                page = await self._orchestrator.pathways(outer_step, offset)
                if not page.pathways:
                    break
                pathways.append(page)
                offset += len(page.pathways)
        records: list[BoundaryRecord] = []
        while len(records) < MINERS_MAX:
            page_of_records = (await self._orchestrator.boundaries(records[-1].hotkey if records else None)).records
            if not page_of_records:
                break
            records.extend(page_of_records)
        return SignsArrived(effect, tuple(pathways), tuple(records))

    async def _fetch_log(self, effect: FetchLog) -> Event:
        try:
            body = await self._miners.fetch_tensor(
                effect.url,
                effect.miner,
                routes.LOG,
                effect.request,
                size_bytes_max=effect.size_bytes_max,
                timeout_s=max(_TIMEOUT_S_MIN, effect.timeout_s),
            )
        except (TransportError, RefusedError) as error:
            return LogFailed(effect.miner, effect.request.outer_step, _problem(error), str(error))
        try:
            log = await self._offload(lambda: CommittedLog.model_validate_json(body))
        except ValidationError as error:
            return LogFailed(
                effect.miner,
                effect.request.outer_step,
                FetchProblem.BAD_BODY,
                f"no log: {error.error_count()} mistakes",
            )
        agreed = self._ledger.agreed_transfers(effect.request.outer_step, effect.miner)
        return LogArrived(effect.miner, effect.request.outer_step, log, agreed)

    async def _fetch_evidence(self, effect: FetchEvidence) -> Event:
        to_stage = 1 if effect.direction is Direction.ACTIVATION else 0  # all boundaries have the same shapes
        expected = transfer_spec(self._spec, effect.direction, to_stage)
        size_bytes = body_size(expected)
        try:
            body = await self._miners.fetch_tensor(
                effect.url,
                effect.miner,
                routes.EVIDENCE,
                effect.request,
                size_bytes_max=size_bytes,
                timeout_s=max(_TIMEOUT_S_MIN, effect.timeout_s),
            )
        except (TransportError, RefusedError) as error:
            return EvidenceFailed(effect.miner, effect.request, _problem(error), str(error))

        def read() -> EvidenceArrived:
            tensors = decode(body, expected, size_bytes)
            check_finite(tensors)
            return EvidenceArrived(effect.miner, effect.request, Digest(blake3(body).hexdigest()), tensors)

        try:
            return await self._offload(read)
        except RefusedError as error:
            return EvidenceFailed(effect.miner, effect.request, FetchProblem.BAD_BODY, str(error))

    async def _replay_task(self, task: ReplayTask) -> Event:
        try:
            task, state, ahead_N = await self._start_of(task)
            uploaded = await self._fetch_contribution(task.stage_index, task.contribution)
            errors = await self._fetch_errors(task)
            replay_it = partial(self._replay, task, state, uploaded=uploaded, ahead_N=ahead_N, errors=errors)
            result, compute_s = await self._timed(replay_it)
            if result.failure is not None and self._shelf is not None:
                keep = partial(
                    self._shelf.keep,
                    task,
                    state=state,
                    uploaded=uploaded,
                    ahead_N=ahead_N,
                    errors=errors,
                    result=result,
                    spec=self._spec,
                    tokens=self._tokens,
                )
                await self._offload(keep)
        except (TransportError, RefusedError, DataError, torch.OutOfMemoryError) as error:
            return ReplayUnavailable(task.miner, task.outer_step, f"{type(error).__name__}: {error}", _may_pass(error))
        return ReplayEnded(task.miner, task.outer_step, result, compute_s)

    async def _start_of(self, task: ReplayTask) -> tuple[ReplayTask, OuterState, torch.Tensor | None]:
        """The anchor of a log's outer step, and where the log begins if that is ahead of its anchor; with the task,
        which says now what the merge before says of the miner."""
        first = task.operations[0].entry.operation if task.operations else None
        if first is not Operation.BEGIN_AHEAD or task.outer_step == 0:
            return task, await self._anchors.load(task.stage_index, task.outer_step, task.checkpoint), None
        before = await self._anchors.load(task.stage_index, task.outer_step - 1, task.checkpoint)
        record, own = await self._merge_before(task)
        slices = await self._fetch_beginning(task, record, own)
        state = await self._anchors.apply(before, record.manifest)
        num_params = before.anchor_N.numel()
        codecs = [
            slice_codec(self._spec, task.stage_index, partition)
            for partition in partition_bounds(num_params, self._spec.num_partitions)
        ]
        own_N = await self._offload(partial(join_slices, codecs, num_params, slices))
        task = replace(task, was_late=task.miner in record.manifest.late)
        return task, state, None if own_N is None else ahead_start(before, own_N, self._spec.outer)

    async def _merge_before(self, task: ReplayTask) -> tuple[MergeRecord, Contribution | None]:
        """How the outer step before was merged, and what the miner had in it, or late in the next."""
        record = await self._orchestrator.merge(task.stage_index, task.outer_step - 1)
        return record, record.announced_by(task.miner)

    async def _fetch_beginning(
        self, task: ReplayTask, record: MergeRecord, own: Contribution | None
    ) -> list[bytearray | None]:
        """What the log that begins ahead has begun from; nothing where that never came: then it counts in no merge."""
        try:
            return await self._fetch_contribution(task.stage_index, own)
        except RefusedError as error:
            if error.code is RefusalCode.NOT_FOUND and task.miner in record.manifest.late:
                return []
            raise

    async def _fetch_errors(self, task: ReplayTask) -> ErrorStates | None:
        """The miner's error states before and after; None where the codec has none, or it does not hand over what it
        told of. Raises TransportError when it cannot be asked."""
        if self._spec.codec != "topk" or task.contribution is None:
            return None
        before = None if task.outer_step == 0 else (await self._merge_before(task))[1]
        after_N = await self._fetch_error(task, task.outer_step, task.contribution.error_digest)
        if after_N is None or before is None:
            return None if after_N is None else ErrorStates(None, after_N)
        before_N = await self._fetch_error(task, task.outer_step - 1, before.error_digest)
        return None if before_N is None else ErrorStates(before_N, after_N)

    async def _fetch_error(self, task: ReplayTask, outer_step: int, digest: Digest | None) -> torch.Tensor | None:
        if digest is None:
            return None
        if task.url is None:
            raise TransportError("the miner is no member any more")
        expected = error_spec(self._spec.stage_sizes[task.stage_index])
        limits, size_bytes = self._spec.time_limits, body_size(expected)
        try:
            body = await self._miners.fetch_tensor(
                task.url,
                task.miner,
                routes.EVIDENCE,
                EvidenceRequest(
                    outer_step=outer_step, microbatch_id=MicrobatchId(0), operation=Operation.ENCODE, side="output"
                ),
                size_bytes_max=size_bytes,
                timeout_s=limits.transfer_grace_s + size_bytes / limits.bandwidth_floor_bytes_per_s,
            )
            if blake3(body).hexdigest() != digest:
                return None
            return decode(bytearray(body), expected, size_bytes)["error"]
        except RefusedError as error:
            if _may_pass(error):
                raise
            return None

    async def _fetch_contribution(self, stage_index: int, contribution: Contribution | None) -> list[bytearray | None]:
        """The objects of all partitions of what a miner uploaded, None for one of the wrong size."""
        if contribution is None:
            return []
        partitions = partition_bounds(self._spec.stage_sizes[stage_index], self._spec.num_partitions)
        refs: list[ObjectRef | None] = []
        for partition in partitions:
            codec = slice_codec(self._spec, stage_index, partition)
            found = slice_refs(codec, partition.num_params, [contribution], partition.index)
            refs.append(found.get(0))
        bodies = iter(await self._objects.get_many([ref for ref in refs if ref is not None]))
        return [None if ref is None else next(bodies) for ref in refs]

    async def _timed(self, compute: Callable[[], ResultT]) -> tuple[ResultT, float]:
        """What is computed on the device, and the seconds that it took there."""

        def measured() -> tuple[ResultT, float]:
            began_s = self._clock.monotonic_s()
            result = compute()
            return result, self._clock.monotonic_s() - began_s

        return await self._on_device(measured)

    async def _reduce(self, task: ReductionTask) -> Event:
        spec, index = self._spec, task.partition_index
        named = (task.stage_index, task.outer_step, index)
        partition = partition_bounds(spec.stage_sizes[task.stage_index], spec.num_partitions)[index]
        codec = slice_codec(spec, task.stage_index, partition)
        refs = slice_refs(codec, partition.num_params, task.contributions, index)
        try:
            bodies = dict(zip(refs, await self._objects.get_many(list(refs.values())), strict=True))
        except (TransportError, RefusedError) as error:
            return ReductionUnavailable(*named, f"{type(error).__name__}: {error}", _may_pass(error))
        slices = slices_in_order(task.contributions, bodies)
        reduce = partial(reduce_partition, codec, partition.num_params, slices, spec.mean)
        reduction, compute_s = await self._timed(reduce)
        digest = None if reduction.mean is None else reduction.mean.digest
        excluded = tuple(exclusion.hotkey for exclusion in reduction.excluded if not exclusion.age)
        excluded_late = tuple(exclusion.hotkey for exclusion in reduction.excluded if exclusion.age)
        return ReductionEnded(*named, digest, excluded, compute_s, excluded_late)

    async def _read_chain(self, effect: FetchMetagraph) -> Event:
        try:
            metagraph = await self._chain.metagraph()
            rules = await self._chain.hyperparameters()
            blocks_to_epoch = await self._chain.blocks_to_epoch()
        except (TransportError, ChainError) as error:
            return ChainFailed(effect, str(error))
        own = metagraph.neuron_of(self._miners.hotkey)
        owner = None if metagraph.owner_hotkey is None else metagraph.neuron_of(metagraph.owner_hotkey)
        view = ChainView(
            block=metagraph.block,
            block_s=rules.block_s,
            uids={neuron.hotkey: neuron.uid for neuron in metagraph.neurons},
            owner_uid=None if owner is None else owner.uid,
            has_permit=own is not None and own.validator_permit,
            next_epoch_s=None if blocks_to_epoch is None else blocks_to_epoch * rules.block_s,
            last_update_block=None if own is None else own.last_update_block,
            weights_rate_limit_blocks=rules.weights_rate_limit_blocks,
            weight_max=rules.max_weight,
        )
        return MetagraphArrived(view)

    async def _set_weights(self, effect: SetWeights) -> Event:
        try:
            try:
                await self._chain.set_weights(effect.weights)
            except ChainError as error:
                if error.retry_after_blocks is None:
                    return WeightsRefused(str(error), None)
                block_s = (await self._chain.hyperparameters()).block_s
                return WeightsRefused(str(error), error.retry_after_blocks * block_s)
        except TransportError as error:
            return ChainFailed(effect, str(error))
        return WeightsSet()


def _may_pass(error: TransportError | RefusedError | DataError | torch.OutOfMemoryError) -> bool:
    """Whether the same may go well in a while."""
    if isinstance(error, RefusedError):
        return error.retry_after_s is not None or error.code is RefusalCode.BUSY
    return not isinstance(error, DataError)


def _problem(error: TransportError | RefusedError) -> FetchProblem:
    """What an answer that did not come, or said no, means."""
    if isinstance(error, TransportError):
        return FetchProblem.UNREACHABLE
    if _may_pass(error):
        return FetchProblem.BUSY
    match error.code:
        case RefusalCode.NOT_FOUND:
            return FetchProblem.NOT_FOUND
        case RefusalCode.TOO_LARGE:
            return FetchProblem.BAD_BODY  # our own bound on the answer: no miner refuses so small a question
        case _:
            return FetchProblem.REFUSED
