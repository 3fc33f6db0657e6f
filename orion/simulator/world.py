"""What all hosts of one simulation share, and who is told about every event.

It owns nothing that decides. Randomness is split by purpose, so that what one host draws never changes another's draws.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from random import Random
from typing import TYPE_CHECKING, Protocol

from orion.common.config import RunSpec
from orion.common.ids import Hotkey
from orion.common.net.chain import Metagraph
from orion.common.net.memory_chain import ChainLedger
from orion.miner.memory_archive import MemoryDisk
from orion.simulator.clock import VirtualClock
from orion.simulator.event_log import EventLog
from orion.simulator.network import Network
from orion.simulator.store import MemoryStore
from orion.simulator.tokens import SyntheticTokens

if TYPE_CHECKING:
    from orion.simulator.host import Host


def seeded(seed: int, purpose: str) -> Random:
    """A generator of its own for each purpose; the same for the same seed."""
    return Random(f"{seed} {purpose}")


class Observer(Protocol):
    """Hears about every event that a core has handled, before its effects are carried out."""

    def handled(self, host: "Host", event: object, effects: Sequence[object]) -> None: ...


@dataclass(slots=True, eq=False)
class World:
    """One simulated world."""

    spec: RunSpec
    seed: int
    clock: VirtualClock
    network: Network
    store: MemoryStore
    ledger: ChainLedger
    tokens: SyntheticTokens
    disks: dict[Hotkey, MemoryDisk] = field(default_factory=dict)
    """What miners' processes leave behind."""
    log: EventLog = field(default_factory=EventLog)
    observers: list[Observer] = field(default_factory=list)

    def metagraph(self) -> Metagraph:
        """The chain as it stands now: a block has passed every `block_s` virtual seconds."""
        self.let_blocks_pass()
        return self.ledger.metagraph()

    def let_blocks_pass(self) -> None:
        """Brings the chain to the present."""
        self.ledger.advance_to(int(self.clock.monotonic_s() / self.ledger.hyperparameters.block_s))

    def rng(self, purpose: str) -> Random:
        """A generator of its own for each purpose; the same for the same seed."""
        return seeded(self.seed, purpose)

    def handled(self, host: "Host", event: object, effects: Sequence[object]) -> None:
        """Writes the event down and tells the observers."""
        self.log.record(self.clock.now_s(), host.address, event, effects)
        for observer in self.observers:
            observer.handled(host, event, effects)
