"""CLASP: who makes losses worse is found, who does not is left alone, and one liar frames nobody."""

import random
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from working_miner import hotkey

from orion.common.ids import Hotkey, MicrobatchId
from orion.common.protocol.records import Pathway, Pathways
from orion.validator.clasp import TRIPS_MIN, MemberEffect, PathwayTable, member_effects, pathway_table

NUM_STAGES, REPLICAS = 3, 4
MEMBERS = tuple((stage, hotkey(stage, replica)) for stage in range(NUM_STAGES) for replica in range(REPLICAS))
BAD = 5
"""Replica 1 of stage 1."""


def table(num_pathways: int, seed: int, effects: dict[int, float] | None = None, spread: float = 0.2) -> PathwayTable:
    """Random paths; a member's effect is added to the losses of its paths."""
    rng = np.random.default_rng(seed)
    paths_NS = rng.integers(0, REPLICAS, (num_pathways, NUM_STAGES)) + REPLICAS * np.arange(NUM_STAGES)
    losses_N = rng.normal(4.5, spread, num_pathways)
    for member, effect in (effects or {}).items():
        losses_N[(paths_NS == member).any(axis=1)] += effect
    return PathwayTable(MEMBERS, paths_NS, losses_N, np.zeros(num_pathways, dtype=np.int64))


def alarming(effects: Sequence[MemberEffect]) -> set[Hotkey]:
    return {effect.hotkey for effect in effects if effect.is_alarming}


def by_hotkey(effects: Sequence[MemberEffect]) -> dict[Hotkey, MemberEffect]:
    return {effect.hotkey: effect for effect in effects}


def test_a_harmful_member_is_found_with_its_size_and_nobody_else() -> None:
    effects = member_effects(table(600, 0, {BAD: 0.4}))
    assert alarming(effects) == {MEMBERS[BAD][1]}
    found = by_hotkey(effects)[MEMBERS[BAD][1]]
    # Against the average trip of its stage, a quarter of which are its own.
    assert found.effect == pytest.approx(0.3, abs=0.05)
    assert found.lower < 0.3 < found.upper
    assert found.p_value < 1e-6
    assert len(effects) == len(MEMBERS)


def test_two_in_one_stage_and_in_two_stages_are_both_found() -> None:
    for pair in ((4, 5), (1, 9)):
        effects = member_effects(table(600, 1, dict.fromkeys(pair, 0.4)))
        assert alarming(effects) == {MEMBERS[place][1] for place in pair}


def test_the_interval_covers_the_truth() -> None:
    covered = 0
    for seed in range(60):
        effects = by_hotkey(member_effects(table(300, seed, {BAD: 0.2})))
        covered += all(
            effects[name].lower <= 0.2 * ((place == BAD) - 0.25 * (stage == 1)) + 0.02
            and effects[name].upper >= 0.2 * ((place == BAD) - 0.25 * (stage == 1)) - 0.02
            for place, (stage, name) in enumerate(MEMBERS)
        )
    assert covered >= 55


def test_without_any_effect_p_values_are_uniform() -> None:
    values = np.sort([effect.p_value for seed in range(80) for effect in member_effects(table(200, seed))])
    assert len(values) == 80 * len(MEMBERS)
    distance = np.abs(values - (np.arange(len(values)) + 0.5) / len(values)).max()
    assert distance < 0.04
    assert 0.03 < (values < 0.05).mean() < 0.07


def test_false_alarms_are_as_rare_as_stated() -> None:
    num_alarmed = sum(bool(alarming(member_effects(table(200, 1000 + seed)))) for seed in range(200))
    assert num_alarmed <= 10


def test_a_falling_loss_is_not_held_against_who_came_early() -> None:
    rng = np.random.default_rng(3)
    clean = table(400, 3)
    # Replica 0 of stage 1 works in the first half only, where losses are higher by far.
    paths_NS = clean.paths_NS.copy()
    first = np.arange(400) < 200
    paths_NS[:, 1] = np.where(first & (rng.random(400) < 0.5), 4, np.maximum(paths_NS[:, 1], 5))
    losses_N = clean.losses_N + np.linspace(3.0, 0.0, 400)
    early = PathwayTable(clean.members, paths_NS, losses_N, clean.outer_steps_N)
    own = (paths_NS == 4).any(axis=1)
    assert losses_N[own].mean() - losses_N[~own].mean() > 0.5  # a bare mean would accuse it
    assert alarming(member_effects(early)) == set()
    # The same when the fall is between outer steps.
    steps = PathwayTable(
        clean.members, paths_NS, clean.losses_N + np.where(first, 3.0, 0.0), 1 - first.astype(np.int64)
    )
    assert alarming(member_effects(steps)) == set()


def framed(liars: Sequence[int]) -> PathwayTable:
    """First-stage members that report a high loss whenever the victim is on the path."""
    clean = table(1200, 4)
    rows = np.isin(clean.paths_NS[:, 0], liars) & (clean.paths_NS[:, 1] == BAD)
    return PathwayTable(clean.members, clean.paths_NS, clean.losses_N + np.where(rows, 1.0, 0.0), clean.outer_steps_N)


def test_one_liar_frames_nobody_and_most_of_a_stage_do() -> None:
    victim = MEMBERS[BAD][1]
    effects = by_hotkey(member_effects(framed([0])))
    assert effects[victim].lower > 0.05  # the regression alone would accuse it
    assert not effects[victim].is_alarming
    assert by_hotkey(member_effects(framed([0, 1, 2])))[victim].is_alarming


def test_an_absurd_loss_weighs_no_more_than_a_bad_one() -> None:
    clean = table(400, 5)
    losses_N = clean.losses_N.copy()
    losses_N[10], losses_N[20] = 1.7e308, -1.7e308
    effects = member_effects(PathwayTable(clean.members, clean.paths_NS, losses_N, clean.outer_steps_N))
    assert alarming(effects) == set()
    assert max(abs(effect.effect) for effect in effects) < 0.2


def test_what_cannot_be_told_is_not_told() -> None:
    assert member_effects(table(0, 0)) == ()
    assert member_effects(table(20, 0)) == ()  # fewer pathways than the regression needs
    # One member in each stage: nobody to compare with.
    alone = PathwayTable(((0, MEMBERS[0][1]),), np.zeros((50, 1), dtype=np.int64), np.arange(50.0), np.zeros(50, int))
    assert member_effects(alone) == ()
    # Two halves of the swarm that never met, each in an outer step of its own.
    clean = table(400, 6)
    half = np.arange(400) < 200
    paths_NS = np.where(half[:, None], clean.paths_NS // 2 * 2, clean.paths_NS // 2 * 2 + 1)
    split = PathwayTable(clean.members, paths_NS, clean.losses_N, half.astype(np.int64))
    assert member_effects(split) == ()
    # All losses alike.
    same = PathwayTable(clean.members, clean.paths_NS, np.full(400, 3.0), clean.outer_steps_N)
    assert member_effects(same) == ()


def test_a_member_of_few_trips_is_passed_over() -> None:
    clean = table(300, 7)
    paths_NS = clean.paths_NS.copy()
    paths_NS[:, 2] = np.where(paths_NS[:, 2] == 11, 10, paths_NS[:, 2])
    paths_NS[: TRIPS_MIN - 1, 2] = 11
    effects = member_effects(PathwayTable(clean.members, paths_NS, clean.losses_N, clean.outer_steps_N))
    assert {effect.hotkey for effect in effects} == {name for _, name in MEMBERS[:-1]}


@settings(max_examples=25)
@given(st.permutations(range(REPLICAS)), st.permutations(range(NUM_STAGES)), st.integers(0, 5))
def test_names_and_their_order_do_not_matter(replicas: list[int], stages: list[int], seed: int) -> None:
    first = table(150, seed, {BAD: 0.1})
    place_of = [stages[member // REPLICAS] * REPLICAS + replicas[member % REPLICAS] for member in range(len(MEMBERS))]
    paths_NS = np.array(place_of)[first.paths_NS][:, np.argsort(stages)]
    second = PathwayTable(MEMBERS, paths_NS, first.losses_N, first.outer_steps_N)
    before, after = by_hotkey(member_effects(first)), by_hotkey(member_effects(second))
    assert len(before) == len(after)
    for member, place in enumerate(place_of):
        old, new = before[MEMBERS[member][1]], after[MEMBERS[place][1]]
        assert new.effect == pytest.approx(old.effect, abs=1e-9)
        assert new.lower == pytest.approx(old.lower, abs=1e-9)
        assert new.effect_confirmed == pytest.approx(old.effect_confirmed, abs=1e-9)


def test_pages_become_one_table() -> None:
    names = [hotkey(stage, replica) for stage in range(2) for replica in range(2)]
    pages = [
        Pathways(outer_step=4, miners=(names[1], names[3]), pathways=(pathway(9, 2.0, 0, 1),), total=1),
        Pathways(outer_step=3, miners=(names[0], names[2]), pathways=(pathway(1, 3.0, 0, 1),), total=2),
        Pathways(outer_step=3, miners=(names[0], names[2], names[3]), pathways=(pathway(2, 2.5, 0, 2),), total=2),
    ]
    found = pathway_table(pages)
    assert found.losses_N.tolist() == [3.0, 2.5, 2.0]
    assert found.outer_steps_N.tolist() == [3, 3, 4]
    told = [[found.members[place] for place in path] for path in found.paths_NS]
    assert told == [[(0, names[0]), (1, names[2])], [(0, names[0]), (1, names[3])], [(0, names[1]), (1, names[3])]]


def pathway(microbatch_id: int, loss: float, *path: int) -> Pathway:
    return Pathway(microbatch_id=MicrobatchId(microbatch_id), loss=loss, path=path)


def test_the_same_pathways_give_the_same_estimates() -> None:
    rng = random.Random(1)
    pages = [
        Pathways(
            outer_step=step,
            miners=tuple(name for _, name in MEMBERS),
            pathways=tuple(
                pathway(
                    number, rng.gauss(4.0, 0.2), *(REPLICAS * stage + rng.randrange(REPLICAS) for stage in range(3))
                )
                for number in range(60)
            ),
            total=60,
        )
        for step in range(3)
    ]
    assert member_effects(pathway_table(pages)) == member_effects(pathway_table(list(reversed(pages))))
