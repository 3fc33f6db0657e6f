"""Who is checked, and how far. Pure; the validator's own generator decides, after the commitments are in.

Nobody can know beforehand whether it will be checked, everybody is reached, and a newcomer is looked at early. Two
kinds of draws are mixed for that: most go to those whose turn is overdue, the never checked among them; the rest go
to anybody, so that having just been checked is no licence.
"""

import random
from collections.abc import Mapping, Sequence
from collections.abc import Set as AbstractSet

from orion.common.ids import Hotkey

SURPRISE_SHARE = 0.25
"""Of the draws, those that pay no heed to whose turn it is."""

OVERDUE_ROUNDS = 2
"""Rounds (as many checks as there are miners) after which a miner's turn is overdue."""


def draw_miners(
    miners: AbstractSet[Hotkey],
    last_checked: Mapping[Hotkey, int],
    outer_step: int,
    num_checks: int,
    rng: random.Random,
) -> tuple[Hotkey, ...]:
    """Draws up to `num_checks` different miners of those that can be checked on `outer_step`.

    `last_checked` names the outer step of each miner's newest check; who is missing from it was never checked.
    """
    # Sorted, so that the draw depends on the generator and not on the order of a set.
    left = sorted(miners)
    overdue_outer_steps = OVERDUE_ROUNDS * len(left) / num_checks if num_checks else 0.0
    drawn: list[Hotkey] = []
    while left and len(drawn) < num_checks:
        hotkey = _draw_one(left, last_checked, outer_step, overdue_outer_steps, rng)
        left.remove(hotkey)
        drawn.append(hotkey)
    return tuple(drawn)


def draw_num_operations(num_entries: int, replay_ops_max: int, rng: random.Random) -> int:
    """How long a prefix of a log of `num_entries` ≥ 1 is replayed: every length up to the bound is as likely."""
    return rng.randint(1, min(num_entries, replay_ops_max))


def _draw_one(
    left: Sequence[Hotkey],
    last_checked: Mapping[Hotkey, int],
    outer_step: int,
    overdue_outer_steps: float,
    rng: random.Random,
) -> Hotkey:
    never = [hotkey for hotkey in left if hotkey not in last_checked]
    waited = {hotkey: max(1, outer_step - last_checked.get(hotkey, -1)) for hotkey in left}
    overdue = [hotkey for hotkey in left if hotkey in never or waited[hotkey] > overdue_outer_steps]
    if rng.random() >= SURPRISE_SHARE:
        if overdue:
            return rng.choice(overdue)
        return rng.choices(left, weights=[waited[hotkey] for hotkey in left])[0]
    return rng.choice(left)
