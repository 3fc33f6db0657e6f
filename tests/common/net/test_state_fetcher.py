"""An anchor in parts from several replicas, some of which lie, hang or have gone on."""

from collections import Counter
from collections.abc import Callable, Sequence

import pytest
import torch
from structlog.testing import capture_logs

from orion.common.errors import TransportError
from orion.common.ids import Hotkey, MemberState
from orion.common.net.state_fetcher import PARTS_PER_PEER, Answer, StateRequest, fetch_state
from orion.common.protocol.messages import Peer, RefusalCode, StateOutline, StateQuery
from orion.common.protocol.refusals import refused
from orion.common.train.outer import OuterState, part_bytes, state_bounds, state_digest, state_outline

NUM_PARAMS = 20_000


def state_of(seed: int) -> OuterState:
    anchor_N, momentum_N = torch.randn(2, NUM_PARAMS, generator=torch.Generator().manual_seed(seed))
    return OuterState(anchor_N, momentum_N, 3)


STATE = state_of(1)
WANTED = StateQuery(stage_index=1, outer_step=3, state_digest=state_digest(STATE))
PEERS = [
    Peer(hotkey=Hotkey(f"5Peer{name}".ljust(48, "z")), url="http://peer", stage_index=1, state=MemberState.ACTIVE)
    for name in "ABC"
]
A, B, C = (peer.hotkey for peer in PEERS)

Replica = Callable[[StateQuery], Answer]


def honest(query: StateQuery, state: OuterState = STATE) -> Answer:
    if query.part_index is None:
        return StateOutline(parts=state_outline(state)).model_dump_json().encode()
    return part_bytes(state, *state_bounds(NUM_PARAMS)[query.part_index])


def of_another_state(query: StateQuery) -> Answer:
    return honest(query, state_of(2))


def with_wrong_parts(query: StateQuery) -> Answer:
    return honest(query) if query.part_index is None else of_another_state(query)


def cut_short(query: StateQuery) -> Answer:
    answer = honest(query)
    assert isinstance(answer, bytes)
    return answer if query.part_index is None else answer[:-4]


def gone(_: StateQuery) -> Answer:
    return TransportError("nobody is there")


def gone_on(_: StateQuery) -> Answer:
    return refused(RefusalCode.NOT_FOUND, "stands elsewhere")


def nonsense(_: StateQuery) -> Answer:
    return b'{"kind":"state_outline","parts":[]}'


class Replicas:
    """What is asked of each."""

    def __init__(self, *replicas: Replica) -> None:
        self._by_hotkey = dict(zip((peer.hotkey for peer in PEERS), replicas, strict=False))
        self.holders = PEERS[: len(replicas)]
        self.parts_of: Counter[Hotkey] = Counter()
        self.at_once_max = 0

    async def ask_all(self, requests: Sequence[StateRequest]) -> list[Answer]:
        asked = [request.peer.hotkey for request in requests if request.query.part_index is not None]
        self.parts_of.update(asked)
        self.at_once_max = max(self.at_once_max, *Counter(asked).values(), 0)
        return [self._by_hotkey[request.peer.hotkey](request.query) for request in requests]

    async def fetch(self) -> OuterState | None:
        return await fetch_state(self, WANTED, NUM_PARAMS, self.holders)


async def test_parts_come_from_all_replicas_a_few_at_a_time() -> None:
    replicas = Replicas(honest, honest, honest)
    fetched = await replicas.fetch()
    assert fetched is not None and state_digest(fetched) == WANTED.state_digest
    assert set(replicas.parts_of) == {A, B, C}
    assert replicas.parts_of.total() == len(state_bounds(NUM_PARAMS)), "each part is fetched once"
    assert replicas.at_once_max == PARTS_PER_PEER


@pytest.mark.parametrize("bad", [with_wrong_parts, cut_short])
async def test_a_bad_part_is_fetched_elsewhere_and_its_sender_named(bad: Replica) -> None:
    replicas = Replicas(honest, bad, honest)
    with capture_logs() as logs:
        fetched = await replicas.fetch()
    assert fetched is not None and state_digest(fetched) == WANTED.state_digest
    assert replicas.parts_of[B] == PARTS_PER_PEER, "it was asked in one round"
    assert {line["hotkey"] for line in logs if line["event"] == "state_part_refused"} == {B}


@pytest.mark.parametrize("bad", [of_another_state, gone, gone_on, nonsense])
async def test_who_has_no_true_outline_is_asked_for_no_part(bad: Replica) -> None:
    replicas = Replicas(bad, honest)
    with capture_logs() as logs:
        fetched = await replicas.fetch()
    assert fetched is not None and state_digest(fetched) == WANTED.state_digest
    assert set(replicas.parts_of) == {B}
    assert {line["hotkey"] for line in logs if line["event"] == "state_outline_refused"} == {A}


async def test_who_has_not_heard_of_the_newcomer_is_asked_again() -> None:
    num_asked = 0

    def hears_late(query: StateQuery) -> Answer:
        nonlocal num_asked
        num_asked += 1
        return honest(query) if num_asked > 1 else refused(RefusalCode.FORBIDDEN, "a stranger")

    replicas = Replicas(hears_late, honest)
    assert await replicas.fetch() is not None
    assert set(replicas.parts_of) == {A, B}


@pytest.mark.parametrize("replicas", [(), (gone, gone_on), (with_wrong_parts, cut_short)])
async def test_without_anybody_honest_there_is_nothing(replicas: tuple[Replica, ...]) -> None:
    assert await Replicas(*replicas).fetch() is None


async def test_who_goes_on_meanwhile_does_not_leave_half_a_state() -> None:
    answered = 0

    def goes_on(query: StateQuery) -> Answer:
        nonlocal answered
        answered += 1
        return honest(query) if answered <= 6 else gone_on(query)

    assert await Replicas(goes_on).fetch() is None
