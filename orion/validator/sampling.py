"""Who is checked, and how far. Pure; the validator's own generator decides, after the commitments are in.

Nobody can know beforehand whether it will be checked, everybody is reached, and a newcomer is looked at early. Three
kinds of draws are mixed for that: most go to those that something points at (`suspicion`); others to those whose turn
is overdue, the never checked among them; the rest to anybody, so that having just been checked is no licence. While
nobody is suspicious, that part of the draws goes by turns too.
"""

import random
from collections.abc import Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass

from orion.common.config import ValidationRules
from orion.common.ids import Hotkey
from orion.common.protocol.messages import Commitment

SURPRISE_SHARE = 0.25
"""Of the draws, those that pay no heed to whose turn it is."""

SUSPECT_SHARE = 0.5
"""Of the draws, those that go to suspects while there are any; a false alarm thus costs others half their turns."""

OVERDUE_ROUNDS = 2
"""Rounds (as many checks as there are miners) after which a miner's turn is overdue."""


def draw_miners(
    miners: AbstractSet[Hotkey],
    last_checked: Mapping[Hotkey, int],
    outer_step: int,
    num_checks: int,
    rng: random.Random,
    *,
    suspicions: Mapping[Hotkey, float] | None = None,
) -> tuple[Hotkey, ...]:
    """Draws up to `num_checks` different miners of those that can be checked on `outer_step`.

    `last_checked` names the outer step of each miner's newest check; who is missing from it was never checked.
    `suspicions` weighs those that should be looked at soon; a check of one that is suspicious still is worth more, the
    longer ago the last one was.
    """
    # Sorted, so that the draw depends on the generator and not on the order of a set.
    left = sorted(miners)
    overdue_outer_steps = OVERDUE_ROUNDS * len(left) / num_checks if num_checks else 0.0
    drawn: list[Hotkey] = []
    while left and len(drawn) < num_checks:
        suspects = {hotkey: suspicion for hotkey in left if (suspicion := (suspicions or {}).get(hotkey, 0.0)) > 0.0}
        turns = _Turns(last_checked, outer_step, overdue_outer_steps)
        hotkey = _draw_one(left, turns, suspects, rng)
        left.remove(hotkey)
        drawn.append(hotkey)
    return tuple(drawn)


@dataclass(frozen=True, slots=True)
class Extent:
    """How much of a log is replayed."""

    num_operations: int
    """Its first ones."""
    is_whole: bool
    """All of them, and the pseudo-gradient is compared too."""


def draw_extent(
    commitment: Commitment, rules: ValidationRules, operations_max: int, rng: random.Random, *, is_verified: bool
) -> Extent:
    """How much of a log of one entry at least is replayed.

    The whole with the run's probability, and always of a miner of whom no whole outer step was verified, when the miner
    has finished and kept it and the validator can afford it; else a prefix of what was kept, of which every length up
    to the bounds is as likely.
    """
    is_drawn = rng.random() < rules.whole_share or (rules.whole_share > 0 and not is_verified)
    is_there = commitment.is_final and commitment.num_kept == commitment.num_entries <= operations_max
    if is_drawn and is_there:
        return Extent(commitment.num_entries, is_whole=True)
    return Extent(rng.randint(1, min(commitment.num_kept, rules.replay_ops_max, operations_max)), is_whole=False)


@dataclass(frozen=True, slots=True)
class _Turns:
    last_checked: Mapping[Hotkey, int]
    outer_step: int
    overdue_outer_steps: float


def _draw_one(left: Sequence[Hotkey], turns: _Turns, suspects: Mapping[Hotkey, float], rng: random.Random) -> Hotkey:
    never = [hotkey for hotkey in left if hotkey not in turns.last_checked]
    waited = {hotkey: max(1, turns.outer_step - turns.last_checked.get(hotkey, -1)) for hotkey in left}
    overdue = [hotkey for hotkey in left if hotkey in never or waited[hotkey] > turns.overdue_outer_steps]
    kind = rng.random()
    if suspects and SURPRISE_SHARE <= kind < SURPRISE_SHARE + SUSPECT_SHARE:
        weights = [suspicion * waited[hotkey] for hotkey, suspicion in suspects.items()]
        return rng.choices(list(suspects), weights=weights)[0]
    if kind >= SURPRISE_SHARE:
        if overdue:
            return rng.choice(overdue)
        return rng.choices(left, weights=[waited[hotkey] for hotkey in left])[0]
    return rng.choice(left)
