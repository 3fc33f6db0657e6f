"""Faults that befall a miner at the very moment in which a microbatch stands somewhere on it.

It owns when a strike comes and whether it hit; what a fault does to a process is the swarm's and the network's. A
schedule of faults (`faults`) meets a given stand only by luck; here each stand is met on purpose.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import StrEnum

from orion.common.ids import MicrobatchId
from orion.miner.table import Stand
from orion.simulator.host import Host
from orion.simulator.miner_host import MinerHost
from orion.simulator.network import Impairment
from orion.simulator.swarm import Swarm


class Blow(StrEnum):
    """What a strike does to its miner."""

    KILL = "kill"
    STOP = "stop"
    """It stands still and goes on after `Strike.duration_s`."""
    CUT = "cut"
    """Nothing reaches it and nothing of it reaches anybody, for `Strike.duration_s`."""
    MUTE = "mute"
    """Nothing of it reaches another miner, not even an answer, for `Strike.duration_s`; the orchestrator hears it."""


@dataclass(frozen=True, slots=True)
class Strike:
    """One fault at one stand."""

    blow: Blow
    stage_index: int
    """Where the first miner to hold a microbatch in that stand is struck."""
    stand: Stand
    after_num_applied: int = 2
    """Microbatches that the miner has applied before: every neighbour has been measured then."""
    duration_s: float = 20.0
    back_at: Stand | None = None
    """A stopped miner goes on as soon as a replacement has one of its microbatches in this stand, rather than after
    `duration_s`."""
    is_midway: bool = False
    """A stopped miner has decided what to do about the last event, and not begun to do it."""


class Striker:
    """An observer of one swarm that carries out one strike."""

    def __init__(self, swarm: Swarm, strike: Strike) -> None:
        self._swarm = swarm
        self._strike = strike
        self._is_armed = True
        self._had: frozenset[MicrobatchId] = frozenset()
        """What the struck miner held."""
        self.struck: int | None = None
        """Index of the miner that was struck; None: none was yet."""
        self.is_back = False
        """Whether it goes on again, or is reached again."""

    def handled(self, host: Host, event: object, effects: Sequence[object]) -> None:
        """Strikes once the stand is there, and ends what is to end once a replacement stands where it should."""
        if not isinstance(host, MinerHost):
            return
        if self._is_armed and self._is_there(host):
            self._is_armed = False
            if self._strike.is_midway:
                self._strike_if_there(host)
            else:
                # A moment later the effects of the event have been carried out.
                self._swarm.world.clock.schedule(0.0, lambda: self._strike_if_there(host))
        elif self.struck is not None and not self.is_back and self._is_replaced_by(host):
            self._end(self._swarm.miners[self.struck].resume)

    def _is_there(self, host: MinerHost) -> bool:
        strike, view = self._strike, host.core.view
        if view is None or view.stage_index != strike.stage_index or host.core.num_applied < strike.after_num_applied:
            return False
        return bool(host.core.standing(strike.stand))

    def _is_replaced_by(self, host: MinerHost) -> bool:
        stand, struck = self._strike.back_at, self._swarm.hotkeys[self.struck or 0]
        view = host.core.view
        if stand is None or view is None or view.stage_index != self._strike.stage_index or host.hotkey == struck:
            return False
        return not self._had.isdisjoint(host.core.standing(stand))

    def _strike_if_there(self, host: MinerHost) -> None:
        if not host.is_alive or not self._is_there(host):
            self._is_armed = True
            return
        swarm, strike = self._swarm, self._strike
        self.struck = swarm.hotkeys.index(host.hotkey)
        self._had = frozenset(microbatch_id for stand in Stand for microbatch_id in host.core.standing(stand))
        swarm.world.log.write(f"{swarm.world.clock.now_s():.6f} strike {strike}")
        match strike.blow:
            case Blow.KILL:
                swarm.kill_miner(self.struck)
            case Blow.STOP:
                host.stop()
                if strike.back_at is None:
                    swarm.world.clock.schedule(strike.duration_s, lambda: self._end(host.resume))
            case Blow.CUT:
                self._impair([Impairment(host.hotkey, drop_share=1.0), Impairment(None, host.hotkey, drop_share=1.0)])
            case Blow.MUTE:
                others = [hotkey for hotkey in swarm.hotkeys if hotkey != host.hotkey]
                self._impair([Impairment(host.hotkey, other, drop_share=1.0) for other in others])

    def _end(self, lift: Callable[[], None]) -> None:
        self.is_back = True
        self._swarm.world.log.write(f"{self._swarm.world.clock.now_s():.6f} strike over")
        lift()

    def _impair(self, impairments: list[Impairment]) -> None:
        network = self._swarm.world.network

        def lift() -> None:
            for impairment in impairments:
                network.lift(impairment)

        for impairment in impairments:
            network.impair(impairment)
        self._swarm.world.clock.schedule(self._strike.duration_s, lambda: self._end(lift))
