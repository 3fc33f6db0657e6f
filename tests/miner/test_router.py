"""Router: the better of two random replicas, a breaker for those that fail, and a good word for those that recover."""

import heapq
import math
from collections import Counter
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from orion.common.ids import Hotkey
from orion.miner.router import (
    ABSENT_MAX,
    FAILURE_COST_PRIOR_S,
    FAILURES_TO_OPEN,
    NEWCOMER_IN_FLIGHT,
    PAUSE_MAX_S,
    PAUSE_MIN_S,
    Router,
)

PEERS = [Hotkey(name) for name in ("a", "b", "c", "d")]


def measure(router: Router, peer: Hotkey, trip_s: float) -> None:
    """Teaches the router a peer: one trip after the other."""
    for place in range(30):
        router.sent(peer)
        router.accepted(peer, place * trip_s, queued=0)
        router.completed(peer, place * trip_s, (place + 1) * trip_s)
        router.released(peer)


ACTIONS = ["sent", "accepted", "full", "busy", "failed", "refused", "completed", "lost", "gone", "wait"]


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**32),
    actions=st.lists(st.tuples(st.sampled_from(PEERS), st.sampled_from(ACTIONS)), max_size=60),
)
def test_whatever_happened_the_choice_is_usable_or_there_is_none(seed: int, actions: list[tuple[Hotkey, str]]) -> None:
    router, now_s, in_flight = Router(Random(seed)), 0.0, Counter[Hotkey]()
    for peer, action in actions:
        match action:
            case "sent":
                router.sent(peer)
                in_flight[peer] += 1
            case "accepted":
                router.accepted(peer, now_s, 3, 2)
            case "full":
                router.accepted(peer, now_s, 5, 0)
            case "busy":
                router.busy(peer, now_s + 1.0)
            case "failed":
                router.failed(peer, now_s)
            case "refused":
                router.refused(peer)
            case "completed" | "lost" if in_flight[peer]:
                (router.completed if action == "completed" else router.lost)(peer, now_s - 0.5, now_s)
                router.released(peer)
                in_flight[peer] -= 1
            case "gone":
                router.keep_only([other for other in PEERS if other != peer])
            case _:
                now_s += 1.0
        chosen = router.choose(PEERS, now_s)
        usable_s = router.next_usable_s(PEERS)
        assert (chosen is not None) == (usable_s is not None and usable_s <= now_s)
        assert chosen is None or chosen in PEERS
        assert 0 < router.expected_s(peer, now_s) < math.inf
        assert router.in_flight(peer) == in_flight[peer]


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 2**32), num_in_flight=st.integers(0, 5), num_lost=st.integers(0, 50), data=st.data())
def test_more_load_and_more_losses_never_make_a_peer_look_better(
    seed: int, num_in_flight: int, num_lost: int, data: st.DataObject
) -> None:
    router = Router(Random(seed))
    measure(router, PEERS[0], 1.0)
    before_s = router.expected_s(PEERS[0], 30.0)
    for _ in range(num_in_flight):
        router.sent(PEERS[0])
    loaded_s = router.expected_s(PEERS[0], 30.0)
    router.accepted(PEERS[0], 30.0, queued=data.draw(st.integers(0, 100)))
    told_s = router.expected_s(PEERS[0], 30.0)
    for _ in range(num_lost):
        router.lost(PEERS[0], 20.0, 30.0)
    assert before_s <= loaded_s <= told_s <= router.expected_s(PEERS[0], 30.0)


def test_the_faster_of_two_is_preferred_and_the_other_still_tried() -> None:
    router = Router(Random(1))
    measure(router, PEERS[0], 1.0)
    measure(router, PEERS[1], 3.0)

    chosen = Counter(router.choose(PEERS[:2], 1000.0) for _ in range(1000))

    assert chosen[PEERS[0]] > 850
    assert chosen[PEERS[1]] > 5, "the other one is drawn now and then, so that a change is noticed"


def test_a_longer_trip_counts_more_than_in_proportion() -> None:
    """Most of a trip is the same through all replicas."""
    router = Router(Random(1))
    measure(router, PEERS[0], 1.0)
    measure(router, PEERS[1], 1.2)

    assert router.expected_s(PEERS[1], 1000.0) > 1.2**1.5 * router.expected_s(PEERS[0], 1000.0)


def test_what_is_in_flight_counts_against_a_peer() -> None:
    router = Router(Random(1))
    for peer in PEERS[:2]:
        measure(router, peer, 2.0)
    before_s = router.expected_s(PEERS[0], 1000.0)
    for _ in range(3):
        router.sent(PEERS[0])

    assert router.expected_s(PEERS[0], 1000.0) == pytest.approx(before_s + 3 * 2.0, rel=0.01)
    assert Counter(router.choose(PEERS[:2], 1000.0) for _ in range(500))[PEERS[1]] > 450


def test_what_a_peer_told_counts_only_while_it_is_fresh() -> None:
    router = Router(Random(1))
    for peer in PEERS[:2]:
        measure(router, peer, 2.0)
    before_s = router.expected_s(PEERS[0], 1000.0)
    router.accepted(PEERS[0], 1000.0, queued=4, credits=0)

    assert router.expected_s(PEERS[0], 1000.5) > before_s
    assert {router.choose(PEERS[:2], 1000.5) for _ in range(200)} == {PEERS[1]}, "without credits it is asked last"
    assert router.choose(PEERS[:1], 1000.5) == PEERS[0], "but it is asked when there is nobody else"
    assert router.expected_s(PEERS[0], 1010.0) == before_s
    assert {router.choose(PEERS[:2], 1010.0) for _ in range(200)} == set(PEERS[:2])


def test_credits_are_used_up_by_what_is_sent() -> None:
    router = Router(Random(1))
    for peer in PEERS[:2]:
        measure(router, peer, 2.0)
    router.accepted(PEERS[0], 1000.0, queued=0, credits=1)
    router.sent(PEERS[0])

    assert {router.choose(PEERS[:2], 1000.1) for _ in range(200)} == {PEERS[1]}


def test_a_newcomer_is_tried_soon_and_gets_a_bounded_share_until_it_is_measured() -> None:
    router, newcomer = Router(Random(1)), PEERS[3]
    for peer in PEERS[:3]:
        measure(router, peer, 1.0)
    for _ in range(40):  # Nothing has come back yet of all that is sent.
        chosen = router.choose(PEERS, 1000.0)
        assert chosen is not None
        router.sent(chosen)

    assert router.in_flight(newcomer) == NEWCOMER_IN_FLIGHT

    router.completed(newcomer, 1000.0, 1001.0)
    router.released(newcomer)
    assert router.choose(PEERS, 1001.0) == newcomer, "measured, with the least in flight"


def test_a_peer_that_fails_often_is_avoided_though_it_is_fast() -> None:
    router = Router(Random(1))
    measure(router, PEERS[0], 1.0)
    measure(router, PEERS[1], 1.5)
    for _ in range(4):
        router.lost(PEERS[0], 0.0, 20.0)
        router.completed(PEERS[0], 0.0, 1.0)

    assert router.expected_s(PEERS[0], 1000.0) > router.expected_s(PEERS[1], 1000.0) + 1.0


def test_a_failure_costs_what_failures_have_cost() -> None:
    costs_s = []
    for lost_s in (0.5, 60.0):
        router = Router(Random(1))
        measure(router, PEERS[0], 1.0)
        for _ in range(30):
            router.lost(PEERS[1], 0.0, lost_s)
        costs_s.append(router.expected_s(PEERS[1], 1000.0))
        assert router.expected_s(PEERS[0], 1000.0) < 0.5 * costs_s[-1]

    assert costs_s[0] < 0.1 * costs_s[1]


def test_who_comes_back_is_a_newcomer_with_its_record() -> None:
    router = Router(Random(1))
    for peer in PEERS[:2]:
        measure(router, peer, 1.0)
    for _ in range(3):
        router.keep_only(PEERS[1:2])
        router.expected_s(PEERS[0], 1000.0)

    assert router.expected_s(PEERS[0], 1000.0) > router.expected_s(PEERS[1], 1000.0) + 0.05 * FAILURE_COST_PRIOR_S


def test_records_of_the_absent_are_bounded() -> None:
    router = Router(Random(1))
    for number in range(ABSENT_MAX + 10):
        router.refused(Hotkey(f"peer {number}"))
    router.keep_only([])

    assert len(router._absent) == ABSENT_MAX


def test_an_unknown_peer_is_taken_to_be_like_the_others() -> None:
    router = Router(Random(1))
    measure(router, PEERS[0], 5.0)

    assert router.expected_s(PEERS[1], 0.0) == pytest.approx(router.expected_s(PEERS[0], 0.0), rel=0.05)


def test_the_breaker_opens_probes_one_at_a_time_and_closes() -> None:
    router = Router(Random(1))
    peer = PEERS[0]
    for _ in range(FAILURES_TO_OPEN):
        assert router.choose([peer], 0.0) == peer
        router.sent(peer)
        router.failed(peer, 0.0)
        router.released(peer)

    assert router.choose([peer], 0.0) is None
    assert router.next_usable_s([peer]) == PAUSE_MIN_S
    assert router.choose([peer], PAUSE_MIN_S) == peer
    router.sent(peer)
    assert router.choose([peer], PAUSE_MIN_S) is None, "one probe at a time"
    router.failed(peer, PAUSE_MIN_S)
    router.released(peer)
    assert router.next_usable_s([peer]) == 3 * PAUSE_MIN_S, "the pause doubles"
    router.sent(peer)
    router.accepted(peer, PAUSE_MIN_S, 0)
    assert router.choose([peer], PAUSE_MIN_S) == peer


def test_the_pause_is_bounded() -> None:
    router = Router(Random(1))
    for _ in range(100):
        router.failed(PEERS[0], 0.0)

    assert router.next_usable_s(PEERS[:1]) == PAUSE_MAX_S


def test_a_busy_peer_is_not_offered_all_that_waits_for_it() -> None:
    router = Router(Random(1))
    peer = PEERS[0]
    router.sent(peer)
    router.busy(peer, 1.0)
    router.released(peer)

    assert router.choose([peer], 0.5) is None
    assert router.choose([peer], 1.0) == peer
    router.sent(peer)
    assert router.choose([peer], 1.0) is None


def test_peers_that_are_gone_are_forgotten_once_nothing_is_in_flight() -> None:
    router = Router(Random(1))
    measure(router, PEERS[1], 1.0)
    measure(router, PEERS[0], 50.0)
    router.busy(PEERS[0], 5000.0)
    router.sent(PEERS[1])
    router.keep_only([])

    assert router.next_usable_s(PEERS[:1]) == 0.0
    assert router.in_flight(PEERS[1]) == 1


def run_pipeline(
    seed: int,
    service_s: dict[Hotkey, float],
    dead: set[Hotkey],
    duration_s: float,
    *,
    one_machine: frozenset[Hotkey] = frozenset(),
    behind_s: float = 0.0,
    credits: int = 8,
) -> Counter[Hotkey]:
    """One sender with some credits before replicas of the given speeds; how much each completed. `one_machine` are
    replicas that share a device; stages behind them take `behind_s`."""
    router = Router(Random(seed))
    free_s = dict.fromkeys(service_s, 0.0)
    done: Counter[Hotkey] = Counter()
    ends: list[tuple[float, Hotkey, float]] = []
    now_s = 0.0
    while now_s < duration_s:
        peer = router.choose(sorted(service_s), now_s) if credits else None
        if peer is not None and peer in dead:
            router.sent(peer)
            router.failed(peer, now_s)
            router.released(peer)
            now_s += 0.01
            continue
        if peer is not None:
            credits -= 1
            router.sent(peer)
            router.accepted(peer, now_s, queued=0)
            device = min(one_machine) if peer in one_machine else peer
            free_s[device] = max(free_s[device], now_s + 0.02) + service_s[peer]
            heapq.heappush(ends, (free_s[device] + behind_s, peer, now_s))
            continue
        if not ends:
            now_s += 0.1
            continue
        now_s, finished, sent_s = heapq.heappop(ends)
        router.completed(finished, sent_s, now_s)
        router.released(finished)
        done[finished] += 1
        credits += 1
    return done


@pytest.mark.parametrize("seed", range(5))
def test_load_follows_speed(seed: int) -> None:
    service_s = {PEERS[0]: 0.1, PEERS[1]: 0.1, PEERS[2]: 0.4}

    done = run_pipeline(seed, service_s, set(), 200.0)

    best = sum(200.0 / seconds for seconds in service_s.values())
    assert sum(done.values()) > 0.8 * best
    assert done[PEERS[2]] < 0.5 * done[PEERS[0]]


@pytest.mark.parametrize("seed", range(5))
def test_a_machine_under_two_hotkeys_gets_the_work_of_one(seed: int) -> None:
    """As far as devices are what work waits for: what others leave idle it may take."""
    done = run_pipeline(
        seed, dict.fromkeys(PEERS, 0.1), set(), 400.0, one_machine=frozenset(PEERS[:2]), behind_s=0.5, credits=24
    )

    assert 0.9 < (done[PEERS[0]] + done[PEERS[1]]) / ((done[PEERS[2]] + done[PEERS[3]]) / 2) < 1.1


@pytest.mark.parametrize("seed", range(5))
def test_equal_replicas_get_equal_work(seed: int) -> None:
    done = run_pipeline(seed, {PEERS[0]: 0.1, PEERS[1]: 0.1}, set(), 100.0)

    assert 0.8 < done[PEERS[0]] / done[PEERS[1]] < 1.25


@pytest.mark.parametrize("seed", range(5))
def test_equal_replicas_get_equal_work_when_there_is_little_of_it(seed: int) -> None:
    """One microbatch at a time, most of whose time passes in later stages."""
    router, now_s = Router(Random(seed)), 0.0
    done: Counter[Hotkey] = Counter()
    for _ in range(400):
        peer = router.choose(PEERS[:2], now_s)
        assert peer is not None
        router.sent(peer)
        router.accepted(peer, now_s, queued=0)
        router.completed(peer, now_s, now_s + 1.0)
        router.released(peer)
        now_s += 1.0
        done[peer] += 1

    assert 0.6 < done[PEERS[0]] / done[PEERS[1]] < 1.7


@pytest.mark.parametrize("seed", range(5))
def test_a_dead_replica_costs_little(seed: int) -> None:
    service_s = {PEERS[0]: 0.1, PEERS[1]: 0.1}

    done = run_pipeline(seed, service_s, {PEERS[1]}, 100.0)

    assert sum(done.values()) > 0.95 * 100.0 / 0.1
