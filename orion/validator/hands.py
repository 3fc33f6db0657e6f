"""Carries out the core's effects: requests to the orchestrator, the miners and the chain, and replays.

Owns what each failure means as an event. Decides nothing else and keeps no state but the one thread in which replays
are computed. Every effect ends as exactly one event, whatever happens; only a mistake of our own raises.
"""

import asyncio
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import TypeVar

import torch
from blake3 import blake3
from pydantic import ValidationError

from orion.common.config import RunSpec
from orion.common.errors import DataError, TransportError
from orion.common.ids import Digest, Direction
from orion.common.net.anchor_loader import AnchorLoader
from orion.common.net.chain import Chain, ChainError
from orion.common.net.orchestrator_client import OrchestratorClient
from orion.common.protocol import routes
from orion.common.protocol.codec import body_size, check_finite, decode, transfer_spec
from orion.common.protocol.messages import CommittedLog, LogRequest, RefusalCode
from orion.common.protocol.refusals import RefusedError
from orion.common.train.outer import OuterState
from orion.validator.events import (
    ChainFailed,
    ChainView,
    CommitmentsArrived,
    Effect,
    Event,
    EvidenceArrived,
    EvidenceFailed,
    FetchCommitments,
    FetchEvidence,
    FetchLedger,
    FetchLog,
    FetchMetagraph,
    FetchProblem,
    LedgerArrived,
    LogArrived,
    LogFailed,
    MetagraphArrived,
    Notice,
    OrchestratorFailed,
    Replay,
    ReplayEnded,
    ReplayResult,
    ReplayTask,
    ReplayUnavailable,
    SendVerdict,
    SetWeights,
    VerdictSent,
    WeightsRefused,
    WeightsSet,
)
from orion.validator.replay import TokenSource, replay

_TIMEOUT_S_MIN = 0.1
"""Of a request whose deadline is about to pass; zero would mean none to the HTTP client."""

ResultT = TypeVar("ResultT")


class Hands:
    """What the loop needs to act. Close it in the end: the replay thread goes with it."""

    def __init__(
        self,
        spec: RunSpec,
        orchestrator: OrchestratorClient,
        anchors: AnchorLoader,
        chain: Chain,
        *,
        tokens: TokenSource,
        device: torch.device,
        compute_dtype: torch.dtype,
        weights_version_key: int,
    ) -> None:
        self._spec = spec
        self._orchestrator = orchestrator
        self._anchors = anchors
        self._chain = chain
        self._weights_version_key = weights_version_key
        self._replay = partial(replay, spec=spec, tokens=tokens, device=device, compute_dtype=compute_dtype)
        self._device_thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="replay")

    def close(self) -> None:
        """Ends the replay thread once what it computes is through."""
        self._device_thread.shutdown(wait=True, cancel_futures=True)

    async def carry_out(self, effect: Effect) -> Event | None:
        """Does it, and gives the event that it ends as; a notice ends as nothing."""
        match effect:
            case FetchCommitments() | FetchLedger() | SendVerdict():
                return await self._ask_orchestrator(effect)
            case FetchLog():
                return await self._fetch_log(effect)
            case FetchEvidence():
                return await self._fetch_evidence(effect)
            case Replay():
                return await self._replay_task(effect.task)
            case FetchMetagraph():
                return await self._read_chain(effect)
            case SetWeights():
                return await self._set_weights(effect)
            case Notice():
                return None

    async def _ask_orchestrator(self, effect: FetchCommitments | FetchLedger | SendVerdict) -> Event:
        try:
            match effect:
                case FetchCommitments():
                    return CommitmentsArrived(
                        effect.outer_step, await self._orchestrator.commitments(effect.outer_step)
                    )
                case FetchLedger():
                    return LedgerArrived(await self._orchestrator.ledger(effect.from_outer_step))
                case SendVerdict():
                    await self._orchestrator.verdict(effect.verdict)
                    return VerdictSent(effect.verdict)
        except TransportError as error:
            return OrchestratorFailed(effect, str(error), retry=True)
        except RefusedError as error:
            return OrchestratorFailed(effect, str(error), retry=error.retry_after_s is not None)

    async def _fetch_log(self, effect: FetchLog) -> Event:
        try:
            body = await self._orchestrator.rpc.fetch_tensor(
                effect.url,
                effect.miner,
                routes.LOG,
                LogRequest(outer_step=effect.outer_step),
                size_bytes_max=effect.size_bytes_max,
                timeout_s=max(_TIMEOUT_S_MIN, effect.timeout_s),
            )
        except (TransportError, RefusedError) as error:
            return LogFailed(effect.miner, effect.outer_step, _problem(error), str(error))
        try:
            log = await asyncio.to_thread(CommittedLog.model_validate_json, body)
        except ValidationError as error:
            return LogFailed(
                effect.miner, effect.outer_step, FetchProblem.BAD_BODY, f"no log: {error.error_count()} mistakes"
            )
        return LogArrived(effect.miner, effect.outer_step, log)

    async def _fetch_evidence(self, effect: FetchEvidence) -> Event:
        to_stage = 1 if effect.direction is Direction.ACTIVATION else 0  # all boundaries have the same shapes
        expected = transfer_spec(self._spec, effect.direction, to_stage)
        size_bytes = body_size(expected)
        try:
            body = await self._orchestrator.rpc.fetch_tensor(
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
            return await asyncio.to_thread(read)
        except RefusedError as error:
            return EvidenceFailed(effect.miner, effect.request, FetchProblem.BAD_BODY, str(error))

    async def _replay_task(self, task: ReplayTask) -> Event:
        try:
            state = await self._anchors.load(task.stage_index, task.outer_step, task.checkpoint)
            result = await self._compute(task, state)
        except (TransportError, RefusedError, DataError, torch.OutOfMemoryError) as error:
            return ReplayUnavailable(task.miner, task.outer_step, f"{type(error).__name__}: {error}")
        return ReplayEnded(task.miner, task.outer_step, result)

    async def _compute(self, task: ReplayTask, state: OuterState) -> ReplayResult:
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._device_thread, self._replay, task, state)

    async def _read_chain(self, effect: FetchMetagraph) -> Event:
        try:
            metagraph = await self._chain.metagraph()
            rules = await self._chain.hyperparameters()
        except (TransportError, ChainError) as error:
            return ChainFailed(effect, str(error))
        own = metagraph.neuron_of(self._orchestrator.rpc.hotkey)
        owner = None if metagraph.owner_hotkey is None else metagraph.neuron_of(metagraph.owner_hotkey)
        view = ChainView(
            block=metagraph.block,
            block_s=rules.block_s,
            uids={neuron.hotkey: neuron.uid for neuron in metagraph.neurons},
            owner_uid=None if owner is None else owner.uid,
            has_permit=own is not None and own.validator_permit,
            epoch_s=rules.tempo * rules.block_s,
            last_update_block=None if own is None else own.last_update_block,
            weights_rate_limit_blocks=rules.weights_rate_limit_blocks,
            weight_max=rules.max_weight,
        )
        return MetagraphArrived(view)

    async def _set_weights(self, effect: SetWeights) -> Event:
        hotkey = self._orchestrator.rpc.hotkey
        try:
            try:
                await self._chain.set_weights(hotkey, effect.weights, version_key=self._weights_version_key)
            except ChainError as error:
                if error.retry_after_blocks is None:
                    return WeightsRefused(str(error), None)
                block_s = (await self._chain.hyperparameters()).block_s
                return WeightsRefused(str(error), error.retry_after_blocks * block_s)
        except TransportError as error:
            return ChainFailed(effect, str(error))
        return WeightsSet()


def _problem(error: TransportError | RefusedError) -> FetchProblem:
    """What an answer that did not come, or said no, means."""
    if isinstance(error, TransportError):
        return FetchProblem.UNREACHABLE
    if error.retry_after_s is not None or error.code is RefusalCode.BUSY:
        return FetchProblem.BUSY
    match error.code:
        case RefusalCode.NOT_FOUND:
            return FetchProblem.NOT_FOUND
        case RefusalCode.TOO_LARGE:
            return FetchProblem.BAD_BODY  # our own bound on the answer: no miner refuses so small a question
        case _:
            return FetchProblem.REFUSED
