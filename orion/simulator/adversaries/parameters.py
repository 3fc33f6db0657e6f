"""Attackers whose passes are honest and whose parameters are not: what they train from, and what they upload.

Letters in names: N flat parameters.
"""

from collections.abc import Mapping

from blake3 import blake3
from torch import Tensor

from orion.common.ids import Digest
from orion.common.protocol.codec import Body
from orion.common.protocol.keys import parse_key, pseudo_gradient_key
from orion.common.protocol.messages import Done, ObjectRef, Uploaded
from orion.common.protocol.refusals import RefusedError
from orion.common.train.outer import OuterState
from orion.simulator.adversaries.adversary import Adversary, AdversaryEngine
from orion.simulator.clients import SimulatedObjects, SimulatedOrchestrator
from orion.simulator.host import STORE, Ask, Pause
from orion.simulator.store import PutObject

COPY_PAUSE_S = 0.05
COPY_TRIES_MAX = 40
"""Looks for another replica's upload, two seconds in all; then its own goes out."""


# --- stale parameters -------------------------------------------------------------------------------------------------


class _StaleEngine(AdversaryEngine):
    """Computes from the first anchor that it was ever given, and says that it stands on the newest."""

    _first: OuterState | None = None
    _newest: OuterState | None = None

    @property
    def outer_state(self) -> OuterState:
        return super().outer_state if self._newest is None else self._newest

    def load(self, state: OuterState) -> None:
        if self._first is None:
            self._first = state
        else:
            self.adversary.attacked()
        self._newest = state
        super().load(OuterState(self._first.anchor_N, self._first.momentum_N, state.outer_step))

    def pseudo_gradient_N(self) -> Tensor:
        """What it has really done since it began from its old anchor."""
        assert self._first is not None
        return super().pseudo_gradient_N() - self.outer_state.anchor_N + self._first.anchor_N


class StaleParameters(Adversary):
    """Never applies a merge."""

    engine_type = _StaleEngine


# --- pseudo-gradients -------------------------------------------------------------------------------------------------


class _ScaledEngine(AdversaryEngine):
    """Uploads a multiple of its pseudo-gradient, within the bound beyond which reducers leave it out."""

    def pseudo_gradient_N(self) -> Tensor:
        self.adversary.attacked()
        return super().pseudo_gradient_N() * SCALE


SCALE = 8.0


class _PoisonedEngine(AdversaryEngine):
    """Uploads its pseudo-gradient with the sign flipped, three times as long."""

    def pseudo_gradient_N(self) -> Tensor:
        self.adversary.attacked()
        return super().pseudo_gradient_N() * POISON


POISON = -3.0


class ScaledPseudoGradient(Adversary):
    engine_type = _ScaledEngine


class PoisonedPseudoGradient(Adversary):
    engine_type = _PoisonedEngine


class _CopyingObjects(SimulatedObjects):
    """Writes another replica's pseudo-gradient under its own name."""

    def __init__(self, orchestrator: SimulatedOrchestrator, adversary: Adversary) -> None:
        super().__init__(orchestrator)
        self._adversary = adversary
        self.written: dict[str, ObjectRef] = {}

    async def put_many(self, bodies: Mapping[str, Body]) -> list[ObjectRef]:
        refs: list[ObjectRef] = []
        for key, body in bodies.items():
            copied = await self._copy_of(key)
            if copied is None:
                refs += await super().put_many({key: body})
                continue
            ref = ObjectRef(key=key, digest=Digest(blake3(copied).hexdigest()), size_bytes=len(copied))
            await self._grant_writing([ref])
            await Ask(STORE, PutObject(key, copied), len(copied))
            self._adversary.attacked()
            self.written[key] = ref
            refs.append(ref)
        return refs

    async def _copy_of(self, key: str) -> bytes | None:
        """The object that another replica wrote in the same place. The store shows it to nobody while others upload, so
        it is taken out of the store's memory: a replica that hands it over stands behind that."""
        name = parse_key(key)
        if name is None or name.kind != "pseudo-gradient" or name.partition_index is None:
            return None
        world, view = self._adversary.world, self._adversary.core.view
        assert view is not None
        for _ in range(COPY_TRIES_MAX):
            for peer in view.active(name.stage_index):
                if peer not in self._adversary.plot.members:
                    other = pseudo_gradient_key(name.outer_step, name.stage_index, peer, name.partition_index)
                    body = world.store.get(other)
                    if body is not None:
                        await self._is_refused(other)
                        return body
            await Pause(COPY_PAUSE_S)
        return None

    async def _is_refused(self, key: str) -> None:
        """Asks for the object as everybody may, and counts when that is refused."""
        try:
            await self._grant_reading([key])
        except RefusedError:
            self._adversary.plot.told["refused"] = True


class _CopyingOrchestrator(SimulatedOrchestrator):
    """Announces what was really written."""

    objects: _CopyingObjects | None = None

    async def uploaded(self, uploaded: Uploaded) -> Done:
        assert self.objects is not None
        if not uploaded.is_stored:
            return Done()  # who commits to digests before it has read others' has nothing to copy
        contribution = uploaded.contribution
        objects = tuple(self.objects.written.get(ref.key, ref) for ref in contribution.objects)
        renamed = contribution.model_copy(update={"objects": objects})
        return await super().uploaded(uploaded.model_copy(update={"contribution": renamed}))


class CopiedPseudoGradient(Adversary):
    """Uploads the pseudo-gradient of another replica."""

    def make_orchestrator(self) -> SimulatedOrchestrator:
        return _CopyingOrchestrator()

    def make_objects(self, orchestrator: SimulatedOrchestrator) -> SimulatedObjects:
        assert isinstance(orchestrator, _CopyingOrchestrator)
        orchestrator.objects = _CopyingObjects(orchestrator, self)
        return orchestrator.objects
