"""`RunWatch`: what is remembered of a run for people, beside the core.

Owns the histories and when they are added to. It hears of every event after the core has handled it, also of those
that a restart replays: so after a restart it knows again what happened since the snapshot that the restart began with,
and the losses that the core itself remembers. Pure.
"""

from collections import deque
from collections.abc import Sequence
from functools import partial

from orion.common.ids import MemberState
from orion.orchestrator.core import OrchestratorCore
from orion.orchestrator.dashboard.chronicle import Chronicle
from orion.orchestrator.dashboard.rings import SAMPLE_S, LossCurve, Sample, SampleRing
from orion.orchestrator.events import Effect, Event
from orion.orchestrator.state import RunState

RECENT_S = 20.0
"""The time over which the present rate is taken: blocking runs stand still for seconds while they merge."""
_POINTS_MAX = 65_536
"""Losses taken in with one sample, so that no sample takes long."""


class RunWatch:
    """The histories of one run."""

    def __init__(self, core: OrchestratorCore) -> None:
        """The core must be new: what it handled before is not seen."""
        self.core = core
        spec = core.spec
        self.chronicle = Chronicle(spec.num_stages)
        self.ring = SampleRing()
        self.recent: deque[Sample] = deque(maxlen=round(RECENT_S / SAMPLE_S) + 1)
        self.curve = LossCurve(spec.inner_steps, spec.inner_steps * spec.microbatches_per_step * spec.replicas)

    def handled(self, event: Event, effects: Sequence[Effect]) -> None:
        """The core has handled an event."""
        self.core.look(partial(self._take, event, effects))

    def _take(self, event: Event, effects: Sequence[Effect], state: RunState) -> None:
        self.chronicle.handled(state, event, effects)
        now_s = state.memory.now_s
        if self.recent and now_s < self.recent[-1].time_s + SAMPLE_S:
            return
        sample = _sample(state)
        self.recent.append(sample)
        if self.ring.is_due(now_s):
            self.ring.add(sample)
        self._take_losses(state)

    def _take_losses(self, state: RunState) -> None:
        history = state.memory.losses
        start = max(0, self.curve.num_points - history.num_dropped)
        chosen = slice(start, start + _POINTS_MAX)
        self.curve.add(history.outer_steps[chosen], history.losses[chosen], history.times_s[chosen])


def _sample(state: RunState) -> Sample:
    membership, applied = state.memory.membership, state.memory.leases.num_applied
    active = [
        member
        for stage_index in range(state.memory.num_stages)
        for member in membership.stages[stage_index].values()
        if member.state is MemberState.ACTIVE
    ]
    shares = [member.heartbeat.busy_share for member in active if member.heartbeat is not None]
    return Sample(
        time_s=state.memory.now_s,
        tokens=applied * state.spec.tokens_per_microbatch,
        applied=applied,
        busy=sum(shares) / len(shares) if shares else None,
        num_active=len(active),
    )
