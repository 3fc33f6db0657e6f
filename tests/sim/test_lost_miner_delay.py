"""How long a miner that is killed keeps the others waiting, in virtual time: in each phase, and for each kind of stage.

A run with the kill is compared with the run of the same seed without it. Both are the same until the kill.
"""

from collections.abc import Sequence

import pytest

from orion.common.ids import Phase
from orion.orchestrator.events import Announce
from orion.simulator.faults import Fault, FaultKind
from orion.simulator.host import Host
from orion.simulator.orchestrator_host import OrchestratorHost
from orion.simulator.scenarios import calm
from orion.simulator.simulation import watched
from orion.simulator.swarm import Scenario, Swarm

REPLICAS = 3
SEED = 5
STRUCK_STEP = 0
DELAY_S = 1.5
"""What a kill may cost the outer step that it falls into. Of this, a quarter of a second is grace and another one the
orchestrator's tick; what was lost with the miner is then done again, at a tenth of a second for each pass."""


class OpeningTimes:
    """Observes when each outer step's train phase opens."""

    def __init__(self, swarm: Swarm) -> None:
        self._clock = swarm.world.clock
        self.opened_s: dict[int, float] = {}

    def handled(self, host: Host, event: object, effects: Sequence[object]) -> None:
        if not isinstance(host, OrchestratorHost) or not any(isinstance(effect, Announce) for effect in effects):
            return
        stages = host.stage_states()
        steps = {stage.outer_step for stage in stages if stage.phase is Phase.TRAIN}
        if len(steps) == 1 and all(stage.phase is Phase.TRAIN for stage in stages):
            self.opened_s.setdefault(steps.pop(), self._clock.monotonic_s())


def scenario(*faults: Fault) -> Scenario:
    return calm(outer_steps=2, inner_steps=3, replicas=REPLICAS, checks_per_outer_step=0, faults=faults)


def step_s(scenario: Scenario) -> float:
    """How long the struck outer step takes, from its opening to that of the next one."""
    swarm = Swarm(scenario, SEED)
    times = OpeningTimes(swarm)
    swarm.world.observers.append(times)
    result = watched(swarm, SEED)
    assert all(outcome.has_fired for outcome in result.faults)
    for outcome in result.faults:
        assert outcome.began_s is not None
        assert times.opened_s[STRUCK_STEP] <= outcome.began_s <= times.opened_s[STRUCK_STEP + 1]
    assert result.status.microbatches_cancelled == result.status.microbatches_repaired.released, "something is lost"
    return times.opened_s[STRUCK_STEP + 1] - times.opened_s[STRUCK_STEP]


@pytest.fixture(scope="module")
def calm_step_s() -> float:
    return step_s(scenario())


@pytest.mark.parametrize(
    ("phase", "after_s", "stage_index"),
    [
        (Phase.TRAIN, 2.0, 0),
        (Phase.TRAIN, 3.2, 1),
        (Phase.UPLOAD, 0.0, 0),
        (Phase.UPLOAD, 0.1, 1),
        (Phase.MERGE, 0.0, 2),
        (Phase.MERGE, 0.15, 1),
    ],
)
def test_a_killed_miner_keeps_nobody_waiting(
    phase: Phase, after_s: float, stage_index: int, calm_step_s: float
) -> None:
    # The train phase of outer step 0 includes joining, and takes until the fourth second.
    miner = stage_index * REPLICAS
    kill = Fault(FaultKind.CRASH, stage_index, STRUCK_STEP, phase, after_s=after_s, duration_s=0.0, miner=miner)
    assert step_s(scenario(kill)) <= calm_step_s + DELAY_S
