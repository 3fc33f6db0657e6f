"""A validator's process in a simulation: the real core, hands and replay, in virtual time.

It owns what the real loop owns around them: the feed and ticks. The chain is reached at once; everything else goes over
the simulated network.
"""

from collections.abc import Mapping

import torch

from orion.common.ids import Hotkey
from orion.common.net.anchor_loader import AnchorLoader
from orion.common.net.ledger_reader import LedgerReader
from orion.common.net.memory_chain import MemoryChain
from orion.common.offload import in_place
from orion.common.protocol.messages import Feed
from orion.simulator.clients import SimulatedObjects, SimulatedOrchestrator, SimulatedRpc
from orion.simulator.host import ORCHESTRATOR, Ask, Host, Pause
from orion.simulator.miner_host import FEED_PAUSE_S, FEED_WAIT_S, HOST_DEVICE
from orion.simulator.network import Address, Respond
from orion.simulator.orchestrator_host import FeedQuery
from orion.simulator.world import World
from orion.validator.core import ValidatorCore
from orion.validator.events import Effect, Event, FeedArrived, Replay, Ticked
from orion.validator.hands import Hands

TICK_S = 0.5
REPLAY_S = 0.5
"""What a replay takes beside fetching the anchor, where the scenario does not say."""


class ValidatorHost(Host):
    """One process of a validator."""

    def __init__(self, world: World, hotkey: Hotkey, replay_s: float = REPLAY_S) -> None:
        super().__init__(hotkey, world.clock, world.network)
        self.world = world
        self._replay_s = replay_s
        self.core = ValidatorCore(world.spec, hotkey, world.rng(f"validator {hotkey}"))
        orchestrator = SimulatedOrchestrator()
        objects = SimulatedObjects(orchestrator)
        self._hands = Hands(
            world.spec,
            orchestrator,
            SimulatedRpc(hotkey),
            AnchorLoader(orchestrator, objects, world.spec, in_place),
            MemoryChain(world.ledger, hotkey),
            ledger=LedgerReader(orchestrator, world.spec, None, in_place),
            objects=objects,
            tokens=world.tokens,
            device=HOST_DEVICE,
            compute_dtype=torch.float32,
            clock=world.clock,
            on_device=in_place,
            offload=in_place,
        )

    def start(self) -> None:
        super().start()
        self.spawn(self._watch_feed())
        self.spawn(self._tick())

    def handle(self, event: Event) -> None:
        """Gives an event to the core and carries out what it wants."""
        effects = self.core.handle(event, self.clock.now_s())
        self.world.handled(self, event, effects)
        for effect in effects:
            self.spawn(self._carry_out(effect))

    def serve(self, source: Address, request: object, respond: Respond) -> None:
        """Nobody asks a validator anything."""
        raise AssertionError(f"a validator is asked {request!r}")

    async def _carry_out(self, effect: Effect) -> None:
        if isinstance(effect, Replay):
            await Pause(self._replay_s)
        self.world.let_blocks_pass()
        event = await self._hands.carry_out(effect)
        if event is not None:
            self.handle(event)

    async def _watch_feed(self) -> None:
        version, wait_s = 0, 0.0
        while not self.core.is_done:
            feed = await Ask(ORCHESTRATOR, FeedQuery(version, wait_s), timeout_s=FEED_WAIT_S + FEED_PAUSE_S)
            if not isinstance(feed, Feed):
                await Pause(FEED_PAUSE_S)
                continue
            version, wait_s = feed.version, FEED_WAIT_S
            self.handle(FeedArrived(feed))

    async def _tick(self) -> None:
        while not self.core.is_done:
            await Pause(TICK_S)
            self.handle(Ticked())

    def chain_weights(self) -> Mapping[int, int]:
        """What this validator has set on the chain: uid to u16."""
        return self.world.ledger.weights_of(Hotkey(self.address))
