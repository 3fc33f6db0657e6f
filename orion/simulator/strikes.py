"""Faults that befall a miner at the very moment in which a microbatch stands somewhere on it.

It owns when a strike comes and whether it hit; what a fault does to a process is the swarm's and the network's. A
schedule of faults (`faults`) meets a given stand only by luck; here each stand is met on purpose.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import StrEnum

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


class Striker:
    """An observer of one swarm that carries out one strike."""

    def __init__(self, swarm: Swarm, strike: Strike) -> None:
        self._swarm = swarm
        self._strike = strike
        self._is_armed = True
        self.struck: int | None = None
        """Index of the miner that was struck; None: none was yet."""

    def handled(self, host: Host, event: object, effects: Sequence[object]) -> None:
        """Strikes once the stand is there. A moment later, when the effects of the event have been carried out."""
        if self._is_armed and isinstance(host, MinerHost) and self._is_there(host):
            self._is_armed = False
            self._swarm.world.clock.schedule(0.0, lambda: self._strike_if_there(host))

    def _is_there(self, host: MinerHost) -> bool:
        strike, view = self._strike, host.core.view
        if view is None or view.stage_index != strike.stage_index or host.core.num_applied < strike.after_num_applied:
            return False
        return host.core.stands()[strike.stand] > 0

    def _strike_if_there(self, host: MinerHost) -> None:
        if not host.is_alive or not self._is_there(host):
            self._is_armed = True
            return
        swarm, strike, clock = self._swarm, self._strike, self._swarm.world.clock
        self.struck = swarm.hotkeys.index(host.hotkey)
        swarm.world.log.write(f"{clock.now_s():.6f} strike {strike}")
        match strike.blow:
            case Blow.KILL:
                swarm.kill_miner(self.struck)
            case Blow.STOP:
                host.stop()
                clock.schedule(strike.duration_s, host.resume)
            case Blow.CUT:
                self._impair([Impairment(host.hotkey, drop_share=1.0), Impairment(None, host.hotkey, drop_share=1.0)])
            case Blow.MUTE:
                others = [hotkey for hotkey in swarm.hotkeys if hotkey != host.hotkey]
                self._impair([Impairment(host.hotkey, other, drop_share=1.0) for other in others])

    def _impair(self, impairments: list[Impairment]) -> None:
        network = self._swarm.world.network

        def lift(impairment: Impairment) -> Callable[[], None]:
            return lambda: network.lift(impairment)

        for impairment in impairments:
            network.impair(impairment)
            self._swarm.world.clock.schedule(self._strike.duration_s, lift(impairment))
