"""next_work: an inner step as soon as a batch is full, then backward, then forward, the oldest first."""

from hypothesis import given
from hypothesis import strategies as st

from orion.common.ids import MicrobatchId
from orion.miner.scheduler import DoBackward, DoForward, DoInnerStep, Readiness, next_work

IDS = st.lists(st.integers(0, 1000).map(MicrobatchId), max_size=5, unique=True)


@given(backward=IDS, forward=IDS, accumulated=st.integers(0, 4), per_step=st.integers(1, 4))
def test_the_order_of_work(
    backward: list[MicrobatchId], forward: list[MicrobatchId], accumulated: int, per_step: int
) -> None:
    work = next_work(Readiness(backward, forward, accumulated, per_step))

    match work:
        case DoInnerStep():
            assert accumulated >= per_step
        case DoBackward(microbatch_id):
            assert accumulated < per_step and microbatch_id == backward[0]
        case DoForward(microbatch_id):
            assert accumulated < per_step and not backward and microbatch_id == forward[0]
        case None:
            assert accumulated < per_step and not backward and not forward
