"""One simulated run from beginning to end: the swarm, its faults, the invariants, and what came of it.

It owns how these are put together. `run_scenario` is the door for tests and the command line.
"""

from dataclasses import dataclass

from orion.common.errors import OrionError
from orion.common.ids import Digest
from orion.common.protocol.records import (
    LossPoint,
    RunStatus,
)
from orion.simulator.injector import FaultOutcome, Injector
from orion.simulator.invariants import Invariants
from orion.simulator.swarm import Scenario, Swarm

_TAIL_LINES_SHOWN = 40


class SimulationFailedError(OrionError):
    """A run broke an invariant or did not finish; the message holds all that is needed to repeat it."""


@dataclass(frozen=True, slots=True)
class Result:
    """What came of a simulated run that broke no invariant and finished."""

    scenario: str
    seed: int
    virtual_s: float
    num_events: int
    """Events that cores handled."""
    num_steps: int
    """Timers, messages and jobs that were due, those of the network and the store included."""
    num_messages: int
    """Requests and answers that were put on the wire."""
    event_log_digest: Digest
    """The same for the same scenario and seed."""
    status: RunStatus
    losses: tuple[LossPoint, ...]
    chain_weights: dict[int, float]
    """Each miner's share of the chain weight, by index."""
    faults: tuple[FaultOutcome, ...]


def run_scenario(scenario: Scenario, seed: int) -> Result:
    """Simulates the scenario with this seed. Raises SimulationFailedError."""
    swarm = Swarm(scenario, seed)
    return watched(swarm, seed)


def watched(swarm: Swarm, seed: int) -> Result:
    """Runs a swarm that has not started yet, with its scenario's faults, under all invariants.

    Raises SimulationFailedError. For callers that want something of the swarm itself; others use `run_scenario`.
    """
    injector = Injector(swarm, swarm.scenario.faults)
    invariants = Invariants(swarm)
    swarm.world.observers += [invariants, injector]
    try:
        swarm.start()
        assert swarm.run(), f"5: not finished after {swarm.scenario.virtual_s_max:g} virtual seconds"
        invariants.check_end()
    except AssertionError as error:
        raise SimulationFailedError(_report(swarm, seed, injector, error)) from error
    return Result(
        scenario=swarm.scenario.name,
        seed=seed,
        virtual_s=swarm.world.clock.monotonic_s(),
        num_events=swarm.world.log.num_events,
        num_steps=swarm.num_steps,
        num_messages=swarm.world.network.num_messages,
        event_log_digest=swarm.world.log.digest(),
        status=swarm.status(),
        losses=swarm.losses(),
        chain_weights=swarm.chain_weights(),
        faults=injector.outcomes(),
    )


def _report(swarm: Swarm, seed: int, injector: Injector, error: AssertionError) -> str:
    """Everything that somebody needs who wants to know what went wrong."""
    status = swarm.status()
    stages = ", ".join(f"{stage.stage_index}: {stage.phase} {stage.outer_step}" for stage in status.stages)
    return "\n".join(
        [
            f"scenario {swarm.scenario.name}, seed {seed}: {error}",
            f"at {swarm.world.clock.monotonic_s():.3f} virtual s; stages {stages}",
            "faults:",
            *(f"  {outcome}" for outcome in injector.outcomes()),
            "notices:",
            *(f"  {notice}" for notice in status.notices[-_TAIL_LINES_SHOWN:]),
            "newest events:",
            *(f"  {line}" for line in list(swarm.world.log.tail)[-_TAIL_LINES_SHOWN:]),
        ]
    )
