"""One rule's way through one world: epochs of activations in virtual time.

Owns the events: first-stage miners take activations as long as their cache has room, devices compute backward before
forward, activations go to whom their holder's rule chooses, gradients go back the way they came, miners drop out and
come back. Must not know any rule. The retry policy is the same for all rules: who was not reached is not asked again
for this activation; when the rule chooses nobody, it is asked again when it said, or after `RETRY_S`.

Invariants: an activation is held by at most one device queue; one that has ended is held nowhere and in flight nowhere.
"""

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from random import Random

from orion.bench.routing.rules import STATUS_PERIOD_S, Listener, Rule, Status
from orion.bench.routing.world import (
    ACTIVATION_BYTES,
    CACHE_MAX,
    CONNECT_TIMEOUT_S,
    JITTER,
    MERGE_S,
    SILENCE_S,
    STALE_S,
    Resident,
    Traits,
    World,
    transfer_s,
)
from orion.common.ids import Hotkey
from orion.simulator.clock import VirtualClock

RETRY_S = 0.5
"""Until a rule that chose nobody and named no time is asked again."""
EPOCH_MAX_S = 7200.0
"""An epoch that is not over by then never will be: a fault of the race, not of a rule."""

RuleMaker = Callable[[Random], Rule]


@dataclass(slots=True)
class RaceResult:
    """What one rule needed in one world."""

    epoch_s: list[float] = field(default_factory=list)
    num_lost: int = 0
    """Activations that were given up."""
    num_unreached: int = 0
    """Attempts that found nobody there."""

    @property
    def total_s(self) -> float:
        """Time of all epochs, merging left out."""
        return sum(self.epoch_s)


@dataclass(slots=True, eq=False)
class Activation:
    """One activation on its way."""

    path: "list[Miner]"
    progressed_s: float
    """When it last reached a stage."""
    sent_s: dict[int, float] = field(default_factory=dict)
    """By stage: when it was sent on from there to the next miner of `path`, or to the one being tried."""
    targets: "dict[int, Miner]" = field(default_factory=dict)
    """By stage: to whom it is in flight from there."""
    tried: set[Hotkey] = field(default_factory=set)
    """Not reached for this hop."""
    has_ended: bool = False


class Miner:
    """One miner of the world: its queues, its cache, its device, and its knowledge of the next stage."""

    def __init__(self, resident: Resident, make_rule: RuleMaker) -> None:
        self.hotkey = resident.hotkey
        self.stage = resident.stage
        self.resident = resident
        self.traits: Traits = resident.epochs[0]
        self.churn = Random(resident.seed)
        self.jitter = Random(resident.seed + 1)
        self._make_rule = make_rule
        self.is_present = True
        self.life = 0
        """Grows whenever it drops out: what was meant for an earlier life does not arrive."""
        self.forward_queue: deque[Activation] = deque()
        self.backward_queue: deque[Activation] = deque()
        self.cache: set[Activation] = set()
        self.computing: Activation | None = None
        self.rule = self._new_rule()

    def drop_out(self) -> None:
        """It is gone, with all that it held and knew."""
        self.is_present = False
        self.life += 1
        self.clear()
        self.rule = self._new_rule()

    def clear(self) -> None:
        """Holds nothing any more."""
        self.forward_queue.clear()
        self.backward_queue.clear()
        self.cache.clear()
        self.computing = None

    def forget(self, activation: Activation) -> None:
        """Frees what it holds of an activation that has ended; a pass under way ends by itself."""
        self.cache.discard(activation)
        for queue in (self.forward_queue, self.backward_queue):
            if activation in queue:
                queue.remove(activation)

    @property
    def num_waiting(self) -> int:
        """Passes before its device, the one under way included."""
        return len(self.forward_queue) + len(self.backward_queue) + (self.computing is not None)

    @property
    def num_held(self) -> int:
        """Activations that it holds: those that wait for their forward, are computed or wait for their gradient."""
        is_new = self.computing is not None and self.computing not in self.cache
        return len(self.forward_queue) + len(self.cache) + is_new

    def _new_rule(self) -> Rule:
        return self._make_rule(Random(f"{self.resident.seed} rule {self.life}"))


class Race:
    """Runs one rule through all epochs of one world."""

    def __init__(self, world: World, make_rule: RuleMaker) -> None:
        self.world = world
        self.clock = VirtualClock(0.0)
        self.result = RaceResult()
        self.miners = [Miner(resident, make_rule) for resident in world.residents]
        self.stages = [[miner for miner in self.miners if miner.stage == stage] for stage in range(world.num_stages)]
        self._listens = isinstance(self.miners[0].rule, Listener)
        self._by_hotkey = {miner.hotkey: miner for miner in self.miners}
        self._members = [{miner.hotkey: None for miner in stage} for stage in self.stages]
        """By stage: whom the others take for present."""
        self._live: set[Activation] = set()
        self._num_done = 0
        self._epoch = 0
        """Counts epochs and merges: what was scheduled in an earlier one does not happen."""

    def run(self) -> RaceResult:
        """All epochs."""
        for miner in self.miners:
            self._schedule_dropping_out(miner)
            first_s = miner.churn.random() * STATUS_PERIOD_S
            if miner.stage > 0 and self._listens:
                self.clock.schedule(first_s, partial(self._broadcast, miner))
        for epoch in range(len(self.world.residents[0].epochs)):
            for miner in self.miners:
                miner.traits = miner.resident.epochs[epoch]
            self.result.epoch_s.append(self._run_epoch())
            self._merge()
        return self.result

    def _run_epoch(self) -> float:
        self._epoch += 1
        self._num_done = 0
        began_s = self.clock.now_s()
        for miner in self.stages[0]:
            self._take_work(miner)
        while self._num_done < self.world.num_activations:
            assert self.clock.step(), "nothing happens any more"
            assert self.clock.now_s() - began_s < EPOCH_MAX_S, "the epoch does not end"
        return self.clock.now_s() - began_s

    def _merge(self) -> None:
        """Everything is cleared; miners come and go meanwhile."""
        self._epoch += 1
        for activation in list(self._live):
            self._end(activation)
        for miner in self.miners:
            miner.clear()
        end_s = self.clock.now_s() + MERGE_S
        is_over: list[bool] = []
        self.clock.schedule_at(end_s, lambda: is_over.append(True))
        while not is_over:
            self.clock.step()

    # --- a miner's work -----------------------------------------------------------------------------------------------

    def _take_work(self, miner: Miner) -> None:
        """A first-stage miner takes as many activations as it may hold."""
        while miner.is_present and miner.num_held < CACHE_MAX:
            activation = Activation([miner], self.clock.now_s())
            self._live.add(activation)
            self._watch(activation)
            miner.forward_queue.append(activation)
            self._compute(miner)

    def _compute(self, miner: Miner) -> None:
        """Gives an idle device its next pass: backward first, forward only while the cache has room."""
        if miner.computing is not None or not miner.is_present:
            return
        if miner.backward_queue:
            activation, seconds, then = miner.backward_queue.popleft(), miner.traits.backward_s, self._backwarded
        elif miner.forward_queue and len(miner.cache) < CACHE_MAX:
            activation, seconds, then = miner.forward_queue.popleft(), miner.traits.forward_s, self._forwarded
        else:
            return
        miner.computing = activation
        seconds *= miner.jitter.uniform(1.0 - JITTER, 1.0 + JITTER)

        epoch = self._epoch

        def done() -> None:
            if self._epoch != epoch:
                return  # The merge has cleared it.
            miner.computing = None
            if not activation.has_ended:
                then(miner, activation)
            if miner.stage == 0:
                self._take_work(miner)
            self._compute(miner)

        self._later(seconds, done, miner)

    def _forwarded(self, miner: Miner, activation: Activation) -> None:
        miner.cache.add(activation)
        if miner.stage == self.world.num_stages - 1:
            miner.backward_queue.append(activation)
            return
        activation.tried.clear()
        self._send(miner, activation)

    def _backwarded(self, miner: Miner, activation: Activation) -> None:
        miner.cache.discard(activation)
        if miner.stage == 0:
            self._num_done += 1
            self._end(activation)
            return
        before = activation.path[miner.stage - 1]
        life = before.life
        seconds = transfer_s(miner.traits, before.traits, ACTIVATION_BYTES)
        self._later(seconds, lambda: self._gradient_arrived(before, life, activation), miner)

    def _gradient_arrived(self, miner: Miner, life: int, activation: Activation) -> None:
        if miner.life != life or activation.has_ended or activation not in miner.cache:
            return  # Its holder dropped out: nobody can take the gradient.
        now_s = self.clock.now_s()
        activation.progressed_s = now_s
        peer = activation.targets.pop(miner.stage)
        miner.rule.completed(peer.hotkey, activation.sent_s[miner.stage], now_s)
        miner.rule.released(peer.hotkey)
        miner.backward_queue.append(activation)
        self._compute(miner)

    # --- from miner to miner ------------------------------------------------------------------------------------------

    def _send(self, miner: Miner, activation: Activation) -> None:
        if activation.has_ended:
            return
        now_s = self.clock.now_s()
        candidates = [peer for peer in self._members[miner.stage + 1] if peer not in activation.tried]
        if not candidates:
            activation.tried.clear()  # All were tried; a moment later they may be there.
        chosen = miner.rule.choose(candidates, now_s) if candidates else None
        if chosen is None:
            usable_s = miner.rule.next_usable_s(candidates) if candidates else None
            wait_s = RETRY_S if usable_s is None else max(0.0, usable_s - now_s)
            self._later(wait_s, lambda: self._send(miner, activation), miner)
            return
        peer = self._by_hotkey[chosen]
        miner.rule.sent(chosen)
        activation.sent_s[miner.stage], activation.targets[miner.stage] = now_s, peer
        if not peer.is_present:
            self._later(CONNECT_TIMEOUT_S, lambda: self._not_reached(miner, peer, activation), miner)
            return
        life = peer.life
        seconds = transfer_s(miner.traits, peer.traits, ACTIVATION_BYTES)
        self._later(seconds, lambda: self._arrived(miner, peer, life, activation), miner)

    def _not_reached(self, miner: Miner, peer: Miner, activation: Activation) -> None:
        self.result.num_unreached += 1
        miner.rule.failed(peer.hotkey, self.clock.now_s())
        if activation.has_ended:
            return
        miner.rule.released(peer.hotkey)
        del activation.targets[miner.stage]
        activation.tried.add(peer.hotkey)
        self._send(miner, activation)

    def _arrived(self, sender: Miner, peer: Miner, life: int, activation: Activation) -> None:
        if peer.life != life:
            self._not_reached(sender, peer, activation)
            return
        now_s = self.clock.now_s()
        if not activation.has_ended:
            activation.progressed_s = now_s
            activation.path.append(peer)
            peer.forward_queue.append(activation)
            self._compute(peer)
        queued, credits = peer.num_waiting, max(0, CACHE_MAX - peer.num_held)
        answer_s = transfer_s(peer.traits, sender.traits, 0)
        self._later(answer_s, lambda: self._answered(sender, peer, queued, credits), sender)

    def _answered(self, sender: Miner, peer: Miner, queued: int, credits: int) -> None:
        sender.rule.accepted(peer.hotkey, self.clock.now_s(), queued, credits)

    def _watch(self, activation: Activation) -> None:
        """Drops it everywhere once it has not got past a stage in time."""

        def look() -> None:
            if activation.has_ended:
                return
            left_s = activation.progressed_s + STALE_S - self.clock.now_s()
            if left_s > 0.0:
                self.clock.schedule(left_s, look)
                return
            self.result.num_lost += 1
            holders = [miner for miner in activation.path if activation in miner.cache or miner.stage == 0]
            self._end(activation, is_lost=True)
            for miner in holders:
                if miner.stage == 0:
                    self._take_work(miner)
                self._compute(miner)

        self.clock.schedule(STALE_S, look)

    def _end(self, activation: Activation, *, is_lost: bool = False) -> None:
        """Nothing holds it any more and it is in flight nowhere."""
        activation.has_ended = True
        self._live.discard(activation)
        for stage, peer in activation.targets.items():
            sender = activation.path[stage]
            if not sender.is_present or activation not in sender.cache:
                continue  # It lost what it knew of this activation when it dropped out.
            if is_lost:
                sender.rule.lost(peer.hotkey, activation.sent_s[stage], self.clock.now_s())
            sender.rule.released(peer.hotkey)
        for miner in activation.path:
            miner.forget(activation)
        activation.targets.clear()

    # --- coming and going ---------------------------------------------------------------------------------------------

    def _schedule_dropping_out(self, miner: Miner) -> None:
        self.clock.schedule(miner.churn.expovariate(1.0 / miner.traits.mean_present_s), lambda: self._drop_out(miner))

    def _drop_out(self, miner: Miner) -> None:
        miner.drop_out()
        life = miner.life
        self.clock.schedule(SILENCE_S, lambda: self._missed(miner, life))
        self.clock.schedule(miner.churn.expovariate(1.0 / miner.traits.mean_absent_s), lambda: self._come_back(miner))

    def _missed(self, miner: Miner, life: int) -> None:
        if miner.life == life and not miner.is_present:
            del self._members[miner.stage][miner.hotkey]
            self._tell_members(miner.stage)

    def _come_back(self, miner: Miner) -> None:
        miner.is_present = True
        self._members[miner.stage][miner.hotkey] = None
        self._tell_members(miner.stage)
        if miner.stage == 0 and self._epoch % 2:
            self._take_work(miner)
        self._schedule_dropping_out(miner)

    def _tell_members(self, stage: int) -> None:
        """The stage before hears who is there now."""
        if stage > 0:
            for sender in self.stages[stage - 1]:
                sender.rule.keep_only(self._members[stage])

    def _broadcast(self, miner: Miner) -> None:
        """Every present miner tells the stage before how it stands; senders hear it at once."""
        self.clock.schedule(STATUS_PERIOD_S, partial(self._broadcast, miner))
        if not miner.is_present:
            return
        status = Status(free=CACHE_MAX - len(miner.cache), forward_queue=len(miner.forward_queue))
        for sender in self.stages[miner.stage - 1]:
            assert isinstance(sender.rule, Listener)
            sender.rule.told(miner.hotkey, status)

    def _later(self, seconds: float, action: Callable[[], None], actor: Miner) -> None:
        """Happens unless its actor has dropped out by then."""
        life = actor.life

        def happen() -> None:
            if actor.life == life:
                action()

        self.clock.schedule(seconds, happen)
