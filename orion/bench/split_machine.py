"""What one machine earns under several hotkeys: pipelines as queues alone, in virtual time, without tensors.

Every stage has replicas; one machine of the second stage works under several of its hotkeys, one job at a time over all
of them. Who gets what is decided by production's router and production's injection. Pay follows accepted backward
passes, so earnings are passes, and a machine's are those of all its hotkeys, relative to the mean machine of its stage
with one hotkey.

Owns the queues and the settings. Left out: faults, checks, merges. A world is a pure function of setting and seed.
"""

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from random import Random
from statistics import fmean

from orion.common.ids import Hotkey
from orion.miner.injection import Injection, TripTimes
from orion.miner.router import Router
from orion.simulator.clock import VirtualClock

FORWARD_S, BACKWARD_S = 0.1, 0.2
JITTER = 0.2
"""Each pass takes up to this share more or less."""
LATENCY_S = 0.02
"""One way, median over pairs of miners; each pair has its own, between half and twice this."""
BUSY_RETRY_S = 0.2
SPLIT_STAGE = 1


@dataclass(frozen=True, slots=True)
class SplitSetting:
    """One kind of swarm."""

    name: str
    num_stages: int = 3
    replicas: int = 4
    """Hotkeys of a stage."""
    num_hotkeys: int = 2
    """Of the split machine."""
    trips: int = 256
    """Microbatches of an outer step; the pipeline fills at its start and drains at its end."""
    outer_steps: int = 3
    slowness: float = 1.0
    """Of the split machine's stage: below 1 its devices are not what work waits for."""
    credits: int = 24


SETTINGS = (
    SplitSetting("16 microbatches a miner", trips=64, outer_steps=8),
    SplitSetting("64 microbatches a miner", trips=256),
    SplitSetting("500 microbatches a miner", trips=2000, outer_steps=1),
    SplitSetting("500 microbatches a miner, three hotkeys", trips=2000, outer_steps=1, num_hotkeys=3),
    SplitSetting("a stage twice as fast as the others", slowness=0.5),
    SplitSetting("12 replicas, 64 microbatches a miner", num_stages=4, replicas=12, trips=768, outer_steps=2),
    SplitSetting(
        "12 replicas of a stage twice as fast", num_stages=4, replicas=12, trips=768, outer_steps=2, slowness=0.5
    ),
)


@dataclass(frozen=True, slots=True)
class SplitRow:
    """What came of a setting, means over the seeds."""

    name: str
    num_hotkeys: int
    earned: float
    """Of the split machine, 1 = the mean machine of its stage with one hotkey."""
    earned_least: float
    earned_most: float
    """Over the seeds."""
    use: float
    """Share of the time that the split machine's device computed."""
    others_use: float
    """The same of the other machines of its stage: what they leave idle is what there is to gain."""


@dataclass(slots=True, eq=False)
class _Machine:
    slowness: float
    replicas: "list[_Replica]" = field(default_factory=list)
    is_busy: bool = False
    busy_s: float = 0.0


@dataclass(slots=True, eq=False)
class _Trip:
    path: "list[_Replica]"
    begun_s: float
    begun_in_flight: int
    waited_s: float = 0.0
    sent_s: dict[int, float] = field(default_factory=dict)
    """By the sender's stage."""


_Queue = deque[tuple[float, _Trip]]
"""Passes that wait, each with the time since when."""


@dataclass(slots=True, eq=False)
class _Replica:
    hotkey: Hotkey
    stage_index: int
    machine: _Machine
    router: Router
    """Knows the replicas of the next stage."""
    injection: Injection
    """Of a first-stage miner."""
    forwards: _Queue = field(default_factory=deque)
    backwards: _Queue = field(default_factory=deque)
    unsent: list[_Trip] = field(default_factory=list)
    num_held: int = 0
    num_done: int = 0


class SplitWorld:
    """One swarm with one split machine."""

    def __init__(self, setting: SplitSetting, seed: int) -> None:
        self.setting = setting
        self._rng = Random(f"split machine {seed}")
        self._clock = VirtualClock(0.0)
        self._latencies: dict[frozenset[Hotkey], float] = {}
        self.stages = [self._stage(stage_index, seed) for stage_index in range(setting.num_stages)]
        self._by_hotkey = {replica.hotkey: replica for stage in self.stages for replica in stage}
        self._num_left = 0
        """Of the outer step's trips, those that have not begun."""
        self._num_live = 0

    def _stage(self, stage_index: int, seed: int) -> list[_Replica]:
        setting, stage = self.setting, list[_Replica]()
        is_split = stage_index == SPLIT_STAGE
        slowness = setting.slowness if is_split else 1.0
        machine = _Machine(slowness)
        for place in range(setting.replicas):
            if not (is_split and 0 < place < setting.num_hotkeys):
                machine = _Machine(slowness)
            hotkey = Hotkey(f"miner-{stage_index}-{place}")
            router = Router(Random(f"{seed} {hotkey}"))
            injection = Injection(setting.num_stages, setting.credits)
            replica = _Replica(hotkey, stage_index, machine, router, injection)
            machine.replicas.append(replica)
            stage.append(replica)
        return stage

    def run(self) -> float:
        """All outer steps; the seconds in which miners trained."""
        for _ in range(self.setting.outer_steps):
            self._num_left = self.setting.trips
            self._begin_trips()
            while self._num_left or self._num_live:
                assert self._clock.step(), "nothing happens any more"
        return self._clock.now_s()

    def _begin_trips(self) -> None:
        for replica in self.stages[0]:
            self._compute(replica.machine)

    # --- devices ------------------------------------------------------------------------------------------------------

    def _compute(self, machine: _Machine) -> None:
        """Gives an idle device its next pass: backward first, then new trips, then what has waited longest."""
        if machine.is_busy:
            return
        now_s = self._clock.now_s()
        backward = min((each for each in machine.replicas if each.backwards), key=_oldest_backward, default=None)
        forward = min((each for each in machine.replicas if each.forwards), key=_oldest_forward, default=None)
        beginner = next((each for each in machine.replicas if self._may_begin(each)), None)
        if backward is not None:
            queued_s, trip = backward.backwards.popleft()
            trip.waited_s += now_s - queued_s
            self._run(backward, BACKWARD_S, partial(self._backwarded, backward, trip))
        elif beginner is not None:
            self._num_left -= 1
            self._num_live += 1
            beginner.num_held += 1
            beginner.injection.started(now_s)
            begun = _Trip([beginner], now_s, beginner.num_held)
            self._run(beginner, FORWARD_S, partial(self._send, beginner, begun))
        elif forward is not None:
            queued_s, trip = forward.forwards.popleft()
            trip.waited_s += now_s - queued_s
            if forward.stage_index == self.setting.num_stages - 1:
                self._run(forward, FORWARD_S + BACKWARD_S, partial(self._backwarded, forward, trip))
            else:
                self._run(forward, FORWARD_S, partial(self._send, forward, trip))

    def _may_begin(self, replica: _Replica) -> bool:
        return replica.stage_index == 0 and self._num_left > 0 and replica.num_held < replica.injection.target

    def _run(self, replica: _Replica, usual_s: float, then: Callable[[], None]) -> None:
        machine = replica.machine
        seconds = usual_s * machine.slowness * (1.0 + JITTER * self._rng.uniform(-1.0, 1.0))
        machine.is_busy = True
        machine.busy_s += seconds

        def done() -> None:
            machine.is_busy = False
            then()
            self._compute(machine)

        self._clock.schedule(seconds, done)

    def _backwarded(self, replica: _Replica, trip: _Trip) -> None:
        replica.num_done += 1
        if replica.stage_index > 0:
            replica.num_held -= 1
            before = trip.path[replica.stage_index - 1]
            self._clock.schedule(self._way_s(replica, before), partial(self._returned, before, replica, trip))
            return
        num_in_flight = (trip.begun_in_flight + replica.num_held) / 2
        replica.num_held -= 1
        self._num_live -= 1
        replica.injection.ended(TripTimes(num_in_flight, self._clock.now_s() - trip.begun_s, trip.waited_s))
        self._begin_trips()

    # --- ways ---------------------------------------------------------------------------------------------------------

    def _send(self, sender: _Replica, trip: _Trip) -> None:
        now_s = self._clock.now_s()
        candidates = [replica.hotkey for replica in self.stages[sender.stage_index + 1]]
        chosen = sender.router.choose(candidates, now_s)
        if chosen is None:
            sender.unsent.append(trip)
            usable_s = sender.router.next_usable_s(candidates)
            if usable_s is not None:
                self._clock.schedule(max(0.0, usable_s - now_s), partial(self._send_rest, sender))
            return
        receiver = self._by_hotkey[chosen]
        sender.router.sent(chosen)
        trip.sent_s[sender.stage_index] = now_s
        self._clock.schedule(self._way_s(sender, receiver), partial(self._offered, sender, receiver, trip))

    def _send_rest(self, sender: _Replica) -> None:
        """What found nobody is tried again, whenever something was heard."""
        unsent, sender.unsent = sender.unsent, []
        for trip in unsent:
            self._send(sender, trip)

    def _offered(self, sender: _Replica, receiver: _Replica, trip: _Trip) -> None:
        is_taken = receiver.num_held < self.setting.credits
        if is_taken:
            receiver.num_held += 1
            trip.path.append(receiver)
            receiver.forwards.append((self._clock.now_s(), trip))
        queued = len(receiver.forwards) + len(receiver.backwards)
        credits = self.setting.credits - receiver.num_held

        def answered() -> None:
            now_s = self._clock.now_s()
            if is_taken:
                sender.router.accepted(receiver.hotkey, now_s, queued, credits)
            else:
                sender.router.busy(receiver.hotkey, now_s + BUSY_RETRY_S)
                sender.router.released(receiver.hotkey)
                sender.unsent.append(trip)
            self._send_rest(sender)

        self._clock.schedule(self._way_s(receiver, sender), answered)
        self._compute(receiver.machine)

    def _returned(self, replica: _Replica, peer: _Replica, trip: _Trip) -> None:
        now_s = self._clock.now_s()
        replica.router.completed(peer.hotkey, trip.sent_s[replica.stage_index], now_s)
        replica.router.released(peer.hotkey)
        replica.backwards.append((now_s, trip))
        self._compute(replica.machine)
        self._send_rest(replica)

    def _way_s(self, one: _Replica, other: _Replica) -> float:
        pair = frozenset((one.hotkey, other.hotkey))
        if pair not in self._latencies:
            self._latencies[pair] = LATENCY_S * 2.0 ** self._rng.uniform(-1.0, 1.0)
        return self._latencies[pair]


def split_row(setting: SplitSetting, seeds: Sequence[int]) -> SplitRow:
    """What the split machine earns in a setting."""
    earned, use, others_use = [], [], []
    for seed in seeds:
        world = SplitWorld(setting, seed)
        seconds = world.run()
        stage = world.stages[SPLIT_STAGE]
        split, others = stage[: setting.num_hotkeys], stage[setting.num_hotkeys :]
        earned.append(sum(each.num_done for each in split) / fmean(each.num_done for each in others))
        use.append(split[0].machine.busy_s / seconds)
        others_use.append(fmean(each.machine.busy_s for each in others) / seconds)
    return SplitRow(
        setting.name, setting.num_hotkeys, fmean(earned), min(earned), max(earned), fmean(use), fmean(others_use)
    )


def split_report(rows: Sequence[SplitRow], num_seeds: int) -> dict[str, object]:
    """The study as one JSON object."""
    return {"num_seeds": num_seeds, "rows": [asdict(row) for row in rows]}


def format_split_row(row: SplitRow) -> str:
    """A row for people."""
    return (
        f"{row.name}: one machine under {row.num_hotkeys} hotkeys earns {row.earned:.0%} of one under one "
        f"({row.earned_least:.0%} to {row.earned_most:.0%}); it computes {row.use:.0%} of the time, the others of its "
        f"stage {row.others_use:.0%}"
    )


def _oldest_backward(replica: _Replica) -> float:
    return replica.backwards[0][0]


def _oldest_forward(replica: _Replica) -> float:
    return replica.forwards[0][0]
