"""A dishonest miner's process: the real one with one behaviour replaced, and a record of what it did and saved.

It owns what all attackers have in common; each attack is a small class in a module of its own. Nothing in production
knows of any of this. Invariant: an attack counts in its plot each time it really replaces something.
"""

from collections import Counter
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor

from orion.common.ids import Hotkey, MicrobatchId
from orion.common.train.engine import BackwardResult, ForwardResult, InnerStepReport, StageEngine
from orion.miner.effects import Compute
from orion.simulator.device import Device
from orion.simulator.host import Pause
from orion.simulator.miner_host import MinerHost
from orion.simulator.world import World


@dataclass(slots=True, eq=False)
class Plot:
    """What the attackers of one trial share: their record, and what accomplices tell each other."""

    attacks: Counter[Hotkey] = field(default_factory=Counter)
    """Times that each attacker did something dishonest."""
    num_claimed: int = 0
    """Passes (forward or backward) that the attackers said they had computed."""
    num_computed: int = 0
    """Passes that they did compute."""
    members: list[Hotkey] = field(default_factory=list)
    """The attackers, in the order in which their processes started."""
    free_s: float = 0.0
    """When the one device that they share is idle again."""
    told: dict[object, object] = field(default_factory=dict)
    """What accomplices tell each other."""

    @property
    def effort(self) -> float:
        """Share of the claimed passes that were computed."""
        return self.num_computed / self.num_claimed if self.num_claimed else 0.0


class Adversary(MinerHost):
    """One process of an attacker. Without a subclass it behaves honestly."""

    device_share: float = 1.0
    """What its device's jobs take, as a share of an honest miner's: less where it computes less."""
    engine_type: "type[AdversaryEngine] | None" = None
    """What runs the stage; None = an honest engine whose passes are counted."""

    def __init__(
        self, world: World, hotkey: Hotkey, device: Device, stage_wish: int | None, incarnation: int, *, plot: Plot
    ) -> None:
        self.plot = plot
        if hotkey not in plot.members:
            plot.members.append(hotkey)
        if self.device_share != 1.0:
            profile = device.profile
            faster = replace(
                profile,
                forward_s=profile.forward_s * self.device_share,
                backward_s=profile.backward_s * self.device_share,
                inner_step_s=profile.inner_step_s * self.device_share,
            )
            device = Device(faster, device.rng)
        super().__init__(world, hotkey, device, stage_wish, incarnation)

    def attacked(self) -> None:
        """It has just done something dishonest."""
        self.plot.attacks[self.hotkey] += 1

    def make_engine(self, *arguments: Any, **options: Any) -> StageEngine:
        engine_type = AdversaryEngine if self.engine_type is None else self.engine_type
        engine = engine_type(*arguments, **options)
        engine.adversary = self
        return engine


class AdversaryEngine(StageEngine):
    """An engine that counts what it is asked for and what it computes. Subclasses replace `bent_…`."""

    adversary: Adversary

    def forward(self, microbatch_id: MicrobatchId, x_BTC: Tensor | None, ids_BU: Tensor) -> ForwardResult:
        self.adversary.plot.num_claimed += 1
        return self.bent_forward(microbatch_id, x_BTC, ids_BU)

    def backward(self, microbatch_id: MicrobatchId, grad_BTC: Tensor) -> BackwardResult:
        self.adversary.plot.num_claimed += 1
        return self.bent_backward(microbatch_id, grad_BTC)

    def bent_forward(self, microbatch_id: MicrobatchId, x_BTC: Tensor | None, ids_BU: Tensor) -> ForwardResult:
        """What it gives for a forward."""
        return self.honest_forward(microbatch_id, x_BTC, ids_BU)

    def bent_backward(self, microbatch_id: MicrobatchId, grad_BTC: Tensor) -> BackwardResult:
        """What it gives for a backward."""
        return self.honest_backward(microbatch_id, grad_BTC)

    def honest_forward(self, microbatch_id: MicrobatchId, x_BTC: Tensor | None, ids_BU: Tensor) -> ForwardResult:
        self.adversary.plot.num_computed += 1
        return super().forward(microbatch_id, x_BTC, ids_BU)

    def honest_backward(self, microbatch_id: MicrobatchId, grad_BTC: Tensor) -> BackwardResult:
        self.adversary.plot.num_computed += 1
        return super().backward(microbatch_id, grad_BTC)


class IdleEngine(AdversaryEngine):
    """An engine that accumulates nothing and never changes its parameters, and says that it does."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._num_pretended = 0

    def backward(self, microbatch_id: MicrobatchId, grad_BTC: Tensor) -> BackwardResult:
        self._num_pretended += 1
        return super().backward(microbatch_id, grad_BTC)

    def drop(self, microbatch_id: MicrobatchId) -> None:
        """Nothing is held."""

    def begin_outer_step(self) -> tuple[MicrobatchId, ...]:
        self._num_pretended = 0
        return super().begin_outer_step()

    def inner_step(self, inner_step_index: int, share: float = 1.0) -> InnerStepReport:
        num_microbatches, self._num_pretended = self._num_pretended, 0
        return InnerStepReport(1.0, False, num_microbatches, None, self.version)


class SharedDeviceHost(Adversary):
    """A process whose device other processes of the same operator use too: one job at a time over all of them."""

    async def _compute(self, effect: Compute) -> None:
        view = self.core.view
        self.device.is_last_stage = view is not None and view.stage_index == self.world.spec.num_stages - 1
        now_s = self.clock.now_s()
        if self.hotkey != self.plot.members[0]:
            self.attacked()
        self.plot.free_s = max(now_s, self.plot.free_s) + self.device.duration_s(effect.job)
        await Pause(self.plot.free_s - now_s)
        self.handle(await self._hands.compute(effect))
