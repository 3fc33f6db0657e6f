"""Yuma consensus: an example worked by hand, and what must hold for all inputs."""

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orion.devnet import yuma

WORKED = yuma.Inputs(
    stake=[50, 30, 20, 0, 0],
    may_validate=[True, True, True, False, False],
    weights=[{3: 2, 4: 2}, {3: 3, 4: 1}, {4: 7}, {}, {}],
    bonds=[{}] * 5,
    kappa=0.5,
    bonds_moving_average=0.9,
    bonds_penalty=1.0,
)


def test_the_example_worked_by_hand() -> None:
    """Three validators with stake 1/2, 3/10 and 1/5 give two miners (1/2, 1/2), (3/4, 1/4) and (0, 1).

    Consensus: a weight of 1/2 is supported by 4/5 of stake for the first miner and by 7/10 for the second; above it
    only 3/10 and 1/5 remain. Clipped: (1/2, 1/2), (1/2, 1/4), (0, 1/2). Ranks: 0.25 + 0.15 = 0.4 and 0.25 + 0.075 +
    0.1 = 0.425, so incentives are 16/33 and 17/33. Bonds: (5/8, 3/8, 0) of the first and (10/17, 3/17, 4/17) of the
    second, so dividends are (10 + 10)/33, (6 + 3)/33 and 4/33.
    """
    result = yuma.run(WORKED)
    assert result.consensus == pytest.approx([0, 0, 0, 1 / 2, 1 / 2])
    assert result.incentive == pytest.approx([0, 0, 0, 16 / 33, 17 / 33])
    assert result.dividends == pytest.approx([20 / 33, 9 / 33, 4 / 33, 0, 0])
    assert result.validator_trust == pytest.approx([1, 3 / 4, 1 / 2, 0, 0])
    assert result.bonds[0] == pytest.approx({3: 5 / 8, 4: 10 / 17})
    assert result.bonds[2] == pytest.approx({4: 4 / 17})


def test_old_bonds_fade() -> None:
    first = replace(WORKED, bonds=[{}, {3: 1.0}, {}, {}, {}])
    bonds = yuma.run(first).bonds
    # Of the first miner Bob's bond was everything; a tenth of what is new comes in.
    assert bonds[1][3] == pytest.approx(0.9 + 0.1 * 3 / 8)
    assert bonds[0][3] == pytest.approx(0.1 * 5 / 8)


def test_without_a_penalty_weight_above_the_consensus_earns_bonds() -> None:
    bonds = yuma.run(replace(WORKED, bonds_penalty=0.0)).bonds
    assert bonds[1][3] == pytest.approx(0.3 * 3 / 4 / (0.5 / 2 + 0.3 * 3 / 4))


@pytest.mark.parametrize(
    ("votes", "kappa", "supported"),
    [
        ([], 0.5, 0),
        ([(0.7, 0.0)], 0.5, 0),
        ([(0.7, 1.0)], 0.5, 0.7),
        ([(0.9, 49), (0.1, 51)], 0.5, 0.1),
        ([(0.9, 50), (0.1, 50)], 0.5, 0.9),
        ([(0.9, 49), (0.1, 51)], 0.4, 0.9),
    ],
)
def test_the_supported_weight(votes: list[tuple[float, float]], kappa: float, supported: float) -> None:
    assert yuma.supported_weight(votes, kappa) == supported


def test_permits_go_to_the_most_stake() -> None:
    assert yuma.permits([5, 0, 9, 5, 1], 2) == [True, False, True, False, False]
    assert yuma.permits([0, 0], 2) == [False, False]


SIZE = 6
_amounts = st.floats(0, 1e9, allow_subnormal=False)
# Half of the smallest float is nothing at all, so that with it a vote would vanish by being scaled.
_weights = st.floats(0, 65_535, allow_subnormal=False)
_rows = st.lists(st.dictionaries(st.integers(0, SIZE - 1), _weights), min_size=SIZE, max_size=SIZE)
_inputs = st.builds(
    yuma.Inputs,
    stake=st.lists(_amounts, min_size=SIZE, max_size=SIZE),
    may_validate=st.lists(st.booleans(), min_size=SIZE, max_size=SIZE),
    weights=_rows,
    bonds=_rows,
    kappa=st.floats(0.01, 1),
    bonds_moving_average=st.floats(0, 0.99),
    bonds_penalty=st.floats(0, 1),
    self_weight_uid=st.one_of(st.none(), st.integers(0, SIZE - 1)),
)


@given(_inputs)
def test_shares_add_up(inputs: yuma.Inputs) -> None:
    result = yuma.run(inputs)
    for shares in (result.incentive, result.dividends):
        assert all(share >= 0 for share in shares)
        assert sum(shares) == pytest.approx(1, abs=1e-6) or not any(shares)
    assert all(0 <= value <= 1 + 1e-9 for value in [*result.consensus, *result.validator_trust])


@given(_inputs, st.integers(0, SIZE - 1), st.dictionaries(st.integers(0, SIZE - 1), st.floats(0, 65_535)))
def test_who_does_not_count_changes_nothing(inputs: yuma.Inputs, uid: int, row: dict[int, float]) -> None:
    silent = replace(inputs, may_validate=[may and other != uid for other, may in enumerate(inputs.may_validate)])
    louder = replace(silent, weights=[row if other == uid else old for other, old in enumerate(silent.weights)])
    assert yuma.run(silent) == yuma.run(louder)


@given(_inputs, st.floats(0.5, 8))
def test_the_scale_of_stake_and_weights_does_not_matter(inputs: yuma.Inputs, scale: float) -> None:
    scaled = replace(
        inputs,
        stake=[amount * scale for amount in inputs.stake],
        weights=[{target: value * scale for target, value in row.items()} for row in inputs.weights],
    )
    one, other = yuma.run(inputs), yuma.run(scaled)
    # A weight may lie on either side of kappa after rounding, so only inputs well away from it are compared.
    if one.consensus == pytest.approx(other.consensus, abs=1e-9):
        assert one.incentive == pytest.approx(other.incentive, abs=1e-6)


@given(_inputs)
def test_a_minority_alone_pays_nobody(inputs: yuma.Inputs) -> None:
    """What only stake below kappa supports has no effect: a liar with little stake earns nobody anything."""
    honest_stake = 70.0
    rows: list[dict[int, float]] = [{4: 1.0}, dict(inputs.weights[1]), {}, {}, {}, {}]
    result = yuma.run(
        replace(
            inputs,
            stake=[honest_stake, 30.0, 0, 0, 0, 0],
            may_validate=[True, True, False, False, False, False],
            weights=rows,
            kappa=0.5,
            self_weight_uid=None,
        )
    )
    assert result.incentive == pytest.approx([0, 0, 0, 0, 1, 0])
