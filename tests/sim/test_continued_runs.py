"""A run that goes on from a checkpoint with other miners, another orchestrator and an empty journal."""

import pytest
from continued_runs import gone_on, kept, left_behind, newest, one_at_a_time, run

from orion.common.errors import ConfigError
from orion.common.protocol.start import continued
from orion.simulator.scenarios import calm
from orion.simulator.swarm import Scenario, Swarm


@pytest.fixture(scope="module")
def whole() -> Swarm:
    """Four outer steps without a break."""
    return run(one_at_a_time(outer_steps=4), seed=1)[0]


def test_two_outer_steps_and_two_more_are_four_bit_for_bit() -> None:
    num_stages = 3
    scenario = one_at_a_time(outer_steps=4, num_stages=num_stages)
    _, unbroken, _ = run(scenario, seed=1)
    old, before = left_behind(scenario, seed=2, outer_step=2)
    _, after, result = run(*_swapped(gone_on(old, 2)))
    for outer_step in range(5):
        seen = after if outer_step >= 2 else before
        for stage_index in range(num_stages):
            assert seen.anchors[stage_index, outer_step] == unbroken.anchors[stage_index, outer_step], (
                f"stage {stage_index}, outer step {outer_step}"
            )
    assert {outer_step: after.leased[outer_step] for outer_step in (2, 3)} == {
        outer_step: unbroken.leased[outer_step] for outer_step in (2, 3)
    }
    assert result.status.outer_step == 4
    assert result.status.microbatches_applied == 2 * 2 * 2
    assert result.status.num_checks > 0
    assert result.status.num_verdicts_failed == 0, "validators build the anchors too"


def _swapped(prepared: tuple[Scenario, dict[str, bytes]]) -> tuple[Scenario, int, dict[str, bytes]]:
    scenario, stored = prepared
    return scenario, 7, stored


def test_a_run_that_went_on_can_be_left_and_gone_on_with_again(whole: Swarm) -> None:
    scenario, stored = gone_on(whole, 1)
    again = Swarm(scenario, 3, stored)
    again.start()
    while newest(again) != 3:
        assert again.world.clock.step()
    assert sorted(kept(again)) == [1, 2, 3], "where it began counts as a checkpoint too"
    _, last, _ = run(*_swapped(gone_on(again, 3)))
    final = {ref.stage_index: ref.state_digest for ref in kept(whole)[4].stages}
    assert {stage_index: last.anchors[stage_index, 4] for stage_index in range(3)} == final


def test_another_number_of_replicas_goes_on_and_uses_no_data_twice() -> None:
    old, before = left_behind(calm(outer_steps=5, replicas=2), seed=1, outer_step=3)
    scenario, stored = gone_on(old, 3, replicas=3)
    swarm, after, result = run(scenario, 5, stored)
    merged = [data_id for outer_step in range(3) for data_id in before.leased[outer_step]]
    later = [data_id for data_ids in after.leased.values() for data_id in data_ids]
    assert sorted(after.leased) == [3, 4]
    assert not set(merged) & set(later)
    assert sorted(merged + later) == list(range(len(merged) + len(later))), "none is used twice, none is left out"
    assert result.status.anchors_equal
    assert result.status.outer_step == 5
    assert sorted(kept(swarm)) == [3, 4, 5]


def test_every_outer_step_is_a_checkpoint_of_the_whole_model(whole: Swarm) -> None:
    checkpoints = kept(whole)
    assert sorted(checkpoints) == [1, 2, 3, 4]
    for outer_step, checkpoint in checkpoints.items():
        assert [(ref.stage_index, ref.outer_step) for ref in checkpoint.stages] == [(s, outer_step) for s in range(3)]
        assert checkpoint.next_data_id == outer_step * 2 * 2


def test_the_newest_checkpoints_can_be_read_and_older_ones_are_gone() -> None:
    scenario = calm(num_stages=2, replicas=1, outer_steps=7)
    spec = scenario.spec.with_values({"keep_outer_steps": 2, "checkpoint_every": 1})
    swarm, _, _ = run(type(scenario)(scenario.name, spec, scenario.virtual_s_max), seed=1)
    checkpoints = kept(swarm)
    readable = [
        outer_step
        for outer_step, checkpoint in sorted(checkpoints.items())
        if all(swarm.world.store.is_durable(ref.object) for ref in checkpoint.stages)
    ]
    assert readable == [5, 6, 7], "the anchors of the last two outer steps, and what they are made of"


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"model.width": 8}, "model.width is 16 there and 8 here"),
        ({"seed": 2}, "seed is 1 there and 2 here"),
        ({"data.sequence_length": 4}, "data.sequence_length is 8 there and 4 here"),
        ({"num_stages": 2}, "num_stages is 3 there and 2 here"),
        ({"outer_steps": 2}, "nothing is left to train"),
    ],
)
def test_a_checkpoint_of_another_run_is_refused_in_one_line(
    whole: Swarm, changes: dict[str, object], words: str
) -> None:
    left = whole.scenario.spec
    with pytest.raises(ConfigError) as refused:
        continued(left.with_values(changes), left, kept(whole)[2])
    assert words in str(refused.value)
    assert "\n" not in str(refused.value)
