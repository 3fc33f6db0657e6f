"""A validator that checks nobody and sets the weights that others have set before it. Pure.

It owns what that earns: dividends per stake, as the chain's consensus pays them, beside those of validators that did
the work. Weights of a validator can be copied once they are public: an epoch later at the soonest, and later still
where the subnet has weights committed first and revealed after some epochs.
"""

from collections.abc import Mapping, Sequence

from orion.common.ids import Hotkey
from orion.devnet import yuma

NUM_HONEST_VALIDATORS = 2
"""Beside the copier, with equal stakes."""
KAPPA = 0.5
BONDS_MOVING_AVERAGE = 0.9
"""What remains of old bonds at each epoch, as on the main network."""
EPOCHS = 80
"""The weights are gone through again and again until there are so many; the first half only lets bonds settle."""


def copier_earnings(days: Sequence[Mapping[Hotkey, int]], copier_share: float, lag_epochs: int) -> float:
    """The copier's dividends per stake ÷ an honest validator's, over epochs with these weights.

    `copier_share` is its part of all stake; it sets the weights of `lag_epochs` ≥ 1 epochs before, and none until there
    are any.
    """
    miners = sorted({hotkey for day in days for hotkey in day})
    honest_share = (1.0 - copier_share) / NUM_HONEST_VALIDATORS
    num_validators = NUM_HONEST_VALIDATORS + 1
    size = num_validators + len(miners)
    stake = [honest_share] * NUM_HONEST_VALIDATORS + [copier_share] + [0.0] * len(miners)
    bonds: list[dict[int, float]] = [{} for _ in range(size)]
    earned = [0.0] * num_validators
    for epoch in range(EPOCHS if days else 0):
        fresh = _row(days[epoch % len(days)], miners, num_validators)
        copied = _row(days[(epoch - lag_epochs) % len(days)], miners, num_validators) if epoch >= lag_epochs else {}
        result = yuma.run(
            yuma.Inputs(
                stake=stake,
                may_validate=[uid < num_validators for uid in range(size)],
                weights=[fresh] * NUM_HONEST_VALIDATORS + [copied] + [{}] * len(miners),
                bonds=bonds,
                kappa=KAPPA,
                bonds_moving_average=BONDS_MOVING_AVERAGE,
                bonds_penalty=1.0,
            )
        )
        bonds = result.bonds
        for validator in range(num_validators if epoch >= EPOCHS // 2 else 0):
            earned[validator] += result.dividends[validator]
    honest = earned[0] / honest_share
    return earned[-1] / copier_share / honest if honest > 0 else 0.0


def _row(day: Mapping[Hotkey, int], miners: Sequence[Hotkey], first_uid: int) -> dict[int, float]:
    return {first_uid + place: float(day[miner]) for place, miner in enumerate(miners) if day.get(miner, 0) > 0}
