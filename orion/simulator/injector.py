"""Carries out a schedule of faults in a swarm, and keeps the record of what each of them really did.

It owns when a fault begins and ends; what may be drawn is in `faults`. Invariants: a fault begins once, after its
trigger; one that harms messages, jobs or requests lasts until it has harmed at least one; one that cannot happen yet,
because its process is down, is tried again until it can.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

from orion.common.ids import Phase
from orion.common.protocol.messages import Feed
from orion.orchestrator.events import Announce
from orion.simulator.faults import Fault, FaultKind
from orion.simulator.host import ORCHESTRATOR, Host
from orion.simulator.network import Impairment
from orion.simulator.orchestrator_host import OrchestratorHost
from orion.simulator.store import StoreTrouble
from orion.simulator.swarm import Swarm

RETRY_S = 0.5
STORE_DELAY_S = 1.5
"""What a store in trouble adds to each write."""
PHASE_ORDER = {Phase.TRAIN: 0, Phase.UPLOAD: 1, Phase.MERGE: 2, Phase.DONE: 3}


def _none() -> int:
    return 0


def _one() -> int:
    return 1


@dataclass(frozen=True, slots=True)
class FaultOutcome:
    """What became of one fault."""

    fault: Fault
    began_s: float | None
    """Virtual time since the start of the simulation; None: it never began."""
    num_hits: int
    """Processes ended, messages, jobs or requests harmed."""

    @property
    def has_fired(self) -> bool:
        return self.num_hits > 0

    def __str__(self) -> str:
        began = "never began" if self.began_s is None else f"began at {self.began_s:.2f} s, {self.num_hits} hits"
        return f"{self.fault}: {began}"


@dataclass(slots=True, eq=False)
class _Record:
    """One fault on its way."""

    fault: Fault
    began_s: float | None = None
    count: Callable[[], int] = _none
    """Hits so far."""

    def outcome(self) -> FaultOutcome:
        return FaultOutcome(self.fault, self.began_s, self.count())


class Injector:
    """Watches the phases and makes things go wrong."""

    def __init__(self, swarm: Swarm, schedule: Sequence[Fault]) -> None:
        self._swarm = swarm
        self._clock = swarm.world.clock
        self._records = [_Record(fault) for fault in schedule]
        self._pending = list(self._records)

    def outcomes(self) -> tuple[FaultOutcome, ...]:
        """What has become of each fault so far."""
        return tuple(record.outcome() for record in self._records)

    def handled(self, host: Host, event: object, effects: Sequence[object]) -> None:
        """Sees to the faults whose phase has come."""
        if not self._pending or not isinstance(host, OrchestratorHost):
            return
        if not any(isinstance(effect, Announce) for effect in effects):
            return
        stages = host.stage_states()
        for record in tuple(self._pending):
            fault = record.fault
            stage = stages[fault.stage_index]
            if (stage.outer_step, PHASE_ORDER[stage.phase]) >= (fault.outer_step, PHASE_ORDER[fault.phase]):
                self._pending.remove(record)
                self._clock.schedule(fault.after_s, partial(self._begin, record))

    def _begin(self, record: _Record) -> None:
        if not self._can_begin(record.fault):
            self._clock.schedule(RETRY_S, lambda: self._begin(record))
            return
        record.began_s = self._clock.monotonic_s()
        self._swarm.world.log.write(f"{self._clock.now_s():.6f} fault {record.fault}")
        match record.fault.kind:
            case FaultKind.CRASH | FaultKind.RESTART:
                self._crash(record)
            case FaultKind.STOP:
                self._stop(record)
            case FaultKind.ORCHESTRATOR_RESTART:
                self._restart_orchestrator(record)
            case FaultKind.SLOW_DEVICE:
                self._slow_device(record)
            case FaultKind.STORE_TROUBLE:
                self._trouble_store(record)
            case _:
                self._impair(record)

    def _can_begin(self, fault: Fault) -> bool:
        """Whether the process that is to end is up."""
        match fault.kind:
            case FaultKind.CRASH | FaultKind.RESTART | FaultKind.STOP:
                return self._swarm.is_miner_alive(fault.miner)
            case FaultKind.ORCHESTRATOR_RESTART:
                return self._swarm.orchestrator.is_alive
            case _:
                return True

    def _crash(self, record: _Record) -> None:
        fault = record.fault
        self._swarm.kill_miner(fault.miner)
        record.count = _one
        if fault.kind is FaultKind.RESTART:
            self._clock.schedule(fault.duration_s, lambda: self._swarm.start_miner(fault.miner))

    def _stop(self, record: _Record) -> None:
        miner = self._swarm.miners[record.fault.miner]
        miner.stop()
        record.count = _one
        self._clock.schedule(record.fault.duration_s, miner.resume)

    def _restart_orchestrator(self, record: _Record) -> None:
        self._swarm.kill_orchestrator()
        record.count = _one
        self._clock.schedule(record.fault.duration_s, self._swarm.restart_orchestrator)

    def _slow_device(self, record: _Record) -> None:
        device = self._swarm.devices[record.fault.miner]
        before = device.num_slowed
        device.slowdowns.append(record.fault.strength)
        record.count = lambda: device.num_slowed - before
        self._lift_once_hit(record, lambda: device.slowdowns.remove(record.fault.strength))

    def _trouble_store(self, record: _Record) -> None:
        store = self._swarm.world.store
        trouble = StoreTrouble(fail_share=record.fault.strength, delay_s=STORE_DELAY_S)
        store.troubles.append(trouble)
        record.count = lambda: trouble.num_hits
        self._lift_once_hit(record, lambda: store.troubles.remove(trouble))

    def _impair(self, record: _Record) -> None:
        network = self._swarm.world.network
        impairments = self._impairments(record.fault)
        for impairment in impairments:
            network.impair(impairment)

        def end() -> None:
            for impairment in impairments:
                network.lift(impairment)

        record.count = lambda: sum(impairment.num_hits for impairment in impairments)
        self._lift_once_hit(record, end)

    def _impairments(self, fault: Fault) -> list[Impairment]:
        miner = self._swarm.hotkeys[fault.miner]
        replicas = self._swarm.scenario.spec.replicas
        others = self._swarm.hotkeys[fault.other_stage * replicas : (fault.other_stage + 1) * replicas]
        match fault.kind:
            case FaultKind.DELAY:
                return [Impairment(miner, delay_s=fault.strength), Impairment(None, miner, delay_s=fault.strength)]
            case FaultKind.DUPLICATE:
                return [Impairment(duplicate_share=fault.strength)]
            case FaultKind.DROP:
                return [
                    Impairment(miner, drop_share=fault.strength),
                    Impairment(None, miner, drop_share=fault.strength),
                ]
            case FaultKind.ONE_WAY_PARTITION:
                return [Impairment(miner, other, drop_share=1.0) for other in others]
            case FaultKind.TWO_WAY_PARTITION:
                away = [Impairment(miner, other, drop_share=1.0) for other in others]
                return [*away, *(Impairment(other, miner, drop_share=1.0) for other in others)]
            case FaultKind.UNHEARD:
                return [Impairment(miner, ORCHESTRATOR, drop_share=1.0)]
            case FaultKind.CUT_OFF:
                return [Impairment(miner, drop_share=1.0), Impairment(None, miner, drop_share=1.0)]
            case FaultKind.LOST_FEED:
                return [Impairment(None, miner, drop_share=1.0, carries=Feed)]
            case _:
                raise AssertionError(f"{fault.kind} does not concern the network")

    def _lift_once_hit(self, record: _Record, end: Callable[[], None]) -> None:
        """Ends a fault after its duration, and not before it has harmed something."""

        def look() -> None:
            if record.count() > 0:
                end()
            else:
                self._clock.schedule(RETRY_S, look)

        self._clock.schedule(record.fault.duration_s, look)
