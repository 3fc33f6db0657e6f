"""Whose connection broke off, from the questions and closings that a server sees."""

from hypothesis import given
from hypothesis import strategies as st
from orchestrator_world import hotkey_of

from orion.common.ids import Hotkey
from orion.common.protocol.fields import MINERS_MAX
from orion.orchestrator.connections import FeedConnections
from orion.orchestrator.events import ConnectionLost, ConnectionSeen

A = hotkey_of(0, 0)
CONNECTIONS = [f"connection {number}" for number in range(4)]


def opened() -> FeedConnections:
    """With some connections that are open."""
    connections = FeedConnections()
    for connection in ("a1", "a2", "long", "short", "old", "new", "newer", "newest", *CONNECTIONS):
        connections.opened(connection)
    return connections


def test_a_question_that_waits_and_breaks_off_is_a_loss_and_the_next_one_a_return() -> None:
    connections = opened()
    assert connections.asked(A, "a1", 0.0) is None
    assert connections.broke_off("a1") == ConnectionLost(hotkey=A, usual_s=0.0)
    assert connections.broke_off("a1") is None
    assert connections.asked(A, "a2", 1.0) == ConnectionSeen(hotkey=A)
    assert connections.asked(A, "a2", 1.0) is None


def test_a_process_that_ends_between_two_questions_is_noticed_too() -> None:
    connections = opened()
    connections.asked(A, "a1", 0.0)
    connections.answered(A, "a1", 5.0)
    assert connections.broke_off("a1") == ConnectionLost(hotkey=A, usual_s=0.0)


def test_the_time_that_an_asker_usually_takes_is_told() -> None:
    connections = opened()
    for asked_s, answered_s in [(0.0, 1.0), (1.4, 2.0), (2.1, 3.0)]:
        connections.asked(A, "a1", asked_s)
        connections.answered(A, "a1", answered_s)
    connections.asked(A, "a1", 3.1)
    lost = connections.broke_off("a1")
    assert lost is not None and 0.3 < lost.usual_s < 0.4, "the longest, which fades"


def test_who_waits_on_another_connection_is_not_lost() -> None:
    connections = opened()
    connections.asked(A, "long", 0.0)
    connections.asked(A, "short", 1.0)
    connections.answered(A, "short", 1.0)
    assert connections.broke_off("short") is None, "it was idle"
    assert connections.broke_off("long") is not None


def test_an_old_connection_that_is_closed_late_says_nothing_of_the_new_process() -> None:
    connections = opened()
    connections.asked(A, "old", 0.0)
    connections.asked(A, "new", 1.0)
    assert connections.broke_off("old") is None
    connections.asked(A, "newer", 2.0)
    connections.answered(A, "newer", 3.0)
    connections.answered(A, "new", 3.0)
    connections.asked(A, "newest", 3.1)
    connections.answered(A, "newest", 3.2)
    assert connections.broke_off("newer") is None
    assert connections.broke_off("nobody's") is None


@given(
    steps=st.lists(
        st.tuples(st.sampled_from(["asked", "answered", "broke_off"]), st.sampled_from(CONNECTIONS)), max_size=60
    )
)
def test_losses_and_returns_alternate_and_nobody_is_lost_who_waits(steps: list[tuple[str, str]]) -> None:
    connections = opened()
    waiting: set[str] = set()
    is_lost = False
    for number, (step, connection) in enumerate(steps):
        match step:
            case "asked":
                seen = connections.asked(A, connection, float(number))
                assert (seen is not None) == is_lost
                is_lost = False
                waiting.add(connection)
            case "answered":
                connections.answered(A, connection, float(number))
                waiting.discard(connection)
            case _:
                waiting.discard(connection)
                lost = connections.broke_off(connection)
                connections.opened(connection)
                assert lost is None or (not is_lost and not waiting)
                is_lost = is_lost or lost is not None


def test_a_question_that_is_read_after_its_connection_was_closed_says_nothing() -> None:
    connections = opened()
    connections.asked(A, "a1", 0.0)
    assert connections.broke_off("a1") is not None
    assert connections.asked(A, "a1", 0.1) is None
    assert connections.asked(A, "a2", 0.2) is not None


def test_strangers_without_number_are_forgotten() -> None:
    connections = opened()
    connections.asked(A, "a1", 0.0)
    for number in range(MINERS_MAX):
        connections.opened(number)
        connections.asked(Hotkey(f"5Stranger{number}".replace("0", "o").ljust(48, "z")), number, 0.0)
    assert connections.broke_off("a1") is None
    assert connections.broke_off(0) is not None
