"""Yuma consensus: from validators' weights and stakes to miners' incentive and validators' dividends. Pure arithmetic.

Owns the rule and nothing else. V validators' rows and N neurons' columns are indices into the same list of uids.
Invariants: incentives add up to 1 or are all 0, dividends alike; nobody's result depends on the weights of those who
have no stake, no permit or have been silent; no weight above what a majority of stake (`kappa`) supports has effect.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

Row = Mapping[int, float]
"""uid to value; what is left out is 0."""


@dataclass(frozen=True)
class Inputs:
    """One mechanism of a subnet at the moment of an epoch. All sequences are by uid and equally long."""

    stake: Sequence[float]
    """What each neuron's stake counts for; any scale."""
    may_validate: Sequence[bool]
    """Has a permit, and has set weights recently."""
    weights: Sequence[Row]
    """Each neuron's weights for others; any scale per row."""
    bonds: Sequence[Row]
    """Each neuron's bonds in others before this epoch; columns of any scale."""
    kappa: float
    """Share of stake that a weight needs behind it, 0 to 1."""
    bonds_moving_average: float
    """What remains of the old bonds, 0 to 1."""
    bonds_penalty: float
    """1 = weight above the consensus earns no bonds, 0 = all of it does."""
    self_weight_uid: int | None = None
    """The neuron that may weigh itself: the subnet owner's."""


@dataclass(frozen=True)
class Result:
    """What the epoch found. All sequences are by uid."""

    consensus: list[float]
    """The largest weight that enough stake supports; 0 to 1."""
    incentive: list[float]
    """Adds up to 1, or all 0."""
    dividends: list[float]
    """Adds up to 1, or all 0."""
    validator_trust: list[float]
    """How much of a validator's weight the consensus left; 0 to 1."""
    bonds: list[dict[int, float]] = field(default_factory=list)
    """Each column with bonds in it adds up to 1."""


def run(inputs: Inputs) -> Result:
    """One epoch."""
    size = len(inputs.stake)
    stake = normalised([amount if may else 0.0 for amount, may in zip(inputs.stake, inputs.may_validate, strict=True)])
    weights = [_usable_row(inputs, validator, stake) for validator in range(size)]
    consensus = [
        supported_weight(
            [(row.get(target, 0.0), share) for row, share in zip(weights, stake, strict=True)], inputs.kappa
        )
        for target in range(size)
    ]
    clipped = [{target: min(value, consensus[target]) for target, value in row.items()} for row in weights]
    ranks = [0.0] * size
    for row, share in zip(clipped, stake, strict=True):
        for target, value in row.items():
            ranks[target] += share * value
    incentive = normalised(ranks)
    bonds = _new_bonds(inputs, weights, clipped, stake)
    earned = [sum(value * incentive[target] for target, value in row.items()) for row in bonds]
    return Result(
        consensus=consensus,
        incentive=incentive,
        dividends=normalised(earned),
        validator_trust=[sum(row.values()) for row in clipped],
        bonds=bonds,
    )


def supported_weight(votes: Sequence[tuple[float, float]], kappa: float) -> float:
    """The largest weight that voters with at least `kappa` of all stake support; votes are (weight, stake).

    A voter supports every weight up to its own. This is the stake-weighted median for kappa = 1/2.
    """
    total = sum(stake for _, stake in votes)
    if total == 0:
        return 0.0
    support = 0.0
    for weight, stake in sorted(votes, reverse=True):
        support += stake
        if support >= kappa * total:
            return weight
    return min(weight for weight, _ in votes)


def permits(stake: Sequence[float], num_max: int) -> list[bool]:
    """Who may validate: the `num_max` with the most stake, of equal ones the lower uid, none without any."""
    ranked = sorted(range(len(stake)), key=lambda uid: (-stake[uid], uid))[:num_max]
    chosen = {uid for uid in ranked if stake[uid] > 0}
    return [uid in chosen for uid in range(len(stake))]


def normalised(values: Sequence[float]) -> list[float]:
    """The same proportions, adding up to 1; all zeros stay."""
    total = sum(values)
    return [value / total for value in values] if total > 0 else [0.0] * len(values)


def _usable_row(inputs: Inputs, validator: int, stake: Sequence[float]) -> dict[int, float]:
    """A validator's weights as shares: nothing from who doesn't count, nothing for itself, nothing for no slot."""
    if stake[validator] == 0:
        return {}
    size = len(stake)
    row = {
        target: value
        for target, value in inputs.weights[validator].items()
        if value > 0 and target < size and (target != validator or target == inputs.self_weight_uid)
    }
    total = sum(row.values())
    return {target: value / total for target, value in row.items()}


def _new_bonds(
    inputs: Inputs, weights: Sequence[Row], clipped: Sequence[Row], stake: Sequence[float]
) -> list[dict[int, float]]:
    """The moving average of what each validator's stake and weights bought of each neuron."""
    bought = []
    for row, capped, share in zip(weights, clipped, stake, strict=True):
        bought.append(
            {target: share * (value + inputs.bonds_penalty * (capped[target] - value)) for target, value in row.items()}
        )
    fresh, old = column_normalised(bought), column_normalised(inputs.bonds)
    kept = inputs.bonds_moving_average
    mixed = []
    for new_row, old_row in zip(fresh, old, strict=True):
        targets = sorted(new_row.keys() | old_row.keys())
        mixed.append({t: (1 - kept) * new_row.get(t, 0.0) + kept * old_row.get(t, 0.0) for t in targets})
    return column_normalised(mixed)


def column_normalised(rows: Sequence[Row]) -> list[dict[int, float]]:
    """Every column divided by its sum; entries of 0 are left out."""
    totals: dict[int, float] = {}
    for row in rows:
        for target, value in row.items():
            totals[target] = totals.get(target, 0.0) + value
    return [{target: value / totals[target] for target, value in row.items() if value > 0} for row in rows]
