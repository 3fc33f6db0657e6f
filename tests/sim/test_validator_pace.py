"""A validator whose checks last longer than outer steps do leaves outer steps out; one that keeps up leaves none."""

from dataclasses import replace

from orion.simulator.adversaries.adversary import Plot
from orion.simulator.adversaries.trial import Watch
from orion.simulator.scenarios import calm
from orion.simulator.swarm import Swarm

OUTER_STEPS = 4


def checked_steps(replay_s: float) -> set[int]:
    swarm = Swarm(replace(calm(outer_steps=OUTER_STEPS, checks_per_outer_step=6), replay_s=replay_s), 1)
    watch = Watch(swarm, Plot())
    swarm.world.observers.append(watch)
    swarm.start()
    assert swarm.run()
    return {outer_step for _, outer_step, _ in watch.verdicts}


def test_outer_steps_are_left_out_by_who_cannot_keep_up() -> None:
    assert checked_steps(0.02) == set(range(OUTER_STEPS))
    slow = checked_steps(3.0)
    assert slow and slow < set(range(OUTER_STEPS))
