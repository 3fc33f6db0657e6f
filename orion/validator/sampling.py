"""Who is checked, and how far. Pure; the validator's own generator decides, after the commitments are in.

Nobody can know beforehand whether it will be checked, everybody is reached, and nobody waits long to be verified: a
miner's work is paid as far as a replay of a whole outer step verified it. So whoever was never verified comes first,
those before all others that were not tried yet. That leaves those who were verified unwatched just as long as others
join, so meanwhile some of them are drawn on top, beside the usual number. When all were verified, half of the draws go
to anybody, because who knows the turns would cheat right after its own; the others go by turns, the longest unverified
first. Those that something points at (`suspicion`) get half of all draws, of which surprise and turns leave half each.
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

ON_TOP_SHARE = 0.25
"""For each draw that somebody has who was not verified yet, how often one of the others is drawn too. So whoever was
verified and cheats while newcomers have the turns is still looked at wholly with a probability that, times a window of
50 outer steps' pay, is more than an outer step's work costs, at a check for every six miners."""

TRIES_FREE = 2
"""Draws that a miner has at once until one verifies it. Each further one is half as likely as the one before, so that
a miner that can never be verified, or goes away when it is asked, takes two more draws from the others altogether."""

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
    in_vain: Mapping[Hotkey, int] | None = None,
) -> tuple[Draw, ...]:
    """Draws up to `num_checks` different miners of those that can be checked on `outer_step`, and on top of them, while
    there are miners that were not verified yet, some of the others: as many again at most.

    `last_turn` names the newest outer step that verified each miner, or was to; who is missing from it is a newcomer.
    `in_vain` names those among the others that are still to be verified, with the checks that were to do so and have
    not. `suspicions` weighs those that should be looked at soon; a check of one that is suspicious still is worth more,
    the longer ago its last turn was. Newcomers come first and draws that verify next, so that they are what can be
    afforded.
    """
    # Sorted, so that the draw depends on the generator and not on the order of a set.
    left = sorted(miners)
    between = _outer_steps_between_turns(len(left), num_checks, rules)
    turns = _Turns(last_turn, in_vain or {}, suspicions or {}, outer_step, between, rules)
    unverified: list[Draw] = []
    usual: list[Draw] = []
    while left and len(unverified) + len(usual) < num_checks:
        hotkey = _draw_unverified(left, turns, rng)
        if hotkey is not None:
            unverified.append(Draw(hotkey, verifies=True))
        else:
            usual.append(_draw_usual(left, turns, rng))
            hotkey = usual[-1].hotkey
        left.remove(hotkey)
    on_top: list[Draw] = []
    for _ in unverified:
        others = [hotkey for hotkey in left if turns.num_tries(hotkey) is None]
        if others and rng.random() < ON_TOP_SHARE:
            hotkey = _suspect_or_anybody(others, turns, rng)
            on_top.append(Draw(hotkey, verifies=rng.random() < _verifying_share(rules)))
            left.remove(hotkey)
    return (*unverified, *sorted(usual, key=lambda draw: not draw.verifies), *on_top)


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

    The whole when the check is to verify it, the run has whole replays, the miner has kept it, and the validator can
    afford it; else a prefix of what was kept, of which every length up to the bounds is as likely. A log that was not
    finished is replayed wholly too, or leaving one so would hide what comes after the longest prefix.
    """
    is_there = commitment.num_kept == commitment.num_entries <= operations_max
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
    in_vain: Mapping[Hotkey, int]
    suspicions: Mapping[Hotkey, float]
    outer_step: int
    outer_steps_between: float
    rules: ValidationRules

    def waited(self, hotkey: Hotkey) -> int:
        return max(1, self.outer_step - self.last_turn.get(hotkey, -1))

    def num_tries(self, hotkey: Hotkey) -> int | None:
        """How often somebody who was never verified was tried; None for those who were."""
        return self.in_vain.get(hotkey, None if hotkey in self.last_turn else 0)

    def suspects(self, among: Sequence[Hotkey]) -> dict[Hotkey, float]:
        """Who is suspicious, weighed by how long ago it was looked at."""
        found = {hotkey: self.suspicions.get(hotkey, 0.0) * self.waited(hotkey) for hotkey in among}
        return {hotkey: weight for hotkey, weight in found.items() if weight > 0.0}


def _draw_unverified(left: Sequence[Hotkey], turns: _Turns, rng: random.Random) -> Hotkey | None:
    """One of those that were tried least; None when all are verified, or their tries have become rare."""
    tries = {hotkey: num for hotkey in left if (num := turns.num_tries(hotkey)) is not None}
    if not tries:
        return None
    least = min(tries.values())
    if least >= TRIES_FREE and rng.random() >= 0.5 ** (least - TRIES_FREE + 1):
        return None
    return _suspect_or_anybody([hotkey for hotkey, num in tries.items() if num == least], turns, rng)


def _suspect_or_anybody(among: Sequence[Hotkey], turns: _Turns, rng: random.Random) -> Hotkey:
    suspects = turns.suspects(among)
    if suspects and rng.random() < SUSPECT_SHARE:
        return rng.choices(list(suspects), weights=list(suspects.values()))[0]
    return rng.choice(among)


def _draw_usual(left: Sequence[Hotkey], turns: _Turns, rng: random.Random) -> Draw:
    verifies = rng.random() < _verifying_share(turns.rules)
    kind = rng.random()
    suspects = turns.suspects(left)
    surprise_share = SURPRISE_SHARE * (1 - SUSPECT_SHARE) if suspects else SURPRISE_SHARE
    if kind < surprise_share:
        return Draw(rng.choice(left), verifies)
    if suspects and kind < surprise_share + SUSPECT_SHARE:
        return Draw(rng.choices(list(suspects), weights=list(suspects.values()))[0], verifies)
    if not verifies:
        return Draw(rng.choice(left), verifies)
    overdue = [miner for miner in left if turns.waited(miner) >= turns.outer_steps_between]
    return Draw(rng.choices(overdue or left, weights=[turns.waited(miner) for miner in overdue or left])[0], verifies)
