"""What goes wrong in a simulated run: kinds of faults and seeded schedules of them. Pure; `injector` carries them out.

A fault is tied to a phase rather than to a time: it begins a while after a stage entered a phase of an outer step, so
every schedule meets the phases it was drawn for, whatever came before. Invariants: a schedule is a pure function of its
seed; it never takes the last replica of a stage for good, so that every run can end.
"""

from dataclasses import dataclass
from enum import StrEnum
from random import Random

from orion.common.ids import Phase


class FaultKind(StrEnum):
    CRASH = "crash"
    """A miner's process ends and never comes back."""
    RESTART = "restart"
    """A miner's process ends; after `duration_s` a new one begins under the same hotkey, knowing nothing."""
    STOP = "stop"
    """A miner's process stands still for `duration_s`, its connections open, and then goes on where it was."""
    ORCHESTRATOR_RESTART = "orchestrator_restart"
    """The orchestrator's process ends; after `duration_s` a new one begins from the journal."""
    DELAY = "delay"
    """Messages of a miner are late by up to `strength` seconds, and overtake each other."""
    DUPLICATE = "duplicate"
    """A share `strength` of all messages arrives twice."""
    DROP = "drop"
    """A share `strength` of a miner's messages is lost."""
    ONE_WAY_PARTITION = "one_way_partition"
    """Nothing from a miner reaches the neighbouring stage."""
    TWO_WAY_PARTITION = "two_way_partition"
    """A miner and the neighbouring stage cannot reach each other."""
    UNHEARD = "unheard"
    """Nothing from a miner reaches the orchestrator, though it hears and works on."""
    CUT_OFF = "cut_off"
    """A miner reaches nobody, and nobody reaches it."""
    SLOW_DEVICE = "slow_device"
    """A miner's device takes `strength` times as long."""
    LOST_FEED = "lost_feed"
    """No state feed reaches a miner."""
    STORE_TROUBLE = "store_trouble"
    """The store refuses a share `strength` of requests for now, and takes seconds over each write."""


@dataclass(frozen=True, slots=True)
class Fault:
    """One thing that goes wrong."""

    kind: FaultKind
    stage_index: int
    """Of the trigger."""
    outer_step: int
    phase: Phase
    after_s: float
    """From the moment the stage entered that phase."""
    duration_s: float
    """At least; what harms messages or jobs stays until it has harmed one. Without meaning for CRASH."""
    miner: int = 0
    """Index of the miner it befalls; stage = index ÷ replicas."""
    other_stage: int = 0
    """The stage on the other side of a partition."""
    strength: float = 0.0

    def __str__(self) -> str:
        where = f"stage {self.stage_index} {self.phase} {self.outer_step} + {self.after_s:.2f} s"
        return (
            f"{self.kind} of miner {self.miner} (other stage {self.other_stage}, strength {self.strength:.2f}) "
            f"for {self.duration_s:.1f} s from {where}"
        )


PHASE_SPAN_S = {Phase.TRAIN: 2.5, Phase.UPLOAD: 0.3, Phase.MERGE: 0.6}
"""About how long each phase of a tiny run lasts: a fault begins within it. The first train phase includes joining."""
_PHASE_WEIGHTS = {Phase.TRAIN: 3, Phase.UPLOAD: 1, Phase.MERGE: 1}
"""How often each is drawn: most of what can go wrong is in flight while a stage trains."""

_STRENGTHS = {
    FaultKind.DELAY: (0.2, 2.0),
    FaultKind.DUPLICATE: (0.2, 0.8),
    FaultKind.DROP: (0.1, 0.5),
    FaultKind.SLOW_DEVICE: (2.0, 10.0),
    FaultKind.STORE_TROUBLE: (0.2, 0.7),
}
_DURATIONS_S = {
    FaultKind.RESTART: (0.5, 12.0),
    FaultKind.ORCHESTRATOR_RESTART: (0.1, 4.0),
}
_DURATION_S = (1.0, 8.0)
"""Of all others."""


_NEEDS_WORK = frozenset({FaultKind.ONE_WAY_PARTITION, FaultKind.TWO_WAY_PARTITION, FaultKind.SLOW_DEVICE})
"""Harm nothing while their miner is given no microbatches, which may be so for a whole outer step: they come early."""
_NEEDS_NEIGHBOUR = frozenset({FaultKind.ONE_WAY_PARTITION, FaultKind.TWO_WAY_PARTITION})
_NAMES_NO_MINER = frozenset({FaultKind.ORCHESTRATOR_RESTART, FaultKind.DUPLICATE, FaultKind.STORE_TROUBLE})


@dataclass(frozen=True, slots=True)
class Shape:
    """What a schedule must know of the run it is drawn for."""

    num_stages: int
    replicas: int
    outer_steps: int


def draw_schedule(rng: Random, shape: Shape, num_faults: int) -> tuple[Fault, ...]:
    """`num_faults` faults of kinds, targets and times drawn evenly.

    Crashes leave each stage a replica. What has crashed for good is not harmed otherwise: such a fault could not fire.
    """
    schedule: list[Fault] = []
    harmed: set[int] = set()
    crashed: set[int] = set()
    while len(schedule) < num_faults:
        fault = _draw(rng, shape)
        touched = set() if fault.kind in _NAMES_NO_MINER else {fault.miner}
        if fault.kind is FaultKind.CRASH:
            replicas_crashed = sum(miner // shape.replicas == fault.stage_index for miner in crashed)
            if fault.miner in harmed or replicas_crashed == shape.replicas - 1:
                continue
            crashed.add(fault.miner)
        elif touched & crashed:
            continue
        harmed |= touched
        schedule.append(fault)
    return tuple(schedule)


def _draw(rng: Random, shape: Shape) -> Fault:
    kind = rng.choice([kind for kind in FaultKind if shape.num_stages > 1 or kind not in _NEEDS_NEIGHBOUR])
    (phase,) = rng.choices(list(_PHASE_WEIGHTS), weights=list(_PHASE_WEIGHTS.values()))
    stage_index = rng.randrange(shape.num_stages)
    neighbour = stage_index + 1 if stage_index + 1 < shape.num_stages else max(0, stage_index - 1)
    return Fault(
        kind=kind,
        stage_index=stage_index,
        outer_step=0 if kind in _NEEDS_WORK else rng.randrange(shape.outer_steps - 1),
        phase=phase,
        after_s=rng.random() * PHASE_SPAN_S[phase],
        duration_s=rng.uniform(*_DURATIONS_S.get(kind, _DURATION_S)),
        miner=stage_index * shape.replicas + rng.randrange(shape.replicas),
        other_stage=neighbour,
        strength=rng.uniform(*_STRENGTHS.get(kind, (0.0, 0.0))),
    )
