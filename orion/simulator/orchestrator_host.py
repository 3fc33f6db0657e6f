"""The orchestrator's process in a simulation: the real core between a simulated network, store, chain and journal.

It owns what the real loop and API own around the core: the queue of events, the journal's commits and snapshots,
requests and their answers, the long-poll, ticks, looks at the store. Every event is in the journal before the core sees
it, so a new process that begins from the journal stands where this one stood when it ended.
"""

from dataclasses import dataclass
from functools import partial

from orion.common.ids import Hotkey
from orion.common.protocol.entries import EntriesQuery
from orion.common.protocol.messages import (
    Done,
    GrantRequest,
    Grants,
    ManifestQuery,
    Message,
    ObjectRef,
    Refusal,
    RefusalCode,
    StageState,
    UploadRequest,
)
from orion.common.protocol.records import (
    BoundaryQuery,
    CommitmentQuery,
    LedgerQuery,
    LossQuery,
    MergeQuery,
    PathwayQuery,
)
from orion.common.protocol.refusals import RefusedError
from orion.orchestrator.connections import FeedConnections
from orion.orchestrator.core import OrchestratorCore
from orion.orchestrator.events import (
    Announce,
    Answer,
    CheckObject,
    ConnectionLost,
    ConnectionSeen,
    DeleteObjects,
    Effect,
    Event,
    MetagraphUpdated,
    Neuron,
    ObjectChecked,
    Recorded,
    Refuse,
    RequestArrived,
    Resumed,
    Ticked,
)
from orion.orchestrator.journal import MemoryJournal, Record, Snapshot
from orion.orchestrator.ledger_store import MemoryLedger
from orion.orchestrator.replay import replay
from orion.simulator.clock import Timer
from orion.simulator.host import MESSAGE_BYTES, ORCHESTRATOR, RECORD_BYTES, Host, wire_bytes
from orion.simulator.network import Address, Respond
from orion.simulator.network import Host as NetworkHost
from orion.simulator.world import World

TICK_S = 0.25
COMMIT_S = 0.002
"""From an event's being in the journal until it is decided; others gather meanwhile."""
SNAPSHOT_EVENTS = 1_000
"""Between two snapshots: often, so that restarts here begin at some."""
LOOK_S = 0.005
"""What a look at the store takes."""
METAGRAPH_S = 2.0
"""Between two looks at the chain."""
GRANT_S = 600.0
"""How long a grant holds."""
NOBODY = Hotkey("1" * 48)
"""Asks for the feed as an onlooker."""


@dataclass(frozen=True, slots=True)
class FeedQuery:
    """The long-poll: answered once the version is above `since`, or after `wait_s`."""

    since: int
    wait_s: float


@dataclass(slots=True, eq=False)
class _Waiter:
    hotkey: Hotkey
    process: NetworkHost | None
    respond: Respond
    timer: Timer


Query = (
    CommitmentQuery
    | LedgerQuery
    | EntriesQuery
    | LossQuery
    | PathwayQuery
    | BoundaryQuery
    | ManifestQuery
    | MergeQuery
    | GrantRequest
    | UploadRequest
)


class OrchestratorHost(Host):
    """One process of the orchestrator. A restart is another one with the same journal and ledger."""

    def __init__(self, world: World, journal: MemoryJournal, ledger: MemoryLedger) -> None:
        super().__init__(ORCHESTRATOR, world.clock, world.network)
        self._world = world
        self._journal = journal
        self.core = OrchestratorCore(world.spec, world.rng("orchestrator"))
        self.next_sequence = 0
        """Of the next event that the core decides."""
        self._queue: list[Event] = []
        self._is_committing = False
        self._waiters: list[_Waiter] = []
        self._connections = FeedConnections()
        """A process has one connection here, named by its host."""
        self.on_broken = self._broken
        self._open: dict[int, Respond] = {}
        self._num_requests = 0
        self._neurons: tuple[Neuron, ...] = ()
        self.ledger = ledger
        self._since_snapshot = 0

    def start(self) -> None:
        """Comes up: replays the journal, then resumes where it ended."""
        super().start()
        replayed = replay(self.core, self._journal, self.ledger)
        self.next_sequence, self._since_snapshot = replayed.next_sequence, replayed.num_events
        if self.next_sequence:
            self.handle(Resumed())
        self._look_at_chain()
        self._tick()

    def handle(self, event: Event) -> None:
        """Queues an event; it is journaled with the others that have gathered, then decided."""
        self._queue.append(event)
        if not self._is_committing:
            self._commit()

    def serve(self, source: Address, request: object, respond: Respond) -> None:
        """Takes a request; what the core decides is answered by its effect, queries at once."""
        hotkey = Hotkey(source)
        if isinstance(request, FeedQuery):
            self._feed_asked(hotkey, request, respond)
        elif isinstance(request, Query):
            answer = self._query(hotkey, request)
            respond(answer, wire_bytes(answer))
        else:
            request_id = self._num_requests
            self._num_requests += 1
            self._open[request_id] = respond
            self.handle(RequestArrived.model_validate({"request_id": request_id, "hotkey": hotkey, "message": request}))

    def stage_states(self) -> tuple[StageState, ...]:
        """Where each stage is."""
        return self.core.feed(NOBODY, self.clock.now_s()).stages

    # --- events -------------------------------------------------------------------------------------------------------

    def _commit(self) -> None:
        now_s = self.clock.now_s()
        records = [Record(self.next_sequence + place, now_s, event) for place, event in enumerate(self._queue)]
        self._queue.clear()
        self._journal.append(records)
        self._is_committing = True
        self.after(COMMIT_S, lambda: self._decide(records))

    def _decide(self, records: list[Record]) -> None:
        for record in records:
            effects = self.core.handle(record.event, record.now_s)
            self.next_sequence = record.sequence + 1
            self._world.handled(self, record.event, effects)
            for effect in effects:
                self._carry_out(effect)
        self._since_snapshot += len(records)
        if self._since_snapshot >= SNAPSHOT_EVENTS:
            self._since_snapshot = 0
            now_s, state = records[-1].now_s, self.core.snapshot()
            self._journal.keep(Snapshot.of(self.next_sequence, now_s, self.core.num_entries, state))
        self._is_committing = False
        if self._queue:
            self._commit()

    def _carry_out(self, effect: Effect) -> None:
        match effect:
            case Answer(request_id, message):
                self._answer(request_id, message)
            case Refuse(request_id, refusal):
                self._answer(request_id, refusal)
            case CheckObject(ref):
                self.after(LOOK_S, partial(self._look, ref))
            case DeleteObjects(prefix):
                self._world.store.delete(prefix)
            case Announce():
                self._announce()
            case Recorded():
                self.ledger.append([effect])

    def _answer(self, request_id: int, message: Message) -> None:
        respond = self._open.pop(request_id, None)
        if respond is not None:  # one that was asked before a restart is waited for by nobody
            respond(message, wire_bytes(message))

    def _look(self, ref: ObjectRef) -> None:
        self.handle(ObjectChecked(ref=ref, durable=self._world.store.is_durable(ref)))

    # --- queries ------------------------------------------------------------------------------------------------------

    def _query(self, hotkey: Hotkey, query: Query) -> Message:
        core = self.core
        if not core.is_registered(hotkey):
            return Refusal(code=RefusalCode.FORBIDDEN, message="this hotkey is not registered on the subnet")
        match query:
            case CommitmentQuery():
                return core.commitments(query)
            case LedgerQuery():
                return core.ledger(query)
            case EntriesQuery():
                return self.ledger.page(query.from_sequence).to_message()
            case LossQuery() | BoundaryQuery() | PathwayQuery():
                return self._observed(query)
            case ManifestQuery():
                return core.manifests(query)
            case MergeQuery() | GrantRequest() | UploadRequest():
                return self._may_refuse(hotkey, query)

    def _observed(self, query: LossQuery | BoundaryQuery | PathwayQuery) -> Message:
        match query:
            case LossQuery():
                return self.core.losses(query)
            case BoundaryQuery():
                return self.core.boundaries(query)
            case PathwayQuery():
                return self.core.pathways(query)

    def _may_refuse(self, hotkey: Hotkey, request: MergeQuery | GrantRequest | UploadRequest) -> Message:
        """What is granted is the key itself: the simulated store has no URLs."""
        try:
            if isinstance(request, MergeQuery):
                return self.core.merge(request)
            self.core.check_grant(hotkey, request)
        except RefusedError as error:
            return error.refusal
        if isinstance(request, UploadRequest):
            return Done()
        return Grants(urls=request.keys, expires_s=self.clock.now_s() + GRANT_S)

    def _feed_asked(self, hotkey: Hotkey, query: FeedQuery, respond: Respond) -> None:
        process = self.network.host(hotkey)
        if process is not None:
            self._connections.opened(process)
        self._hint(self._connections.asked(hotkey, process, self.clock.monotonic_s()))
        if self.core.version > query.since:
            self._answer_feed(hotkey, process, respond)
            return
        timer = self.clock.schedule(query.wait_s, lambda: self._wait_ended(waiter))
        waiter = _Waiter(hotkey, process, respond, timer)
        self._waiters.append(waiter)

    def _broken(self, process: NetworkHost) -> None:
        self._hint(self._connections.broke_off(process))

    def _hint(self, event: ConnectionLost | ConnectionSeen | None) -> None:
        if event is not None and self.is_alive and self.core.is_present(event.hotkey):
            self.handle(event)

    def _wait_ended(self, waiter: _Waiter) -> None:
        if self.is_alive and waiter in self._waiters:
            self._waiters.remove(waiter)
            self._answer_feed(waiter.hotkey, waiter.process, waiter.respond)

    def _announce(self) -> None:
        waiters, self._waiters = self._waiters, []
        for waiter in waiters:
            waiter.timer.cancel()
            self._answer_feed(waiter.hotkey, waiter.process, waiter.respond)

    def _answer_feed(self, hotkey: Hotkey, process: NetworkHost | None, respond: Respond) -> None:
        self._connections.answered(hotkey, process, self.clock.monotonic_s())
        feed = self.core.feed(hotkey, self.clock.now_s())
        respond(feed, MESSAGE_BYTES + RECORD_BYTES * (len(feed.peers) + len(feed.stages)))

    # --- what nobody asks for -----------------------------------------------------------------------------------------

    def _tick(self) -> None:
        self.handle(Ticked())
        self.after(TICK_S, self._tick)

    def _look_at_chain(self) -> None:
        neurons = tuple(
            Neuron(hotkey=neuron.hotkey, validator_permit=neuron.validator_permit)
            for neuron in self._world.metagraph().neurons
        )
        if neurons != self._neurons:
            self._neurons = neurons
            self.handle(MetagraphUpdated(neurons=neurons))
        self.after(METAGRAPH_S, self._look_at_chain)
