"""Fetches a stage's anchor and momentum from the replicas that hold it, part by part, from several at a time.

Owns who is asked for which part and what is believed: an outline (the digests of all parts) only if it adds up to the
digest that the stage's replicas agreed on, and a part only if it has its digest in the outline. So a replica that lies,
hangs or has gone on costs the time of its answer; it is named in the log and not asked again. Whoever gets a state here
gets the whole of it, bit for bit.

Letters in names: N flat parameters of a stage.
"""

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import structlog
import torch
from blake3 import blake3
from pydantic import ValidationError

from orion.common.errors import TransportError
from orion.common.ids import Digest
from orion.common.net.rpc import RpcClient
from orion.common.protocol import routes
from orion.common.protocol.fields import STATE_PARTS_MAX
from orion.common.protocol.messages import Peer, StateOutline, StateQuery
from orion.common.protocol.refusals import RefusedError
from orion.common.train.outer import OuterState, outline_digest, state_bounds

PEERS_MAX = 4
"""Replicas that are asked: more would not be faster than one's own link, and they all train meanwhile."""
PARTS_PER_PEER = 2
"""Asked of one replica at a time: while one travels the next is read."""
OUTLINE_ATTEMPTS = 3
BYTES_PER_PARAM = 8
"""fp32 anchor and fp32 momentum."""
_OUTLINE_BYTES_MAX = 80 * STATE_PARTS_MAX
ANSWER_GRACE_S = 5.0
"""What an answer may take beyond moving its bytes."""

_log = structlog.get_logger("orion.anchor")

Answer = bytes | TransportError | RefusedError


@dataclass(frozen=True, slots=True)
class StateRequest:
    """What is asked of one replica."""

    peer: Peer
    query: StateQuery
    size_bytes_max: int
    """Of the answer."""


class StatePeers(Protocol):
    """How replicas are asked."""

    async def ask_all(self, requests: Sequence[StateRequest]) -> list[Answer]:
        """All at once; answers and errors in the same order. Raises nothing."""
        ...


class RpcStatePeers:
    """Replicas over HTTP."""

    def __init__(self, rpc: RpcClient, bandwidth_floor_bytes_per_s: float) -> None:
        self._rpc = rpc
        self._bytes_per_s = bandwidth_floor_bytes_per_s

    async def ask_all(self, requests: Sequence[StateRequest]) -> list[Answer]:
        return list(await asyncio.gather(*map(self._ask, requests)))

    async def _ask(self, request: StateRequest) -> Answer:
        timeout_s = ANSWER_GRACE_S + PARTS_PER_PEER * request.size_bytes_max / self._bytes_per_s
        try:
            return await self._rpc.fetch_tensor(
                request.peer.url,
                request.peer.hotkey,
                routes.STATE,
                request.query,
                size_bytes_max=request.size_bytes_max,
                timeout_s=timeout_s,
            )
        except (TransportError, RefusedError) as error:
            return error


class PartPlan:
    """Which parts are missing, and who may be asked for what. Pure."""

    def __init__(self, wanted: StateQuery, num_params: int, holders: Sequence[Peer]) -> None:
        self.bounds = state_bounds(num_params)
        self.missing = list(range(len(self.bounds)))
        self.peers: list[Peer] = []
        """Whose outline is true: they are asked for parts."""
        self._wanted = wanted
        self._num_params = num_params
        self._unheard = dict.fromkeys(holders[:PEERS_MAX], OUTLINE_ATTEMPTS)
        """Whose outline has not come, and how often it is still asked for."""
        self._digests: tuple[Digest, ...] = ()

    def next_round(self) -> list[tuple[Peer, int | None]]:
        """Whom to ask now, for the outline (None) or a part, parts spread evenly; empty when nothing is missing or
        nobody is left."""
        if not self.missing:
            return []
        wanted = self.missing[: PARTS_PER_PEER * len(self.peers)]
        outlines: list[tuple[Peer, int | None]] = [(peer, None) for peer in self._unheard]
        return outlines + [(self.peers[place % len(self.peers)], index) for place, index in enumerate(wanted)]

    def took_outline(self, peer: Peer, answer: Answer) -> bool:
        """Whether the answer is the outline. Who refuses may not have heard of the newcomer yet, and is asked again."""
        digests = _true_outline(answer, self._wanted, self._num_params)
        self._unheard[peer] -= 1
        if digests is None and isinstance(answer, RefusedError) and self._unheard[peer] > 0:
            return False
        del self._unheard[peer]
        if digests is None:
            return False
        self._digests = digests
        self.peers.append(peer)
        return True

    def took_part(self, peer: Peer, part_index: int, answer: Answer) -> bool:
        """Whether the answer is that part. If it is not, its sender is asked no more."""
        if isinstance(answer, bytes) and blake3(answer).hexdigest() == self._digests[part_index]:
            self.missing.remove(part_index)
            return True
        if peer in self.peers:
            self.peers.remove(peer)
        return False


async def fetch_state(
    peers: StatePeers, wanted: StateQuery, num_params: int, holders: Sequence[Peer]
) -> OuterState | None:
    """The state that `wanted` names, of so many parameters, in host memory; None when the holders together cannot or
    will not give the whole of it."""
    plan = PartPlan(wanted, num_params, holders)
    anchor_N, momentum_N = torch.empty(num_params), torch.empty(num_params)
    while requests := plan.next_round():
        answers = await peers.ask_all([_request(plan, wanted, peer, index) for peer, index in requests])
        for (peer, index), answer in zip(requests, answers, strict=True):
            if index is None:
                if not plan.took_outline(peer, answer):
                    _log.warning("state_outline_refused", hotkey=peer.hotkey, reason=_reason(answer))
            elif not plan.took_part(peer, index, answer):
                _log.warning("state_part_refused", hotkey=peer.hotkey, part=index, reason=_reason(answer))
            else:
                start, end = plan.bounds[index]
                both_N = torch.frombuffer(bytearray(answer), dtype=torch.float32)  # type: ignore[arg-type]
                anchor_N[start:end], momentum_N[start:end] = both_N[: end - start], both_N[end - start :]
    if plan.missing:
        _log.warning("state_not_fetched", missing=len(plan.missing), outer_step=wanted.outer_step)
        return None
    _log.info("state_fetched", parts=len(plan.bounds), replicas=len(plan.peers), outer_step=wanted.outer_step)
    return OuterState(anchor_N, momentum_N, wanted.outer_step)


def _request(plan: PartPlan, wanted: StateQuery, peer: Peer, part_index: int | None) -> StateRequest:
    if part_index is None:
        return StateRequest(peer, wanted, _OUTLINE_BYTES_MAX)
    start, end = plan.bounds[part_index]
    query = wanted.model_copy(update={"part_index": part_index})
    return StateRequest(peer, query, BYTES_PER_PARAM * (end - start))


def _true_outline(answer: Answer, wanted: StateQuery, num_params: int) -> tuple[Digest, ...] | None:
    if not isinstance(answer, bytes):
        return None
    try:
        parts = StateOutline.model_validate_json(answer).parts
    except ValidationError:
        return None
    has_all = len(parts) == len(state_bounds(num_params))
    is_true = outline_digest(wanted.outer_step, num_params, parts) == wanted.state_digest
    return parts if has_all and is_true else None


def _reason(answer: Answer) -> str:
    return "it is not what was agreed on" if isinstance(answer, bytes) else str(answer)
