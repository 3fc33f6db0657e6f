"""next_work: an inner step as soon as a batch is full, then backward, then forward, the oldest first; nothing while it
is open whether a batch is full."""

from hypothesis import given
from hypothesis import strategies as st

from orion.common.ids import MicrobatchId
from orion.miner.scheduler import DoBackward, DoForward, DoInnerStep, Readiness, next_work

IDS = st.lists(st.integers(0, 1000).map(MicrobatchId), max_size=5, unique=True)


@given(backward=IDS, forward=IDS, accumulated=st.integers(0, 4), coming=st.integers(0, 2), per_step=st.integers(1, 4))
def test_the_order_of_work(
    backward: list[MicrobatchId], forward: list[MicrobatchId], accumulated: int, coming: int, per_step: int
) -> None:
    work = next_work(Readiness(backward, forward, accumulated, coming, per_step))
    expected = accumulated + coming

    match work:
        case DoInnerStep():
            assert accumulated >= per_step and not coming
        case DoBackward(microbatch_id):
            assert expected < per_step and microbatch_id == backward[0]
        case DoForward(microbatch_id):
            assert expected < per_step and not backward and microbatch_id == forward[0]
        case None:
            assert (expected < per_step and not backward and not forward) or (expected >= per_step and coming)
