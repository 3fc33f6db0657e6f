"""A whole swarm in one process: orchestrator, miners, validator, store and chain in a simulated world.

It owns which processes run and lets time pass. It causes no faults (`injector`) and judges nothing (`invariants`).
Invariant: a swarm is a pure function of its scenario and seed.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from types import MappingProxyType

from blake3 import blake3

from orion.common.config import RunSpec
from orion.common.ids import Hotkey
from orion.common.net.chain import Hyperparameters
from orion.common.net.memory_chain import ChainLedger
from orion.common.protocol.records import (
    LossPoint,
    LossQuery,
    RunStatus,
)
from orion.orchestrator.journal import Header, MemoryJournal
from orion.orchestrator.ledger_store import MemoryLedger
from orion.simulator.clock import VirtualClock
from orion.simulator.device import Device, DeviceProfile
from orion.simulator.faults import Fault
from orion.simulator.host import STORE
from orion.simulator.miner_host import MinerHost
from orion.simulator.network import LinkProfile, Network
from orion.simulator.orchestrator_host import OrchestratorHost
from orion.simulator.store import MemoryStore
from orion.simulator.tokens import SyntheticTokens
from orion.simulator.validator_host import REPLAY_S, ValidatorHost
from orion.simulator.world import World, seeded

MakeMiner = Callable[[World, Hotkey, Device, int | None, int], MinerHost]
"""Makes a miner's process, as the constructor of `MinerHost` does."""

_BASE58 = "123456789ABCDEFGHJKLMNPQRSTUVWXYZabcdefghijkmnopqrstuvwxyz"
_STAKE = 100.0
_RULES = Hyperparameters(weights_rate_limit_blocks=2, tempo=4)
"""Blocks of a second, and epochs of four, so that permits and weights come within a short run."""
_JOIN_SPREAD_S = 0.5
"""Miners of a run start within this time of each other."""


@dataclass(frozen=True, slots=True)
class Scenario:
    """What is simulated."""

    name: str
    spec: RunSpec
    virtual_s_max: float
    """A run that is not finished by then has failed."""
    link: LinkProfile = field(default_factory=LinkProfile)
    device: DeviceProfile = field(default_factory=DeviceProfile)
    store_rate_share: float = 1.0
    """The store's link, as a multiple of a miner's."""
    num_spares: int = 0
    """Registered hotkeys beyond stages × replicas, whose miners only start when somebody starts them."""
    faults: tuple[Fault, ...] = ()
    cheats: Mapping[int, MakeMiner] = field(default_factory=dict)
    """Dishonest miners by index; nothing in production knows of such a thing."""
    replay_s: float = REPLAY_S
    """What a replay takes the validator. Where its checks of an outer step last longer than outer steps do, it leaves
    outer steps out, as in production."""


def named_hotkey(name: str) -> Hotkey:
    """A hotkey as the messages want it, with no key behind it: signatures are not simulated."""
    number = int.from_bytes(blake3(name.encode()).digest(length=48), "little")
    letters = []
    for _ in range(47):
        number, place = divmod(number, len(_BASE58))
        letters.append(_BASE58[place])
    return Hotkey("5" + "".join(letters))


class Swarm:
    """One simulated swarm. Miners are numbered: stage = index ÷ replicas, spares come last."""

    def __init__(self, scenario: Scenario, seed: int, stored: Mapping[str, bytes] = MappingProxyType({})) -> None:
        """`stored` lies in the object store from the beginning: the checkpoint that the run goes on from."""
        self.scenario = scenario
        spec = scenario.spec
        num_miners = spec.num_stages * spec.replicas
        self.hotkeys = tuple(named_hotkey(f"miner {index}") for index in range(num_miners + scenario.num_spares))
        validator = named_hotkey("validator")
        clock = VirtualClock()
        ledger = ChainLedger(_RULES, stakes={validator: _STAKE})
        for hotkey in (validator, *self.hotkeys):
            ledger.register(hotkey)
        self.world = World(
            spec=spec,
            seed=seed,
            clock=clock,
            network=Network(clock, seeded(seed, "network"), scenario.link),
            store=MemoryStore(clock, seeded(seed, "store")),
            ledger=ledger,
            tokens=SyntheticTokens(spec.model.vocab_size, spec.data.sequences_per_microbatch, spec.data.sequence_width),
        )
        for key, body in stored.items():
            self.world.store.hold(key, body)
        self.journal = MemoryJournal(Header(spec.digest, blake3(f"{seed} secret".encode()).digest()))
        self.ledger = MemoryLedger(spec.digest)
        self.orchestrator = OrchestratorHost(self.world, self.journal, self.ledger)
        self.validator = ValidatorHost(self.world, validator, scenario.replay_s)
        self.devices = tuple(
            Device(scenario.device, seeded(seed, f"device {index}")) for index in range(len(self.hotkeys))
        )
        self.miners: dict[int, MinerHost] = {}
        """The newest process of each miner that was ever started."""
        self._num_processes = [0] * len(self.hotkeys)
        self.num_steps = 0
        """Timers, messages and jobs that were due so far."""

    def start(self) -> None:
        """Everything but the spares comes up."""
        world = self.world
        world.network.attach(STORE, world.store.serve, self.scenario.store_rate_share, is_bulk=True)
        self.orchestrator.start()
        self.validator.start()
        rng = world.rng("start")
        for index in range(len(self.hotkeys) - self.scenario.num_spares):
            world.clock.schedule(rng.random() * _JOIN_SPREAD_S, partial(self.start_miner, index))

    def run(self) -> bool:
        """Lets time pass until everybody is through or the scenario's limit is reached; whether they are through."""
        clock = self.world.clock
        limit_s = clock.now_s() + self.scenario.virtual_s_max
        while not self.is_finished:
            if clock.now_s() >= limit_s or not clock.step():
                return False
            self.num_steps += 1
        return True

    @property
    def is_finished(self) -> bool:
        """Whether the run is over and every process that lives has done its part."""
        return (
            self.validator.core.is_done
            and bool(self.miners)
            and all(miner.core.is_finished for miner in self.miners.values() if miner.is_alive)
        )

    # --- processes ----------------------------------------------------------------------------------------------------

    def start_miner(self, index: int) -> None:
        """A process of this miner comes up, unless one is."""
        if self.is_miner_alive(index):
            return
        spec = self.scenario.spec
        stage_wish = index // spec.replicas if index < spec.num_stages * spec.replicas else None
        make = self.scenario.cheats.get(index, MinerHost)
        miner = make(self.world, self.hotkeys[index], self.devices[index], stage_wish, self._num_processes[index])
        self._num_processes[index] += 1
        self.miners[index] = miner
        self.world.log.write(f"{self.world.clock.now_s():.6f} {miner.address} starts")
        miner.start()

    def kill_miner(self, index: int) -> None:
        """The miner's process ends without a word."""
        self.world.log.write(f"{self.world.clock.now_s():.6f} {self.hotkeys[index]} is killed")
        self.miners[index].kill()

    def is_miner_alive(self, index: int) -> bool:
        return index in self.miners and self.miners[index].is_alive

    def kill_orchestrator(self) -> None:
        """The orchestrator's process ends without a word; its journal and ledger stay."""
        self.world.log.write(f"{self.world.clock.now_s():.6f} {self.orchestrator.address} is killed")
        self.orchestrator.kill()

    def restart_orchestrator(self) -> None:
        """A new process of the orchestrator begins from the journal."""
        self.world.log.write(f"{self.world.clock.now_s():.6f} {self.orchestrator.address} starts again")
        self.orchestrator = OrchestratorHost(self.world, self.journal, self.ledger)
        self.orchestrator.start()

    # --- what came of it ----------------------------------------------------------------------------------------------

    def status(self) -> RunStatus:
        """The run's status now."""
        return self.orchestrator.core.status(self.world.clock.now_s())

    def losses(self) -> tuple[LossPoint, ...]:
        """The loss of every applied microbatch, in order of arrival."""
        points: list[LossPoint] = []
        while True:
            batch = self.orchestrator.core.losses(LossQuery(offset=len(points)))
            points.extend(batch.points)
            if not batch.points:
                return tuple(points)

    def chain_weights(self) -> dict[int, float]:
        """Each miner's share of what the validator has set on the chain, by index."""
        row = self.validator.chain_weights()
        total = sum(row.values())
        uids = {neuron.hotkey: neuron.uid for neuron in self.world.metagraph().neurons}
        return {index: row.get(uids[hotkey], 0) / total for index, hotkey in enumerate(self.hotkeys)} if total else {}
