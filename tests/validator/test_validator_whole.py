"""Whole outer steps: when the pseudo-gradient is compared, what there is to say without one, and what a round costs."""

import random

import pytest
from validator_world import VALIDATOR, World, merge_record
from working_miner import Cheat, WorkingMiner, hotkey, make_spec, trained

from orion.common.config import RunSpec
from orion.common.ids import Hotkey, Phase, Subject
from orion.validator.config import Budget
from orion.validator.core import ValidatorCore
from orion.validator.events import FetchEvidence, Replay

A, B, C = hotkey(0), hotkey(1), hotkey(2)
ALL = 3


def spec_with(**rules: object) -> RunSpec:
    return make_spec(validation={"checks_per_outer_step": ALL, "replay_ops_max": 4, "whole_share": 1.0, **rules})


SPEC = spec_with()


@pytest.fixture(scope="module")
def honest() -> list[WorkingMiner]:
    return trained(SPEC)


def world_of(miners: list[WorkingMiner], spec: RunSpec = SPEC, uploaded: set[Hotkey] | None = None) -> World:
    """Everybody's upload entered the merge, or that of those who are named."""
    world = World(spec, {hotkey(miner.stage_index): miner for miner in miners})
    for miner in miners:
        is_there = uploaded is None or hotkey(miner.stage_index) in uploaded
        contributions = [miner.contribution()] if is_there else []
        world.merges[miner.stage_index] = merge_record(miner.stage_index, *contributions)
    return world


def merge(world: World) -> None:
    """The outer step ends: evidence is asked for while it merges, the rest follows afterwards."""
    world.give_feed(phase=Phase.MERGE, outer_step=0)
    world.give_feed(phase=Phase.TRAIN, outer_step=1)


def with_budget(world: World, budget: Budget) -> World:
    world.core = ValidatorCore(world.spec, VALIDATOR, random.Random(0), budget)
    return world


def test_the_whole_log_is_replayed_and_the_pseudo_gradient_compared(honest: list[WorkingMiner]) -> None:
    world = world_of(honest)
    merge(world)
    for miner in honest:
        verdict = world.verdicts[hotkey(miner.stage_index)]
        assert verdict.passed and verdict.subject is Subject.WHOLE
        assert verdict.num_operations == len(miner.entries) > SPEC.validation.replay_ops_max
    ended = [notice.fields for notice in world.notices if notice.event == "check_ended"]
    assert all(fields["num_partitions"] == SPEC.num_partitions for fields in ended)


def test_evidence_is_fetched_at_once_and_the_replay_waits_for_the_merge(honest: list[WorkingMiner]) -> None:
    world = world_of(honest)
    world.give_feed(phase=Phase.MERGE, outer_step=0)
    world.pass_time(30)
    assert any(isinstance(effect, FetchEvidence) for effect in world.effects)
    assert not any(isinstance(effect, Replay) for effect in world.effects)
    world.give_feed(phase=Phase.TRAIN, outer_step=1)
    assert all(verdict.passed for verdict in world.verdicts.values()) and len(world.verdicts) == ALL


@pytest.mark.parametrize("stage_index", (0, 1, 2))
def test_a_poisoned_pseudo_gradient_fails_its_miner_and_nobody_else(stage_index: int) -> None:
    world = world_of(trained(SPEC, {stage_index: Cheat(pseudo_gradient=lambda values_N: -3.0 * values_N)}))
    merge(world)
    assert {miner for miner, verdict in world.verdicts.items() if not verdict.passed} == {hotkey(stage_index)}
    assert "pseudo-gradient" in world.verdicts[hotkey(stage_index)].reason


def test_without_an_upload_there_is_nothing_to_compare_and_the_verdict_says_so(honest: list[WorkingMiner]) -> None:
    world = world_of(honest, uploaded={A, C})
    merge(world)
    assert world.verdicts[B].passed and world.verdicts[B].subject is Subject.LOG
    assert "no pseudo-gradient" in world.verdicts[B].reason
    assert {world.verdicts[miner].subject for miner in (A, C)} == {Subject.WHOLE}


def test_a_merge_that_nobody_knows_holds_no_check_up(honest: list[WorkingMiner]) -> None:
    world = world_of(honest)
    world.merges.clear()
    merge(world)
    assert {verdict.subject for verdict in world.verdicts.values()} == {Subject.LOG} and len(world.verdicts) == ALL


def test_a_log_that_does_not_fit_into_memory_is_replayed_in_part(honest: list[WorkingMiner]) -> None:
    world = with_budget(world_of(honest), Budget(evidence_bytes=1))
    merge(world)
    assert [verdict.num_operations for verdict in world.verdicts.values()] == [1] * ALL
    assert {verdict.subject for verdict in world.verdicts.values()} == {Subject.LOG}


def test_a_round_ends_when_its_seconds_are_spent_and_says_what_was_left_out(honest: list[WorkingMiner]) -> None:
    world = with_budget(world_of(honest, spec_with(reductions_per_outer_step=2)), Budget(compute_s=30.0))
    world.compute_s = 30.0
    merge(world)
    assert len(world.verdicts) == 1
    (cut,) = [notice.fields for notice in world.notices if notice.event == "round_cut_short"]
    left_out = {A, B, C} - world.verdicts.keys()
    assert set(cut["miners"]) == left_out and len(left_out) == 2  # type: ignore[call-overload]
    assert (cut["outer_step"], cut["num_partitions"]) == (0, 2)


def test_what_is_left_of_the_seconds_bounds_the_next_replay(honest: list[WorkingMiner]) -> None:
    world = with_budget(world_of(honest), Budget(compute_s=70.0))
    world.compute_s = 60.0
    merge(world)
    first, second = world.verdicts.values()
    assert first.subject is Subject.WHOLE
    assert second.subject is Subject.LOG and second.num_operations <= 3
