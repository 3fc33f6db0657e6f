"""The simulated network: HTTP's semantics under loss, doubles, delay, partitions and dying processes."""

from random import Random

import pytest

from orion.simulator.clock import VirtualClock
from orion.simulator.network import Impairment, LinkProfile, Network, Respond


class Pair:
    """Two hosts, `a` asking `b`, which answers everything at once."""

    def __init__(self, profile: LinkProfile | None = None) -> None:
        self.clock = VirtualClock()
        self.network = Network(self.clock, Random(1), profile or LinkProfile(latency_s=0.1, jitter_s=0.0))
        self.heard: list[object] = []
        self.ends: list[tuple[object | None, float]] = []
        self.network.attach("a", self.serve)
        self.network.attach("b", self.serve)

    def serve(self, source: str, request: object, respond: Respond) -> None:
        self.heard.append((source, request))
        respond(f"re: {request}", 10)

    def ask(self, request: str, size_bytes: int = 100, timeout_s: float | None = None) -> None:
        def on_end(answer: object | None) -> None:
            self.ends.append((answer, self.clock.monotonic_s()))

        self.network.request("a", "b", request, size_bytes, on_end, timeout_s=timeout_s)

    def run(self) -> None:
        while self.clock.step():
            pass


def test_an_answer_takes_a_round_trip() -> None:
    pair = Pair()
    pair.ask("hello")
    pair.run()
    assert pair.heard == [("a", "hello")]
    ((answer, end_s),) = pair.ends
    assert answer == "re: hello"
    assert end_s == pytest.approx(2 * pair.network.latency_s("a", "b"), rel=0.01)


def test_bytes_queue_behind_each_other_on_a_link() -> None:
    pair = Pair(LinkProfile(latency_s=0.001, jitter_s=0.0, up_bytes_per_s=1e6, down_bytes_per_s=1e6))
    for number in range(3):
        pair.ask(f"{number}", size_bytes=1_000_000)
    pair.run()
    assert [round(end_s) for _, end_s in pair.ends] == [1, 2, 3]


@pytest.mark.parametrize("lost", ["request", "answer"])
def test_a_lost_message_is_unreachable_after_the_time_out(lost: str) -> None:
    pair = Pair()
    source, target = ("a", "b") if lost == "request" else ("b", "a")
    impairment = Impairment(source, target, drop_share=1.0)
    pair.network.impair(impairment)
    pair.ask("hello", timeout_s=2.0)
    pair.run()
    assert pair.ends == [(None, 2.0)]
    assert len(pair.heard) == (0 if lost == "request" else 1)
    assert impairment.num_hits == 1


def test_a_doubled_request_is_heard_twice_and_answered_once() -> None:
    pair = Pair()
    pair.network.impair(Impairment(duplicate_share=1.0))
    pair.ask("hello")
    pair.run()
    assert len(pair.heard) == 2
    assert len(pair.ends) == 1


def test_delay_lets_messages_overtake_each_other() -> None:
    pair = Pair()
    pair.network.impair(Impairment(source="a", delay_s=1.0))
    for number in range(20):
        pair.ask(f"{number}")
    pair.run()
    order = [request for _, request in pair.heard]
    assert sorted(order) == sorted(f"{number}" for number in range(20))
    assert order != [f"{number}" for number in range(20)]


def test_nobody_listening_is_learnt_in_a_round_trip_and_not_after_the_time_out() -> None:
    pair = Pair()
    pair.network.detach("b")
    pair.ask("hello", timeout_s=60.0)
    pair.run()
    ((answer, end_s),) = pair.ends
    assert answer is None
    assert end_s < 1.0


def test_a_process_that_ended_hears_no_answer_even_after_its_host_came_back() -> None:
    pair = Pair()
    pair.ask("hello")
    pair.network.detach("a")
    pair.network.attach("a", pair.serve)
    pair.run()
    assert pair.heard
    assert pair.ends == []


def test_a_receiver_that_died_before_it_answered_is_unreachable_at_once() -> None:
    pair = Pair()
    waiting: list[Respond] = []
    pair.network.attach("b", lambda source, request, respond: waiting.append(respond))
    pair.ask("hello", timeout_s=60.0)
    while not waiting:
        pair.clock.step()
    pair.network.detach("b")
    waiting[0]("too late", 10)
    pair.run()
    ((answer, end_s),) = pair.ends
    assert answer is None
    assert end_s < 1.0


def test_only_messages_of_the_named_type_are_harmed() -> None:
    pair = Pair()
    pair.network.impair(Impairment(drop_share=1.0, carries=int))
    pair.ask("hello")
    pair.run()
    assert [answer for answer, _ in pair.ends] == ["re: hello"]


def test_a_lifted_impairment_harms_no_more() -> None:
    pair = Pair()
    impairment = Impairment(drop_share=1.0)
    pair.network.impair(impairment)
    pair.network.lift(impairment)
    pair.ask("hello")
    pair.run()
    assert [answer for answer, _ in pair.ends] == ["re: hello"]


def test_other_hosts_hear_that_a_process_has_ended_unless_that_is_lost_too() -> None:
    pair = Pair()
    broken: list[object] = []
    pair.network.attach("b", pair.serve, on_broken=broken.append)
    process = pair.network.host("a")
    pair.network.detach("a")
    pair.run()
    assert broken == [process]
    pair.network.attach("a", pair.serve)
    pair.network.impair(Impairment("a", drop_share=1.0))
    pair.network.detach("a")
    pair.run()
    assert broken == [process]


@pytest.mark.parametrize(("bulk_share", "small_s"), [(0.5, 0.04), (None, 1.02)])
def test_transfers_with_a_bulk_host_queue_by_themselves(bulk_share: float | None, small_s: float) -> None:
    """With their share of the link; without one, what comes after a large upload waits for it."""
    rates = {"up_bytes_per_s": 1e3, "down_bytes_per_s": 1e6}
    pair = Pair(LinkProfile(latency_s=0.0, jitter_s=0.0, bulk_share=bulk_share, **rates))
    pair.network.attach("store", pair.serve, rate_share=100.0, is_bulk=True)
    pair.network.request("a", "store", "large", 1000, lambda answer: None)
    pair.ask("small", size_bytes=10)
    while not pair.ends:
        assert pair.clock.step()
    assert pair.ends[0][1] == pytest.approx(small_s, abs=0.01)
