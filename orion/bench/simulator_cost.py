"""What simulating a swarm costs: processor time of each outer step of a calm run, and how much faster than its time it
is."""

import time
from dataclasses import dataclass
from statistics import median

from orion.simulator.scenarios import calm
from orion.simulator.swarm import Swarm

OUTER_STEPS = 3


@dataclass(frozen=True, slots=True)
class SimulatorCost:
    """Of one shape of swarm; a median and the extremes over repetitions of `OUTER_STEPS` outer steps each."""

    num_stages: int
    replicas: int
    repetitions: int
    cpu_s_per_outer_step: float
    cpu_s_per_outer_step_least: float
    cpu_s_per_outer_step_most: float
    virtual_s_per_cpu_s: float


def simulator_cost(num_stages: int, replicas: int, repetitions: int) -> SimulatorCost:
    """Runs swarms of real cores, hands and tiny tensors with nothing going wrong, each with a seed of its own."""
    taken_s, rates = [], []
    for seed in range(repetitions):
        swarm = Swarm(calm(num_stages=num_stages, replicas=replicas, outer_steps=OUTER_STEPS), seed)
        began_s, began_virtual_s = time.process_time(), swarm.world.clock.monotonic_s()
        swarm.start()
        assert swarm.run(), "a calm run did not finish"
        seconds = time.process_time() - began_s
        taken_s.append(seconds / OUTER_STEPS)
        rates.append((swarm.world.clock.monotonic_s() - began_virtual_s) / seconds)
    return SimulatorCost(num_stages, replicas, repetitions, median(taken_s), min(taken_s), max(taken_s), median(rates))
