"""Draws: everybody is reached, newcomers soon, nobody is safe."""

import itertools
import random

from hypothesis import given
from hypothesis import strategies as st
from working_miner import hotkey

from orion.common.config import ValidationRules
from orion.common.ids import Digest, Hotkey
from orion.common.protocol.messages import Commitment
from orion.validator.sampling import draw_extent, draw_miners

MINERS = [hotkey(number // 4, number % 4) for number in range(12)]


def run(num_outer_steps: int, num_checks: int, seed: int, joins: dict[Hotkey, int]) -> dict[Hotkey, list[int]]:
    """Outer steps in which each miner was checked."""
    rng = random.Random(seed)
    last_checked: dict[Hotkey, int] = {}
    checked: dict[Hotkey, list[int]] = {miner: [] for miner in MINERS}
    for outer_step in range(num_outer_steps):
        there = {miner for miner in MINERS if joins.get(miner, 0) <= outer_step}
        for miner in draw_miners(there, last_checked, outer_step, num_checks, rng):
            last_checked[miner] = outer_step
            checked[miner].append(outer_step)
    return checked


@given(st.sets(st.sampled_from(MINERS)), st.integers(0, 20), st.integers(0, 30), st.randoms())
def test_draws_are_different_miners_of_those_there(
    there: set[Hotkey], num_checks: int, outer_step: int, rng: random.Random
) -> None:
    drawn = draw_miners(there, {MINERS[0]: 3}, outer_step, num_checks, rng)
    assert len(set(drawn)) == len(drawn) == min(num_checks, len(there))
    assert set(drawn) <= there


def test_the_draw_depends_on_the_generator_and_not_on_the_set() -> None:
    forward, backward = set(MINERS), set(reversed(MINERS))
    assert draw_miners(forward, {}, 0, 5, random.Random(1)) == draw_miners(backward, {}, 0, 5, random.Random(1))
    assert len({draw_miners(forward, {}, 0, 1, random.Random(seed)) for seed in range(60)}) > 8


def test_everybody_is_reached_again_and_again() -> None:
    for seed in range(20):
        for steps in run(200, 1, seed, {}).values():
            gaps = [later - earlier for earlier, later in zip([-1, *steps], [*steps, 200], strict=True)]
            assert max(gaps) <= 80


def test_a_newcomer_is_checked_early() -> None:
    newcomer = MINERS[5]
    waits = [run(160, 1, seed, {newcomer: 100})[newcomer][0] - 100 for seed in range(40)]
    assert sum(waits) / len(waits) < 5
    assert max(waits) <= 30


def test_having_just_been_checked_is_no_licence() -> None:
    checked = [steps for seed in range(30) for steps in run(60, 1, seed, {}).values()]
    soon = [later - earlier for steps in checked for earlier, later in itertools.pairwise(steps)]
    assert any(gap == 1 for gap in soon)
    assert sum(gap <= 6 for gap in soon) > len(soon) / 20


def test_suspects_come_first_and_everybody_keeps_a_chance() -> None:
    suspects = {MINERS[3]: 1.0, MINERS[7]: 3.0}
    last_checked = dict.fromkeys(MINERS, 9)
    rng = random.Random(4)
    draws = [draw_miners(set(MINERS), last_checked, 10, 1, rng, suspicions=suspects)[0] for _ in range(4000)]
    share = {miner: draws.count(miner) / len(draws) for miner in MINERS}
    # Half the draws are the suspects', by their weight; the others are as if there were none.
    assert abs(share[MINERS[7]] - (0.5 * 0.75 + 0.5 / 12)) < 0.03
    assert abs(share[MINERS[3]] - (0.5 * 0.25 + 0.5 / 12)) < 0.03
    assert min(share.values()) > 0.5 / 12 - 0.02


def test_a_standing_suspicion_does_not_keep_others_from_their_turn() -> None:
    rng = random.Random(5)
    last_checked: dict[Hotkey, int] = {}
    for outer_step in range(60):
        for miner in draw_miners(set(MINERS), last_checked, outer_step, 2, rng, suspicions={MINERS[0]: 10.0}):
            last_checked[miner] = outer_step
    assert set(last_checked) == set(MINERS)


def test_suspects_that_cannot_be_checked_change_nothing() -> None:
    there = set(MINERS[:6])
    for seed in range(30):
        plain = draw_miners(there, {}, 3, 2, random.Random(seed))
        assert draw_miners(there, {}, 3, 2, random.Random(seed), suspicions={MINERS[9]: 5.0, MINERS[1]: 0.0}) == plain


def rules(replay_ops_max: int = 16, whole_share: float = 0.0) -> ValidationRules:
    return ValidationRules(replay_ops_max=replay_ops_max, whole_share=whole_share)


def commitment(num_entries: int, *, num_kept: int | None = None, is_final: bool = True) -> Commitment:
    return Commitment(
        outer_step=0,
        num_entries=num_entries,
        num_applied=0,
        num_contributed=0,
        num_kept=num_entries if num_kept is None else num_kept,
        root=Digest("0" * 64),
        is_final=is_final,
    )


@given(st.integers(1, 10_000), st.integers(1, 64), st.integers(1, 20_000), st.floats(0, 1), st.randoms())
def test_what_is_replayed_is_within_the_log_and_what_can_be_afforded(
    num_entries: int, most: int, affordable: int, whole_share: float, rng: random.Random
) -> None:
    extent = draw_extent(commitment(num_entries), rules(most, whole_share), affordable, rng, is_verified=True)
    assert 1 <= extent.num_operations <= min(num_entries, affordable)
    assert extent.num_operations == num_entries if extent.is_whole else extent.num_operations <= most


def test_every_length_of_prefix_is_drawn() -> None:
    rng = random.Random(0)
    assert {
        draw_extent(commitment(100), rules(16), 1000, rng, is_verified=True).num_operations for _ in range(400)
    } == set(range(1, 17))


def test_whole_logs_have_their_share() -> None:
    rng = random.Random(0)
    num_whole = sum(
        draw_extent(commitment(100), rules(whole_share=0.3), 100, rng, is_verified=True).is_whole for _ in range(1000)
    )
    assert 250 <= num_whole <= 350
    assert draw_extent(commitment(100), rules(whole_share=1.0), 100, rng, is_verified=True).is_whole
    assert not draw_extent(commitment(100), rules(whole_share=1.0), 99, rng, is_verified=True).is_whole
    assert not draw_extent(commitment(100, num_kept=99), rules(whole_share=1.0), 100, rng, is_verified=True).is_whole
    assert not draw_extent(commitment(100, is_final=False), rules(whole_share=1.0), 100, rng, is_verified=True).is_whole


def test_the_whole_is_replayed_of_whom_no_whole_was_verified_unless_the_run_knows_none() -> None:
    rng = random.Random(0)
    assert all(
        draw_extent(commitment(100), rules(whole_share=0.1), 100, rng, is_verified=False).is_whole for _ in range(100)
    )
    assert not draw_extent(commitment(100), rules(whole_share=0.1), 99, rng, is_verified=False).is_whole
    assert not draw_extent(commitment(100), rules(whole_share=0.0), 100, rng, is_verified=False).is_whole
