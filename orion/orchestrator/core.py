"""`OrchestratorCore`: everything that the orchestrator decides.

Synchronous and deterministic: events and the time come in, effects go out; the same events give the same state and
effects on any machine. It reads no clock, waits for nothing and touches no network, disk or global random generator.
The rules are in `requests` and `reports` (what somebody asks for), `phases` (what is due), `suspicion` (whose
connection broke off), `grants` (who may read and write); the state they work on is `state`.
"""

import random
from collections.abc import Callable
from typing import TypeVar

from orion.common.config import RunSpec
from orion.common.ids import Digest, Hotkey
from orion.common.protocol.messages import (
    Feed,
    ManifestQuery,
    Manifests,
)
from orion.common.protocol.pay import MinerPay
from orion.common.protocol.records import (
    Boundaries,
    BoundaryQuery,
    CommitmentQuery,
    Commitments,
    Ledger,
    LedgerQuery,
    Losses,
    LossQuery,
    MergeQuery,
    MergeRecord,
    PathwayQuery,
    Pathways,
    RunStatus,
)
from orion.common.protocol.refusals import RefusedError
from orion.orchestrator import grants, suspicion, views
from orion.orchestrator.events import (
    Announce,
    Answer,
    ConnectionLost,
    ConnectionSeen,
    Effect,
    Event,
    MetagraphUpdated,
    ObjectChecked,
    Refuse,
    RequestArrived,
    Resumed,
    Ticked,
)
from orion.orchestrator.figures import stage_figures
from orion.orchestrator.invariants import check_invariants
from orion.orchestrator.phases import advance, pass_time
from orion.orchestrator.requests import answer
from orion.orchestrator.resume import resume
from orion.orchestrator.stages import Applying
from orion.orchestrator.state import RunState

Seen = TypeVar("Seen")


class OrchestratorCore:
    """One run."""

    def __init__(self, spec: RunSpec, rng: random.Random) -> None:
        """One draw is taken from `rng`: the secret behind all later draws, so that no two runs draw alike."""
        self._state = RunState(spec, stage_figures(spec), rng.getrandbits(63))
        self._feed_parts = views.feed_parts(self._state)

    @property
    def spec(self) -> RunSpec:
        return self._state.spec

    @property
    def version(self) -> int:
        """Of the feed; grows with every change that it shows."""
        return self._state.memory.version

    def handle(self, event: Event, now_s: float) -> list[Effect]:
        """Takes one event. Times before the newest event's count as that one's."""
        state = self._state
        before_s = state.memory.now_s
        state.memory.now_s = max(before_s, now_s)
        state.open_ledger()
        match event:
            case RequestArrived():
                state.outbox.append(self._answer(event))
            case ObjectChecked():
                if state.memory.objects.checked(event.ref, event.durable):
                    state.look_again()
            case MetagraphUpdated():
                before = state.validators
                state.memory.permits = {neuron.hotkey: neuron.validator_permit for neuron in event.neurons}
                if state.validators != before:
                    state.changed()
            case ConnectionLost():
                suspicion.connection_lost(state, event)
            case ConnectionSeen():
                suspicion.connection_seen(state, event.hotkey)
            case Ticked():
                pass_time(state)
                state.look_again()
            case Resumed():
                resume(state, state.memory.now_s - before_s)
                pass_time(state)
        if state.rules_due:
            advance(state)
        return self._drain()

    def _answer(self, event: RequestArrived) -> Answer | Refuse:
        try:
            return Answer(event.request_id, answer(self._state, event.hotkey, event.message, event.proof))
        except RefusedError as error:
            return Refuse(event.request_id, error.refusal)

    def _drain(self) -> list[Effect]:
        state = self._state
        if state.feed_changed:
            state.memory.version += 1
            state.outbox.append(Announce(state.memory.version))
        effects = state.outbox
        state.outbox, state.feed_changed, state.rules_due = [], False, False
        return effects

    # --- views: they change nothing ---

    def look(self, view: Callable[[RunState], Seen]) -> Seen:
        """What a pure function makes of the state, which it must not change or keep: for the dashboard."""
        return view(self._state)

    @property
    def num_notices(self) -> int:
        """Notices ever given."""
        return self._state.memory.num_notices

    def notices_after(self, number: int) -> list[str]:
        """The notices that came after the first `number` ones, as far as they are kept."""
        num_new = self.num_notices - number
        return list(self._state.memory.notices)[-num_new:] if num_new > 0 else []

    def phases(self) -> tuple[str, ...]:
        """Phase and outer step of each stage in short form, for logs; `apply` from when on the manifest is out."""
        return tuple(
            f"{'apply' if isinstance(stage.activity, Applying) else stage.phase.value}({stage.outer_step})"
            for stage in self._state.memory.stages
        )

    def is_registered(self, hotkey: Hotkey) -> bool:
        """Whether the hotkey is on the metagraph."""
        return hotkey in self._state.memory.permits

    def is_present(self, hotkey: Hotkey) -> bool:
        """Whether the hotkey is a member that has not gone."""
        return self._state.memory.membership.get(hotkey) is not None

    def feed(self, hotkey: Hotkey, now_s: float) -> Feed:
        """What a member (or, in brief, anybody else) must know."""
        if self._feed_parts.version != self.version:
            self._feed_parts = views.feed_parts(self._state)
        return views.feed(self._state, self._feed_parts, hotkey, now_s)

    def status(self, now_s: float) -> RunStatus:
        """How the run is doing, for people."""
        return views.status(self._state, now_s)

    def ledger(self, query: LedgerQuery) -> Ledger:
        """Credited work and verdicts."""
        return views.ledger(self._state, query)

    def pay(self, hotkey: Hotkey) -> MinerPay:
        """A miner's whole pay. Raises RefusedError for a hotkey that the run does not know."""
        return views.pay(self._state, hotkey)

    def losses(self, query: LossQuery) -> Losses:
        """Losses of applied microbatches in order of arrival."""
        return views.losses(self._state, query)

    def pathways(self, query: PathwayQuery) -> Pathways:
        """Paths and losses of an outer step's applied trips."""
        return views.pathways(self._state, query)

    def boundaries(self, query: BoundaryQuery) -> Boundaries:
        """What each miner last reported of its neighbours."""
        return views.boundaries(self._state, query)

    def manifests(self, query: ManifestQuery) -> Manifests:
        """A stage's manifests in order, without gaps."""
        return views.manifests(self._state, query)

    def commitments(self, query: CommitmentQuery) -> Commitments:
        """What miners committed to in an outer step."""
        return views.commitments(self._state, query)

    def merge(self, query: MergeQuery) -> MergeRecord:
        """How a stage's outer step was merged. Raises RefusedError when that is not known."""
        return views.merge(self._state, query)

    def check_grant(self, hotkey: Hotkey, request: grants.Question) -> None:
        """Raises RefusedError unless the hotkey may read or write these objects now."""
        grants.check_grant(self._state, hotkey, request)

    @property
    def num_entries(self) -> int:
        """Of the public ledger so far."""
        return self._state.memory.num_entries

    @property
    def ledger_digest(self) -> Digest:
        """Of the public ledger so far."""
        return self._state.memory.ledger_digest

    def snapshot(self) -> bytes:
        """Everything that is remembered, between two events."""
        return self._state.encoded()

    def restore(self, snapshot: bytes) -> None:
        """Goes on from another core's snapshot of the same run: the same events have the same effects from then on.

        Raises DataError for anything that is no snapshot of this version; then nothing has changed.
        """
        self._state.restore(snapshot)
        self._feed_parts = views.feed_parts(self._state)

    def digest(self) -> Digest:
        """Of everything that is remembered; costs a walk over all of it."""
        return self._state.digest()

    def check_invariants(self) -> None:
        """Raises AssertionError when the state is one that must never be."""
        check_invariants(self._state)
