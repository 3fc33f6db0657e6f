"""A miner's process in a simulation: the real core, hands, peer client, worker and engine, in virtual time.

It owns what the real loop and peer server own around them: the feed, heartbeats, wakes, offers and their answers. Jobs
take the simulated device's time and are then computed for real. A subclass may put a dishonest part in place of one.
"""

from collections.abc import Coroutine
from functools import partial
from random import Random
from typing import Any

import torch
from blake3 import blake3

from orion.common.errors import TransportError
from orion.common.ids import Direction, Hotkey
from orion.common.net.anchor_loader import AnchorLoader
from orion.common.offload import Offload, in_place
from orion.common.protocol.codec import body_size, check_finite, decode, encode, transfer_spec
from orion.common.protocol.messages import (
    Cancel,
    Done,
    Feed,
    HoldsQuery,
    Join,
    Refusal,
    RefusalCode,
    StateQuery,
)
from orion.common.protocol.records import (
    EvidenceRequest,
    LogRequest,
)
from orion.common.protocol.refusals import RefusedError, refused
from orion.common.train.engine import StageEngine
from orion.miner.boundary_monitor import BoundaryMonitor, sender_of
from orion.miner.cache import INCOMING, Parcel, Slot, TensorCache, cached_max
from orion.miner.core import MinerCore
from orion.miner.effects import (
    Accept,
    AnswerHolds,
    AskHolds,
    Compute,
    DropGraph,
    Effect,
    FreeAllButGradient,
    FreeTensors,
    PersistLog,
    ReadBody,
    RefreshFeed,
    Refuse,
    SendCancel,
    SendTensor,
)
from orion.miner.events import (
    BackwardOffered,
    BodyEnded,
    CancelArrived,
    Event,
    FeedArrived,
    ForwardOffered,
    HoldsAsked,
    StrangerAsked,
    Ticked,
)
from orion.miner.hands import Deed, Ending, Hands, failed, size_bytes_max
from orion.miner.held_objects import HeldObjects
from orion.miner.memory_archive import MemoryArchive, MemoryDisk
from orion.miner.peer_client import PeerClient
from orion.miner.state_parts import StateParts
from orion.miner.worker import DeviceWorker
from orion.simulator.clients import (
    SimulatedObjects,
    SimulatedOrchestrator,
    SimulatedRpc,
    SimulatedStatePeers,
    TensorSent,
)
from orion.simulator.clock import Timer
from orion.simulator.device import Device
from orion.simulator.host import MESSAGE_BYTES, ORCHESTRATOR, Ask, Host, Pause
from orion.simulator.network import Address, Respond
from orion.simulator.orchestrator_host import FeedQuery
from orion.simulator.tokens import SyntheticTokens
from orion.simulator.world import World

FEED_WAIT_S = 10.0
FEED_PAUSE_S = 0.5
"""Before the feed is asked for again after a failure that was not the first."""
HEARTBEAT_S = 1.0
READ_S = 0.002
"""From admission of a body until it is read and checked."""
PERSIST_S = 0.03
"""From the wish to make a log durable until it is: a disk's time."""
EVIDENCE_BYTES_MAX = 64 << 20
HOST_DEVICE = torch.device("cpu")


class MinerHost(Host):
    """One process of a miner. A restart is another one with the same hotkey, and what is durable on its disk."""

    def __init__(self, world: World, hotkey: Hotkey, device: Device, stage_wish: int | None, incarnation: int) -> None:
        """`incarnation` counts the processes that ran under this hotkey before."""
        super().__init__(hotkey, world.clock, world.network)
        self.world = world
        self.hotkey = hotkey
        self.device = device
        self.cache = TensorCache(cached_max(world.spec.flow.in_flight_max))
        self.evidence = self.make_archive()
        self.monitor = BoundaryMonitor(world.rng(f"monitor {hotkey} {incarnation}").getrandbits(63))
        self.worker = self.make_worker()
        self.core = self.make_core(world.rng(f"miner {hotkey} {incarnation}"))
        self.parts = self.make_parts()
        self._hands = self._make_hands(stage_wish)
        self._peers = PeerClient(world.spec, SimulatedRpc(hotkey), self.cache, world.clock)
        self._offers: dict[int, tuple[TensorSent, Respond]] = {}
        self._questions: dict[int, Respond] = {}
        self._num_offers = 0
        """Questions included: their ids are of one kind."""
        self._wake: Timer | None = None
        self._free_s = 0.0
        """When the device has done all that it was given."""
        self._told_ready_step: int | None = None

    # --- parts that a dishonest miner replaces ------------------------------------------------------------------------

    def make_worker(self) -> DeviceWorker:
        """What computes."""
        return DeviceWorker(
            self.world.spec,
            self.hotkey,
            cache=self.cache,
            evidence=self.evidence,
            device=HOST_DEVICE,
            compute_dtype=torch.float32,
            engine_type=self.make_engine,
        )

    def make_core(self, rng: Random) -> MinerCore:
        """What decides."""
        return MinerCore(self.world.spec, self.hotkey, rng, self.evidence.kept())

    def make_engine(self, *arguments: Any, **options: Any) -> StageEngine:
        """What runs the stage."""
        return StageEngine(*arguments, **options)

    def make_orchestrator(self) -> SimulatedOrchestrator:
        """What asks the orchestrator."""
        return SimulatedOrchestrator()

    def make_parts(self) -> StateParts:
        """What hands out the anchor."""
        return StateParts(self.worker)

    def make_archive(self) -> MemoryArchive:
        """What keeps logs and evidence."""
        return MemoryArchive(self.world.disks.setdefault(self.hotkey, MemoryDisk()), EVIDENCE_BYTES_MAX)

    def make_objects(self, orchestrator: SimulatedOrchestrator) -> SimulatedObjects:
        """What reads and writes objects."""
        return SimulatedObjects(orchestrator)

    def make_offload(self) -> Offload:
        """What computes beside the device: means, for one."""
        return in_place

    # --- the process --------------------------------------------------------------------------------------------------

    def start(self) -> None:
        super().start()
        self.spawn(self._watch_feed())
        self._beat()

    def handle(self, event: Event) -> None:
        """Gives an event to the core and carries out what it wants."""
        now_s = self.clock.now_s()
        effects = self.core.handle(event, now_s)
        self.world.handled(self, event, effects)
        for effect in effects:
            self.run_or_defer(partial(self._carry_out, effect))
        if self.core.ready_step != self._told_ready_step:
            self._told_ready_step = self.core.ready_step
            self.spawn(self._tell_heartbeat())
        self._set_wake(now_s)

    def serve(self, source: Address, request: object, respond: Respond) -> None:
        """Takes a request from a peer or a validator."""
        match request:
            case TensorSent():
                self._offered(Hotkey(source), request, respond)
            case HoldsQuery():
                self._questions[self._num_offers] = respond
                self._num_offers += 1
                self.handle(HoldsAsked(self._num_offers - 1, Hotkey(source), request))
            case Cancel():
                respond(Done(), MESSAGE_BYTES)
                self.handle(CancelArrived(Hotkey(source), request))
            case StateQuery():
                self._answer_state(Hotkey(source), request, respond)
            case LogRequest() | EvidenceRequest() if refusal := self.core.refusal_of_question(Hotkey(source)):
                respond(refusal, MESSAGE_BYTES)
                self.handle(StrangerAsked())
            case LogRequest():
                self._answer_log(request, respond)
            case EvidenceRequest():
                self._answer_evidence(request, respond)
            case _:
                raise AssertionError(f"a miner is asked {request!r}")

    def _make_hands(self, stage_wish: int | None) -> Hands:
        spec, orchestrator = self.world.spec, self.make_orchestrator()
        store = self.make_objects(orchestrator)
        objects = HeldObjects(store, store)

        async def open_tokens() -> SyntheticTokens:
            return self.world.tokens

        return Hands(
            spec,
            self.hotkey,
            join=Join(url="http://simulated", device="simulated", memory_bytes=0, stage_index=stage_wish),
            orchestrator=orchestrator,
            objects=objects,
            anchors=AnchorLoader(orchestrator, objects, spec, in_place),
            worker=self.worker,
            archive=self.evidence,
            open_tokens=open_tokens,
            on_device=in_place,
            offload=self.make_offload(),
            state_peers=SimulatedStatePeers(),
        )

    def _carry_out(self, effect: Effect) -> None:
        match effect:
            case Accept(request_id, accepted):
                self._offers.pop(request_id)[1](accepted, MESSAGE_BYTES)
            case AnswerHolds(request_id, holds):
                self._questions.pop(request_id)(holds, MESSAGE_BYTES)
            case Refuse(request_id, refusal):
                self._refuse(request_id, refusal)
            case ReadBody(request_id):
                self.after(READ_S, lambda: self.handle(BodyEnded(request_id, self._read(request_id))))
            case FreeTensors(microbatch_id):
                self.worker.free(microbatch_id)
            case FreeAllButGradient(microbatch_id):
                self.cache.free_all_but(microbatch_id, Slot.GRADIENT_OUT)
            case DropGraph(microbatch_id):
                self.worker.drop(microbatch_id)
            case AskHolds() | SendCancel() | SendTensor():
                self._go_to_peer(effect)
            case RefreshFeed():
                self.spawn(self._refresh_feed())
            case Compute():
                self.spawn(self._compute(effect))
            case PersistLog():
                self.spawn(self._persist(effect))
            case _:
                self._attempt(effect)

    def _refuse(self, request_id: int, refusal: Refusal) -> None:
        if request_id in self._questions:
            self._questions.pop(request_id)(refusal, MESSAGE_BYTES)
        else:
            self._offers.pop(request_id)[1](refusal, MESSAGE_BYTES)

    def _go_to_peer(self, effect: AskHolds | SendCancel | SendTensor) -> None:
        match effect:
            case AskHolds():
                self.spawn(self._then(self._peers.ask_holds(effect)))
            case SendCancel():
                self.spawn(self._cancel(effect))
            case SendTensor():
                self.spawn(self._then(self._peers.send(effect)))

    async def _then(self, work: Coroutine[object, object, Event]) -> None:
        self.handle(await work)

    def _attempt(self, deed: Deed) -> None:
        """Carries out a deed within its time limit; what is not done by then has failed."""
        limits = self.world.spec.time_limits
        limit_s = limits.transfer_grace_s + size_bytes_max(self.world.spec, deed) / limits.bandwidth_floor_bytes_per_s

        async def attempt() -> None:
            ending: Ending
            try:
                ending = await self._hands.attempt(deed)
            except (TransportError, RefusedError) as error:
                ending = failed(deed, error)
            timer.cancel()
            self.handle(ending)

        def give_up() -> None:
            if self.cancel(work):
                self.handle(failed(deed, TimeoutError(f"over {limit_s:g} s")))

        work = attempt()
        timer = self.after(limit_s, give_up)
        self.spawn(work)

    async def _cancel(self, effect: SendCancel) -> None:
        await self._peers.cancel(effect)

    async def _compute(self, effect: Compute) -> None:
        view = self.core.view
        self.device.is_last_stage = view is not None and view.stage_index == self.world.spec.num_stages - 1
        now_s = self.clock.now_s()
        self._free_s = max(now_s, self._free_s) + self.device.duration_s(effect.job)
        await Pause(self._free_s - now_s)
        self.handle(await self._hands.compute(effect))

    async def _persist(self, effect: PersistLog) -> None:
        await Pause(PERSIST_S)
        self.handle(await self._hands.persist(effect))

    # --- offers -------------------------------------------------------------------------------------------------------

    def _offered(self, sender: Hotkey, request: TensorSent, respond: Respond) -> None:
        request_id = self._num_offers
        self._num_offers += 1
        self._offers[request_id] = (request, respond)
        offered = ForwardOffered if request.transfer.direction is Direction.ACTIVATION else BackwardOffered
        self.handle(offered(request_id, sender, request.transfer))

    def _read(self, request_id: int) -> Refusal | None:
        """Checks an admitted body and puts it in the cache; what is wrong with it, if anything."""
        request, _ = self._offers[request_id]
        transfer = request.transfer
        expected = transfer_spec(self.world.spec, transfer.direction, transfer.to_stage)
        try:
            if len(request.body) != transfer.size_bytes or transfer.size_bytes != body_size(expected):
                raise refused(RefusalCode.BAD_TENSOR, f"{len(request.body)} bytes are not this run's tensors")
            if blake3(request.body).hexdigest() != transfer.digest:
                raise refused(RefusalCode.DIGEST_MISMATCH, "the body is not what the transfer says")
            tensors = decode(request.body, expected, transfer.size_bytes)
            check_finite(tensors)
            body = encode(tensors)
            if body.digest != transfer.digest:
                raise refused(RefusalCode.BAD_TENSOR, "the body is not in the canonical layout")
        except RefusedError as error:
            self.monitor.refused(sender_of(transfer), transfer.direction, error.refusal.code)
            return error.refusal
        name = "z" if transfer.direction is Direction.ACTIVATION else "g"
        self.monitor.took(sender_of(transfer), transfer.direction, self.monitor.measure(tensors[name]))
        self.cache.put(transfer.microbatch_id, INCOMING[transfer.direction], Parcel(tensors, body))
        return None

    # --- validators ---------------------------------------------------------------------------------------------------

    def _answer_state(self, source: Hotkey, query: StateQuery, respond: Respond) -> None:
        refusal = self.core.refusal_of_state(source, query.stage_index)
        body = None if refusal is not None else self.parts.answer(query)
        if body is None:
            respond(refusal or Refusal(code=RefusalCode.NOT_FOUND, message="stands elsewhere"), MESSAGE_BYTES)
        else:
            respond(body, MESSAGE_BYTES + len(body))

    def _answer_log(self, request: LogRequest, respond: Respond) -> None:
        log = self.core.log_answer(request)
        if log is None:
            respond(Refusal(code=RefusalCode.NOT_FOUND, message="no such log"), MESSAGE_BYTES)
            return
        body = log.model_dump_json().encode()
        respond(body, len(body))

    def _answer_evidence(self, request: EvidenceRequest, respond: Respond) -> None:
        body = self.evidence.get(request) if self.core.may_show(request) else None
        if body is None:
            respond(Refusal(code=RefusalCode.NOT_FOUND, message="no such evidence"), MESSAGE_BYTES)
            return
        respond(body, len(body))

    # --- loops --------------------------------------------------------------------------------------------------------

    async def _watch_feed(self) -> None:
        version, wait_s, num_failed = 0, 0.0, 0
        while not self.core.is_finished:
            feed = await Ask(ORCHESTRATOR, FeedQuery(version, wait_s), timeout_s=FEED_WAIT_S + FEED_PAUSE_S)
            if not isinstance(feed, Feed):
                num_failed += 1
                if num_failed > 1:
                    await Pause(FEED_PAUSE_S)
                continue
            version, wait_s, num_failed = feed.version, FEED_WAIT_S, 0
            self.handle(FeedArrived(feed))

    async def _refresh_feed(self) -> None:
        feed = await Ask(ORCHESTRATOR, FeedQuery(0, 0.0))
        if isinstance(feed, Feed):
            self.handle(FeedArrived(feed))

    def _beat(self) -> None:
        self.spawn(self._tell_heartbeat())
        self.after(HEARTBEAT_S, self._beat)

    async def _tell_heartbeat(self) -> None:
        view = self.core.view
        if view is None or self.core.run_is_over:
            return
        boundary = self.monitor.due_report(view.stage.outer_step, view.stage.phase)
        answer = await Ask(ORCHESTRATOR, self.core.heartbeat(tokens_per_s=0.0, busy_share=0.0, boundary=boundary))
        if boundary is not None and isinstance(answer, Done):
            self.monitor.reported()

    def _set_wake(self, now_s: float) -> None:
        """One timer, for the earliest time at which the core has something to do by itself."""
        wake_s = self.core.next_wake_s(now_s)
        if wake_s is None or (self._wake is not None and now_s < self._wake.at_s <= wake_s):
            return
        if self._wake is not None:
            self._wake.cancel()
        self._wake = self.clock.schedule_at(wake_s, lambda: self.run_or_defer(lambda: self.handle(Ticked())))
