"""Who is checked, and how far. Pure; the validator's own generator decides, after the commitments are in.

Nobody can know beforehand whether it will be checked, everybody is reached, and nobody waits long to be verified: a
miner's work is paid as far as a replay of a whole outer step verified it. Newcomers, of whom none has, come first.
When all were verified, half of the draws go to anybody, because who knows the turns would cheat right after its own;
the others go by turns, the longest unverified first. Those that something points at (`suspicion`) get half of all
draws, of which surprise and turns leave half each.
"""

import random
from collections.abc import Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass

from orion.common.config import ValidationRules
from orion.common.ids import Hotkey
from orion.common.protocol.messages import Commitment

SURPRISE_SHARE = 0.5
"""Of the draws, those that pay no heed to whose turn it is. With a quarter a miner that knows the turns and cheats in
the first half of each wait gained by it, with half it loses (`docs/SCORING.md`)."""

SURPRISE_SHARE_EARLY = 0.1
"""The same while there are newcomers, who are paid next to nothing until it is their turn."""

SUSPECT_SHARE = 0.5
"""Of the draws, those that go to suspects while there are any; a false alarm thus costs others half their turns."""


@dataclass(frozen=True, slots=True)
class Draw:
    """Who is checked."""

    hotkey: Hotkey
    verifies: bool
    """Whether the check is to verify the miner's work: by a replay of its whole outer step, where the run has such."""


def draw_checks(
    miners: AbstractSet[Hotkey],
    last_turn: Mapping[Hotkey, int],
    outer_step: int,
    num_checks: int,
    rng: random.Random,
    *,
    rules: ValidationRules,
    suspicions: Mapping[Hotkey, float] | None = None,
) -> tuple[Draw, ...]:
    """Draws up to `num_checks` different miners of those that can be checked on `outer_step`.

    `last_turn` names the newest outer step that verified each miner, or was to; who is missing from it is a newcomer.
    `suspicions` weighs those that should be looked at soon; a check of one that is suspicious still is worth more, the
    longer ago its last turn was. Draws that verify come first, so that they are what can be afforded.
    """
    # Sorted, so that the draw depends on the generator and not on the order of a set.
    left = sorted(miners)
    turns = _Turns(last_turn, outer_step, _outer_steps_between_turns(len(left), num_checks, rules), rules)
    drawn: list[Draw] = []
    while left and len(drawn) < num_checks:
        suspects = {hotkey: suspicion for hotkey in left if (suspicion := (suspicions or {}).get(hotkey, 0.0)) > 0.0}
        draw = _draw_one(left, turns, suspects, rng)
        left.remove(draw.hotkey)
        drawn.append(draw)
    return tuple(sorted(drawn, key=lambda draw: not draw.verifies))


@dataclass(frozen=True, slots=True)
class Extent:
    """How much of a log is replayed."""

    num_operations: int
    """Its first ones."""
    is_whole: bool
    """All of them, and the pseudo-gradient is compared too."""


def draw_extent(
    commitment: Commitment, rules: ValidationRules, operations_max: int, rng: random.Random, *, verifies: bool
) -> Extent:
    """How much of a log of one entry at least is replayed.

    The whole when the check is to verify it, the run has whole replays, the miner has finished and kept it, and the
    validator can afford it; else a prefix of what was kept, of which every length up to the bounds is as likely.
    """
    is_there = commitment.is_final and commitment.num_kept == commitment.num_entries <= operations_max
    if verifies and rules.whole_share > 0 and is_there:
        return Extent(commitment.num_entries, is_whole=True)
    return Extent(rng.randint(1, min(commitment.num_kept, rules.replay_ops_max, operations_max)), is_whole=False)


def _outer_steps_between_turns(num_miners: int, num_checks: int, rules: ValidationRules) -> float:
    """How long a miner waits from one verification to the next, when everybody is verified equally often."""
    return num_miners / (num_checks * _verifying_share(rules)) if num_checks else 0.0


def _verifying_share(rules: ValidationRules) -> float:
    """Of the checks, those that verify: all where the beginning of a log is all that is ever replayed."""
    return rules.whole_share if rules.whole_share > 0 else 1.0


@dataclass(frozen=True, slots=True)
class _Turns:
    last_turn: Mapping[Hotkey, int]
    outer_step: int
    outer_steps_between: float
    rules: ValidationRules

    def waited(self, hotkey: Hotkey) -> int:
        return max(1, self.outer_step - self.last_turn.get(hotkey, -1))


def _draw_one(left: Sequence[Hotkey], turns: _Turns, suspects: Mapping[Hotkey, float], rng: random.Random) -> Draw:
    newcomers = [hotkey for hotkey in left if hotkey not in turns.last_turn]
    verifies = rng.random() < _verifying_share(turns.rules)
    kind = rng.random()
    if newcomers:
        suspects = {hotkey: suspicion for hotkey, suspicion in suspects.items() if hotkey in newcomers}
        surprise_share = SURPRISE_SHARE_EARLY
    else:
        surprise_share = SURPRISE_SHARE * (1 - SUSPECT_SHARE) if suspects else SURPRISE_SHARE
    if kind < surprise_share:
        hotkey = rng.choice(left)
    elif suspects and kind < surprise_share + SUSPECT_SHARE:
        weights = [suspicion * turns.waited(suspect) for suspect, suspicion in suspects.items()]
        hotkey = rng.choices(list(suspects), weights=weights)[0]
    elif newcomers:
        hotkey = rng.choice(newcomers)
    elif verifies:
        overdue = [miner for miner in left if turns.waited(miner) >= turns.outer_steps_between]
        hotkey = rng.choices(overdue or left, weights=[turns.waited(miner) for miner in overdue or left])[0]
    else:
        hotkey = rng.choice(left)
    return Draw(hotkey, verifies or hotkey in newcomers)
