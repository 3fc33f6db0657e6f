"""Dishonest miners among real ones: what they make up is found out, and costs nobody else anything."""

import pytest
from dishonest_miners import LyingReducer, NoisyMiner, PoisoningMiner

from orion.common.protocol.messages import (
    ManifestQuery,
    MergedPartition,
)
from orion.simulator.scenarios import calm
from orion.simulator.simulation import watched
from orion.simulator.swarm import Swarm

SEED = 5
NUM_PARTITIONS = 3


def merged_partitions(swarm: Swarm, stage_index: int) -> list[MergedPartition]:
    query = ManifestQuery(stage_index=stage_index, from_outer_step=0)
    manifests = swarm.orchestrator.core.manifests(query).manifests
    return [merged for manifest in manifests for merged in manifest.partitions]


def test_a_lying_reducer_is_named_and_its_bytes_are_not_used() -> None:
    liar = 4  # of stage 1, whose miners are 3 to 5
    swarm = Swarm(calm(num_stages=2, replicas=3, outer_steps=2, cheats={liar: LyingReducer}), SEED)
    result = watched(swarm, SEED)
    hotkey = swarm.hotkeys[liar]
    named = [notice for notice in result.status.notices if "other bytes from" in notice]
    assert named
    assert all(notice.endswith(f"other bytes from {hotkey}") for notice in named)
    merged = merged_partitions(swarm, 1)
    assert len(merged) == 2 * 3
    for partition in merged:
        assert len(partition.reducers) == 2
        assert hotkey not in partition.reducers
        assert partition.object is not None
        assert hotkey not in partition.object.key
    assert result.status.anchors_equal


def test_where_nobody_can_decide_who_lies_the_partition_stays_as_it_is() -> None:
    swarm = Swarm(calm(num_stages=2, replicas=2, outer_steps=4, cheats={2: LyingReducer}), SEED)
    result = watched(swarm, SEED)
    # A validator's verdict comes an outer step later, or two.
    first, later = merged_partitions(swarm, 1)[:NUM_PARTITIONS], merged_partitions(swarm, 1)[-NUM_PARTITIONS:]
    assert all(partition.object is None for partition in first)
    assert all(partition.object is not None for partition in merged_partitions(swarm, 0))
    assert result.status.anchors_equal
    failed = [notice for notice in result.status.notices if "failed a check" in notice]
    assert failed, "the validator can decide: it reduces again what is disputed first"
    assert all(swarm.hotkeys[2] in notice for notice in failed)
    assert [partition.reducers for partition in later] == [(swarm.hotkeys[3],)] * NUM_PARTITIONS, "barred from then on"


def test_two_reducers_that_collude_are_both_named() -> None:
    swarm = Swarm(calm(num_stages=2, replicas=2, outer_steps=3, cheats={2: LyingReducer, 3: LyingReducer}), SEED)
    swarm.start()  # without the invariants: these means are not honest ones, and nobody could tell so far
    assert swarm.run()
    first = merged_partitions(swarm, 1)[:NUM_PARTITIONS]
    assert all(len(partition.reducers) == 2 for partition in first), "they agree"
    failed = [notice for notice in swarm.status().notices if "failed a check" in notice]
    assert {hotkey for hotkey in swarm.hotkeys if any(hotkey in notice for notice in failed)} == set(swarm.hotkeys[2:4])
    assert all("not that of the contributions" in notice for notice in failed)


@pytest.mark.parametrize("cheat", [0, 3, 4], ids=["first stage", "middle stage", "last stage"])
def test_a_miner_that_returns_noise_fails_its_check_and_gets_no_weight(cheat: int) -> None:
    swarm = Swarm(calm(outer_steps=2, checks_per_outer_step=6, cheats={cheat: NoisyMiner}), SEED)
    result = watched(swarm, SEED)
    assert result.status.num_verdicts_failed >= 1
    failed = [notice for notice in result.status.notices if "failed a check" in notice]
    assert failed
    assert all(swarm.hotkeys[cheat] in notice for notice in failed)
    assert result.chain_weights[cheat] == 0.0
    assert all(share > 0 for index, share in result.chain_weights.items() if index != cheat)


@pytest.mark.parametrize("cheat", [0, 3, 4], ids=["first stage", "middle stage", "last stage"])
def test_a_miner_that_uploads_something_else_than_its_work_is_found(cheat: int) -> None:
    scenario = calm(outer_steps=2, checks_per_outer_step=6, whole_share=1.0, cheats={cheat: PoisoningMiner})
    swarm = Swarm(scenario, SEED)
    result = watched(swarm, SEED)
    failed = [notice for notice in result.status.notices if "failed a check" in notice]
    assert failed and all(swarm.hotkeys[cheat] in notice for notice in failed)
    assert all("pseudo-gradient" in notice for notice in failed)
