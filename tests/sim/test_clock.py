"""Virtual time: order, ties, cancelled timers."""

from hypothesis import given
from hypothesis import strategies as st

from orion.simulator.clock import EPOCH_S, VirtualClock


@given(st.lists(st.sampled_from([0.0, 0.5, 1.0, 2.0]), max_size=30))
def test_events_happen_in_order_of_time_and_ties_in_order_of_scheduling(delays_s: list[float]) -> None:
    clock = VirtualClock()
    happened: list[tuple[float, int]] = []
    for number, delay_s in enumerate(delays_s):
        clock.schedule(delay_s, lambda number=number: happened.append((clock.monotonic_s(), number)))
    while clock.step():
        pass
    assert happened == sorted((delay_s, number) for number, delay_s in enumerate(delays_s))


def test_a_cancelled_timer_does_not_happen_and_does_not_move_the_clock() -> None:
    clock = VirtualClock()
    happened: list[str] = []
    clock.schedule(1.0, lambda: happened.append("kept"))
    clock.schedule(0.5, lambda: happened.append("cancelled")).cancel()
    assert clock.step()
    assert happened == ["kept"]
    assert clock.now_s() == EPOCH_S + 1.0
    assert not clock.step()


def test_what_is_scheduled_in_the_past_happens_now() -> None:
    clock = VirtualClock()
    clock.schedule(3.0, lambda: None)
    clock.step()
    clock.schedule_at(EPOCH_S, lambda: None)
    clock.step()
    assert clock.now_s() == EPOCH_S + 3.0
