"""What a round may cost: memory and seconds bound a replay, and never to nothing."""

from hypothesis import given
from hypothesis import strategies as st

from orion.validator.budget import Spending
from orion.validator.config import Budget


def test_memory_bounds_a_replay() -> None:
    spending = Spending(Budget(evidence_bytes=1000))
    assert spending.operations_max(50) == 10
    assert spending.operations_max(5000) == 1
    assert spending.operations_max(0) == 1_000_000, "a single stage has no bodies"


def test_what_an_operation_costs_is_learnt() -> None:
    spending = Spending(Budget(compute_s=100))
    assert spending.operations_max(0) == 1_000_000
    spending.spend(20.0, num_operations=10)
    assert spending.operations_max(0) == 40
    spending.spend(70.0)
    assert spending.operations_max(0) == 5 and not spending.is_exhausted
    spending.spend(10.0, num_operations=20)
    assert spending.is_exhausted and spending.operations_max(0) == 1
    spending.begin_round()
    assert not spending.is_exhausted and spending.operations_max(0) == 200


@given(
    st.floats(1e-3, 1e6),
    st.integers(1, 2**40),
    st.integers(0, 2**30),
    st.lists(st.tuples(st.floats(0, 1e6), st.integers(0, 10**6))),
)
def test_there_is_always_something_to_do(
    compute_s: float, evidence_bytes: int, body_bytes: int, spent: list[tuple[float, int]]
) -> None:
    spending = Spending(Budget(compute_s=compute_s, evidence_bytes=evidence_bytes))
    for seconds, num_operations in spent:
        spending.spend(seconds, num_operations)
    assert 1 <= spending.operations_max(body_bytes) <= 1_000_000
