"""Chain weights from scores. Pure.

Invariants of a result: non-empty results add up to 1; every share is a whole multiple of one unit, at most 65,535 units
each, so that the chain's u16 rounding changes nothing; only known slots appear.
"""

import math
from collections.abc import Mapping

from orion.common.ids import Hotkey

U16_MAX = 65_535
"""What the chain stores for the largest weight."""


def chain_weights(
    scores: Mapping[Hotkey, float],
    uids: Mapping[Hotkey, int],
    owner_uid: int | None,
    burn_share: float,
    weight_max: float,
) -> dict[int, float]:
    """uid to share, for the miners with a score above 0 that have a slot, and the subnet owner.

    The owner's slot gets `burn_share` (in [0, 1)) of the whole, and all of it when no miner has earned anything. No
    miner gets more than `weight_max` (in (0, 1]) of the rest, unless there are too few to divide it among. Empty when
    there is nobody to name. Shares too small for the chain's u16 are dropped. Raises ValueError for a score that is
    negative or not finite.
    """
    earned: dict[int, float] = {}
    for hotkey, score in sorted(scores.items()):
        if not (math.isfinite(score) and score >= 0):
            raise ValueError(f"score {score} of {hotkey}")
        if score > 0 and hotkey in uids:
            earned[uids[hotkey]] = score
    shares = _capped(_normalised(earned), weight_max)
    if owner_uid is not None and (burn_share > 0 or not shares):
        burned = burn_share if shares else 1.0
        shares = {uid: share * (1 - burned) for uid, share in shares.items()}
        shares[owner_uid] = shares.get(owner_uid, 0.0) + burned
    return _on_u16_grid(shares)


def as_u16(weights: Mapping[int, float]) -> dict[int, int]:
    """What the chain makes of weights: the largest becomes 65,535, the others keep their proportion to it."""
    largest = max(weights.values(), default=0.0)
    return {uid: round(share / largest * U16_MAX) for uid, share in weights.items()} if largest > 0 else {}


def _normalised(earned: Mapping[int, float]) -> dict[int, float]:
    if not earned:
        return {}
    # Relative to the largest, because a sum of huge scores could overflow. What the chain would round to nothing beside
    # it goes first, or a cap on the large ones would make much of it.
    largest = max(earned.values())
    scaled = {uid: score / largest for uid, score in earned.items() if score / largest >= 1 / U16_MAX}
    total = math.fsum(scaled.values())
    return {uid: share / total for uid, share in scaled.items()}


def _capped(shares: Mapping[int, float], share_max: float) -> dict[int, float]:
    """Shares cut to `share_max`, the others grown in proportion to fill the whole; equal shares when they cannot."""
    if not shares or len(shares) * share_max <= 1:
        return {uid: 1 / len(shares) for uid in shares}
    capped: set[int] = set()
    while True:
        rest = math.fsum(share for uid, share in shares.items() if uid not in capped)
        factor = (1 - share_max * len(capped)) / rest
        above = {uid for uid, share in shares.items() if uid not in capped and share * factor > share_max}
        if not above:
            return {uid: share_max if uid in capped else share * factor for uid, share in shares.items()}
        capped |= above  # grows in every round and never holds all, since all of them capped would exceed 1


def _on_u16_grid(shares: Mapping[int, float]) -> dict[int, float]:
    units = {uid: num_units for uid, num_units in as_u16(shares).items() if num_units > 0}
    total = sum(units.values())
    return {uid: num_units / total for uid, num_units in sorted(units.items())}
