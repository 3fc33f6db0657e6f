"""Credits and injection in a whole simulated swarm: few credits starve nobody, and the flow follows the pipeline."""

from random import Random
from statistics import mean

import pytest

from orion.miner.core import MinerCore
from orion.miner.injection import Injection, TripTimes
from orion.simulator.miner_host import MinerHost
from orion.simulator.scenarios import calm
from orion.simulator.simulation import run_scenario
from orion.simulator.swarm import MakeMiner, Scenario, Swarm

SEED = 1


def with_credits(scenario: Scenario, credits: int) -> Scenario:
    flow = scenario.spec.flow.model_copy(update={"in_flight_max": credits})
    return Scenario(
        name="credits",
        spec=scenario.spec.model_copy(update={"flow": flow}),
        virtual_s_max=scenario.virtual_s_max,
        num_spares=scenario.num_spares,
        cheats=scenario.cheats,
    )


@pytest.mark.parametrize(("num_stages", "replicas"), [(3, 2), (2, 1)])
def test_one_credit_everywhere_is_enough_to_get_everything_through(num_stages: int, replicas: int) -> None:
    scenario = calm(num_stages=num_stages, replicas=replicas, outer_steps=1, inner_steps=3)
    result = run_scenario(with_credits(scenario, 1), SEED)
    assert result.status.microbatches_applied == 3 * 2 * replicas
    assert result.status.microbatches_cancelled == 0


class Fixed(Injection):
    """As many in flight as there are credits."""

    @property
    def target(self) -> int:
        return 24


class Seen:
    """Trips as the first stage saw them."""

    def __init__(self) -> None:
        self.trips: list[TripTimes] = []
        self.ends_s: list[float] = []

    def rate(self) -> float:
        """Trips a second between the first and the last fifth, when all is under way."""
        ends_s = sorted(self.ends_s)
        first, last = len(ends_s) // 5, 4 * len(ends_s) // 5
        return (last - first) / (ends_s[last] - ends_s[first])

    def most_in_flight(self) -> float:
        return max(trip.num_in_flight for trip in self.trips)

    def mean_s(self) -> float:
        return sum(trip.seconds for trip in self.trips) / len(self.trips)


def watched(seen: Seen, injection_type: type[Injection], slowness: float) -> MakeMiner:
    class Watched(MinerHost):
        def make_core(self, rng: Random) -> MinerCore:
            spec = self.world.spec
            host = self

            class Telling(injection_type):  # type: ignore[valid-type, misc]
                def ended(self, trip: TripTimes) -> None:
                    seen.trips.append(trip)
                    seen.ends_s.append(host.clock.now_s())
                    super().ended(trip)

            self.device.slowdowns.append(slowness)
            return MinerCore(
                spec,
                self.hotkey,
                rng,
                self.evidence.kept(),
                Telling(spec.num_stages, spec.flow.in_flight_max),
            )

    return Watched


def flow_of(injection_type: type[Injection], seed: int) -> Seen:
    """One of the middle stage's miners takes three times as long; another one is lost on the way, and one joins."""
    seen = Seen()
    cheats = {index: watched(seen, injection_type, 3.0 if index == 2 else 1.0) for index in range(6)}
    scenario = with_credits(calm(outer_steps=1, inner_steps=16, cheats=cheats, num_spares=1), 24)
    swarm = Swarm(scenario, seed)
    swarm.start()
    clock = swarm.world.clock
    num_trips = 16 * 2 * 2
    was_killed = False
    while swarm.status().microbatches_applied < num_trips:
        assert clock.step()
        if len(seen.trips) >= num_trips // 3 and not was_killed:
            swarm.kill_miner(5)
            swarm.start_miner(6)
            was_killed = True
    assert was_killed
    return seen


def test_a_swarm_is_as_fast_as_with_all_credits_in_use_and_trips_wait_less() -> None:
    rates, times = [], []
    for seed in range(1, 4):
        found, flooded = flow_of(Injection, seed), flow_of(Fixed, seed)
        rates.append(found.rate() / flooded.rate())
        times.append(found.mean_s() / flooded.mean_s())
        assert found.most_in_flight() < 0.75 * flooded.most_in_flight()
    assert mean(rates) >= 1.0
    assert mean(times) <= 0.9
    assert max(times) < 1.0


def test_work_in_flight_survives_inner_steps_and_is_counted_by_their_number() -> None:
    scenario = calm(outer_steps=1, inner_steps=8, microbatches_per_step=1)
    result = run_scenario(with_credits(scenario, 24), SEED)
    status = result.status
    assert status.microbatches_applied == 8 * 2
    assert status.microbatches_cancelled == 0
    first, middle, last = (stage.counts for stage in status.staleness)
    assert sum(first[1:]) > 0, "nothing was in flight over an inner step"
    # Heartbeats tell it: what was done after the last one of the run is not in it.
    assert 0 < sum(first) <= 16 and 0 < sum(middle) <= 16
    assert sum(last) == 0, "the last stage does both passes at once"
