"""DeviceQueue: one job runs, one waits, they end in order."""

import pytest

from orion.common.ids import DataId, MicrobatchId
from orion.miner.device_queue import FORWARD_AHEAD_S_MAX, DeviceQueue
from orion.miner.events import Backward, EncodePseudoGradient, Forward, InnerStep

ONE, TWO = Forward(MicrobatchId(1), DataId(1)), Forward(MicrobatchId(2), DataId(2))
BACK = Backward(MicrobatchId(1))
STEP = InnerStep(0, 1.0)


def test_jobs_end_in_the_order_in_which_they_were_given() -> None:
    queue = DeviceQueue()
    queue.give(STEP, 1.0)
    queue.give(BACK, 1.0)
    assert not queue.has_room and queue.has_inner_step
    assert queue.num_applying(is_last=False) == 1 and queue.num_applying(is_last=True) == 0

    assert [queue.end(2.0), queue.end(3.0)] == [STEP, BACK]
    assert queue.has_room and not queue.has_inner_step and not len(queue)


@pytest.mark.parametrize("job", [STEP, EncodePseudoGradient(0)])
def test_what_changes_or_shows_the_parameters_needs_an_idle_device(job: InnerStep | EncodePseudoGradient) -> None:
    queue = DeviceQueue()
    queue.give(ONE, 1.0)
    with pytest.raises(AssertionError, match="not idle"):
        queue.give(job, 1.0)


def test_a_forward_s_time_counts_from_when_it_could_begin() -> None:
    queue = DeviceQueue()
    assert not queue.forwards_are_quick, "none was seen"
    queue.give(ONE, 0.0)
    queue.give(TWO, 0.0)
    queue.end(0.9 * FORWARD_AHEAD_S_MAX)
    assert queue.forwards_are_quick
    queue.end(1.8 * FORWARD_AHEAD_S_MAX)
    assert queue.forwards_are_quick

    for number in range(20):
        queue.give(ONE, 10.0 * number)
        queue.end(10.0 * number + 2.0 * FORWARD_AHEAD_S_MAX)
    assert not queue.forwards_are_quick
