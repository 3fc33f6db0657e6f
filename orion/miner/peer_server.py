"""What other miners and validators ask of this one, over HTTP.

Owns how requests are read and answered; whether a tensor is taken is the core's decision, made before the body is read,
so that a refused one costs a header. Everything is bounded: bodies by the run's shapes, requests for logs and evidence
by their number at a time.
"""

import asyncio
from functools import partial

from aiohttp import web

from orion.common.config import RunSpec
from orion.common.ids import Direction, Hotkey
from orion.common.net.aiohttp_server import add_tensor_route, build_app, json_answer, signed_json, signed_transfer
from orion.common.net.gate import Gate
from orion.common.net.tensor_request import TensorRequest
from orion.common.net.tensor_server import receive_body, tensor_answer
from orion.common.protocol import routes
from orion.common.protocol.codec import transfer_spec
from orion.common.protocol.messages import (
    Accepted,
    Cancel,
    Done,
    HoldsQuery,
    Refusal,
    RefusalCode,
    StateQuery,
    Transfer,
)
from orion.common.protocol.records import (
    EvidenceRequest,
    LogRequest,
)
from orion.common.protocol.refusals import RefusedError, refused
from orion.miner.archive import Archive
from orion.miner.boundary_monitor import BoundaryMonitor, sender_of
from orion.miner.cache import INCOMING, Parcel, TensorCache
from orion.miner.core import MinerCore
from orion.miner.desk import Answer, Desk
from orion.miner.effects import Accept, AnswerHolds, ReadBody, Refuse
from orion.miner.events import BackwardOffered, BodyEnded, CancelArrived, ForwardOffered, HoldsAsked, StrangerAsked
from orion.miner.state_parts import PARTS_AT_ONCE, StateParts

QUESTIONS_MAX = 8
"""Logs and evidence that are being handed out at a time; validators come again."""
QUESTION_RETRY_S = 1.0
MEASURE_INLINE_BYTES_MAX = 4 * 1024 * 1024
"""Larger bodies are measured in a thread: it takes a millisecond for this many bytes."""
BODY_GRACE_S = 5.0
"""What a body may take to arrive, beyond its bytes ÷ the run's slowest bandwidth."""


class PeerServer:
    """The HTTP side of one miner."""

    def __init__(
        self,
        spec: RunSpec,
        gate: Gate,
        *,
        core: MinerCore,
        desk: Desk,
        cache: TensorCache,
        archive: Archive,
        monitor: BoundaryMonitor,
        parts: StateParts | None = None,
    ) -> None:
        """`parts`: what is handed out of the anchor; None: nothing is."""
        self._spec = spec
        self._gate = gate
        self._core = core
        self._desk = desk
        self._cache = cache
        self._archive = archive
        self._monitor = monitor
        self._parts = parts
        self._questions = asyncio.Semaphore(QUESTIONS_MAX)
        self._part_reads = asyncio.Semaphore(PARTS_AT_ONCE)
        self.app = build_app(gate)
        add_tensor_route(self.app, routes.FORWARD, partial(self._offered, direction=Direction.ACTIVATION))
        add_tensor_route(self.app, routes.BACKWARD, partial(self._offered, direction=Direction.GRADIENT))
        self.app.router.add_post(routes.CANCEL, self._cancel)
        self.app.router.add_post(routes.HOLDS, self._holds)
        self.app.router.add_post(routes.LOG, self._log)
        self.app.router.add_post(routes.EVIDENCE, self._evidence_body)
        self.app.router.add_post(routes.STATE, self._state)
        self.app.router.add_get(routes.HEALTH, self._health)

    async def _offered(self, request: TensorRequest, direction: Direction) -> Accepted:
        sender, transfer = signed_transfer(self._gate, request)
        if transfer.direction is not direction:
            raise refused(RefusalCode.MALFORMED, f"this route takes no {transfer.direction}")
        answer = await self._desk.ask(self._offer(sender, transfer))
        if isinstance(answer, ReadBody):
            answer = await self._read_body(request, answer.request_id, transfer)
        match answer:
            case Accept(_, accepted):
                return accepted
            case Refuse(_, refusal):
                raise RefusedError(refusal)
            case _:
                raise AssertionError(f"the core answered an offer with {answer}")

    def _offer(self, sender: Hotkey, transfer: Transfer) -> ForwardOffered | BackwardOffered:
        request_id = self._desk.new_request_id()
        if transfer.direction is Direction.ACTIVATION:
            return ForwardOffered(request_id, sender, transfer)
        return BackwardOffered(request_id, sender, transfer)

    async def _read_body(self, request: TensorRequest, request_id: int, transfer: Transfer) -> Answer:
        """Takes the body in; whatever happens, the core hears how that ended."""
        try:
            parcel = await self._receive(request, transfer)
            self._cache.put(transfer.microbatch_id, INCOMING[transfer.direction], parcel)
        except RefusedError as error:
            self._monitor.refused(sender_of(transfer), transfer.direction, error.refusal.code)
            return await self._desk.ask(BodyEnded(request_id, error.refusal))
        except BaseException:
            aborted = Refusal(code=RefusalCode.MALFORMED, message="the request was broken off")
            await self._desk.post(BodyEnded(request_id, aborted))
            raise
        answer = await self._desk.ask(BodyEnded(request_id, None))
        if isinstance(answer, Accept):
            await self._observe(transfer, parcel)
        return answer

    async def _observe(self, transfer: Transfer, parcel: Parcel) -> None:
        """Measures what came in, after the device was told of it: nothing waits for this but the sender's answer."""
        tensor = parcel.tensors["z" if transfer.direction is Direction.ACTIVATION else "g"]
        if parcel.body.size_bytes > MEASURE_INLINE_BYTES_MAX:
            summary = await asyncio.to_thread(self._monitor.measure, tensor)
        else:
            summary = self._monitor.measure(tensor)
        self._monitor.took(sender_of(transfer), transfer.direction, summary)

    async def _receive(self, request: TensorRequest, transfer: Transfer) -> Parcel:
        expected = transfer_spec(self._spec, transfer.direction, transfer.to_stage)
        timeout_s = BODY_GRACE_S + transfer.size_bytes / self._spec.time_limits.bandwidth_floor_bytes_per_s
        return Parcel(*await receive_body(request, transfer, expected, timeout_s=timeout_s))

    async def _cancel(self, request: web.Request) -> web.StreamResponse:
        sender, cancel = await signed_json(request, Cancel)
        if self._core.view is None or sender not in self._core.view.peers:
            raise refused(RefusalCode.FORBIDDEN, "the sender is no member of the run")
        await self._desk.post(CancelArrived(sender, cancel))
        return json_answer(Done())

    async def _holds(self, request: web.Request) -> web.StreamResponse:
        sender, query = await signed_json(request, HoldsQuery)
        answer = await self._desk.ask(HoldsAsked(self._desk.new_request_id(), sender, query))
        match answer:
            case AnswerHolds(_, holds):
                return json_answer(holds)
            case Refuse(_, refusal):
                raise RefusedError(refusal)
            case _:
                raise AssertionError(f"the core answered a question with {answer}")

    async def _log(self, request: web.Request) -> web.StreamResponse:
        sender, question = await signed_json(request, LogRequest)
        await self._require_room(sender)
        async with self._questions:
            log = self._core.log_answer(question)
            if log is None:
                raise refused(RefusalCode.NOT_FOUND, f"no such log of outer step {question.outer_step}")
            return json_answer(log)

    async def _evidence_body(self, request: web.Request) -> web.StreamResponse:
        sender, question = await signed_json(request, EvidenceRequest)
        await self._require_room(sender)
        async with self._questions:
            # Before the commitment nobody sees what was computed, or it could be copied.
            body = None
            if self._core.may_show(question):
                body = await asyncio.to_thread(self._archive.get, question)
            if body is None:
                raise refused(RefusalCode.NOT_FOUND, "that tensor is not kept")
            return tensor_answer(body)

    async def _state(self, request: web.Request) -> web.StreamResponse:
        """For other replicas: those who join fetch the anchor from those who hold it."""
        sender, query = await signed_json(request, StateQuery)
        refusal = self._core.refusal_of_state(sender, query.stage_index)
        if refusal is not None:
            raise RefusedError(refusal)
        answer = None
        if self._parts is not None:
            async with self._part_reads:
                answer = await asyncio.to_thread(self._parts.answer, query)
        if answer is None:
            raise refused(RefusalCode.NOT_FOUND, f"does not stand on that state of outer step {query.outer_step}")
        return tensor_answer(answer)

    async def _require_room(self, sender: Hotkey) -> None:
        """Refuses who is no validator, for now: a permit may have come that the feed does not show yet."""
        refusal = self._core.refusal_of_question(sender)
        if refusal is not None:
            await self._desk.post(StrangerAsked())
            raise RefusedError(refusal)
        if self._questions.locked():
            raise refused(RefusalCode.BUSY, "too many questions at a time", QUESTION_RETRY_S)

    async def _health(self, _: web.Request) -> web.StreamResponse:
        view = self._core.view
        return web.json_response(
            {
                "stage_index": None if view is None else view.stage_index,
                "state": None if view is None else view.state,
                "phase": None if view is None else view.stage.phase,
                "outer_step": None if view is None else view.stage.outer_step,
            }
        )
