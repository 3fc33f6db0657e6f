"""Miners that join a run under way: where their anchor comes from, what they count for, and that nobody waits."""

from collections import Counter
from collections.abc import Mapping

from structlog.testing import capture_logs

from orion.common.ids import Hotkey, MemberState, Phase
from orion.common.protocol.messages import ManifestQuery, StateQuery
from orion.miner.effects import LoadAnchor
from orion.miner.hands import Deed
from orion.miner.state_parts import StateParts
from orion.simulator.faults import Fault, FaultKind
from orion.simulator.miner_host import MinerHost
from orion.simulator.scenarios import calm
from orion.simulator.simulation import Result, watched
from orion.simulator.swarm import MakeMiner, Swarm

SEED = 3
NEWCOMER = 4
LOOK_S = 0.25
"""Between two looks at whether the second outer step has begun."""


class CountedParts(StateParts):
    """Counts the parts that it hands out."""

    num_parts = 0

    def answer(self, query: StateQuery) -> bytes | None:
        answer = super().answer(query)
        self.num_parts += answer is not None and query.part_index is not None
        return answer


class LyingParts(CountedParts):
    """Hands out other bytes than it stands on."""

    def answer(self, query: StateQuery) -> bytes | None:
        answer = super().answer(query)
        return answer if answer is None or query.part_index is None else bytes(len(answer))


class Counting(MinerHost):
    def make_parts(self) -> StateParts:
        return CountedParts(self.worker)


class Lying(MinerHost):
    def make_parts(self) -> StateParts:
        return LyingParts(self.worker)


class Hanging(MinerHost):
    """Never gets its anchor, and never hears that it does not."""

    def _attempt(self, deed: Deed) -> None:
        if not isinstance(deed, LoadAnchor):
            super()._attempt(deed)


def joined(cheats: Mapping[int, MakeMiner], outer_steps: int = 4) -> tuple[Swarm, Result, int]:
    """A run of one stage of four replicas, one of which comes later; and the outer step that trained then."""
    crash = Fault(FaultKind.CRASH, 0, 1, Phase.TRAIN, after_s=0.3, duration_s=0.0, miner=3)
    shape = {"num_stages": 1, "replicas": 4, "inner_steps": 4}
    scenario = calm(outer_steps=outer_steps, num_spares=1, faults=[crash], cheats=cheats, **shape)
    swarm = Swarm(scenario, SEED)
    under_way: list[int] = []

    def join() -> None:
        if swarm.status().outer_step == 0:
            swarm.world.clock.schedule(LOOK_S, join)
            return
        under_way.append(swarm.status().outer_step)
        swarm.start_miner(NEWCOMER)

    swarm.world.clock.schedule(LOOK_S, join)
    result = watched(swarm, SEED)
    (outer_step,) = under_way
    assert outer_step == 1
    return swarm, result, outer_step


def parts_of(swarm: Swarm) -> Counter[int]:
    return Counter({index: host.parts.num_parts for index, host in swarm.miners.items()})  # type: ignore[attr-defined]


def state_of(swarm: Swarm, result: Result, index: int) -> MemberState:
    (found,) = [miner.state for miner in result.status.miners if miner.hotkey == swarm.hotkeys[index]]
    return found


def contributed_in(swarm: Swarm, hotkey: Hotkey) -> list[int]:
    manifests = swarm.orchestrator.core.manifests(ManifestQuery(stage_index=0, from_outer_step=0)).manifests
    return [manifest.outer_step for manifest in manifests if hotkey in manifest.contributors]


def test_a_newcomer_gets_its_anchor_from_several_replicas_and_counts_from_its_first_whole_outer_step() -> None:
    swarm, result, outer_step = joined({index: Counting for index in range(5)})
    parts = parts_of(swarm)
    assert sum(parts[index] > 0 for index in (0, 1, 2)) >= 2
    assert state_of(swarm, result, NEWCOMER) is MemberState.ACTIVE
    steps = contributed_in(swarm, swarm.hotkeys[NEWCOMER])
    assert steps and min(steps) > outer_step, "it weighs nothing in the outer step in which it came"


def test_a_replica_that_hands_out_other_bytes_is_named_and_does_no_harm() -> None:
    # That the newcomer stands at the true anchor is an invariant.
    with capture_logs() as logs:
        swarm, result, _ = joined({0: Counting, 1: Lying, 2: Counting, 3: Counting, NEWCOMER: Counting})
    liars = {line["hotkey"] for line in logs if line["event"] == "state_part_refused"}
    assert liars == {swarm.hotkeys[1]}
    assert state_of(swarm, result, NEWCOMER) is MemberState.ACTIVE


def test_the_store_is_there_where_replicas_are_not() -> None:
    with capture_logs() as logs:
        swarm, result, _ = joined({**dict.fromkeys(range(4), Lying), NEWCOMER: Counting}, outer_steps=3)
    assert any(line["event"] == "state_not_fetched" for line in logs)
    assert state_of(swarm, result, NEWCOMER) is MemberState.ACTIVE


def test_nobody_waits_for_a_newcomer_that_hangs_in_its_download() -> None:
    swarm, with_it, _ = joined({NEWCOMER: Hanging})
    _, without, _ = joined({})
    assert with_it.status.outer_step == without.status.outer_step == 4
    assert with_it.virtual_s <= without.virtual_s + 1.0
    assert state_of(swarm, with_it, NEWCOMER) is MemberState.JOINING
