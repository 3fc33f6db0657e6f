"""What a simulated process calls others with: the same methods and errors as the clients of `orion.common.net`.

It owns how a call looks on the simulated network. Every method raises RefusedError or TransportError, as in production,
so that coroutines of production which take such clients run here unchanged. Signatures are not simulated: the network
names the true sender.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

from blake3 import blake3

from orion.common.errors import TransportError
from orion.common.ids import Hotkey
from orion.common.net.state_fetcher import ANSWER_GRACE_S, StateRequest
from orion.common.protocol.codec import Body
from orion.common.protocol.entries import EntriesQuery, LedgerPage
from orion.common.protocol.fields import UPLOADS_MAX
from orion.common.protocol.messages import (
    Accepted,
    Applied,
    CheckpointUploaded,
    Done,
    GrantRequest,
    Grants,
    Join,
    Joined,
    Lease,
    LeaseRequest,
    ManifestQuery,
    Manifests,
    Message,
    ObjectRef,
    Reduced,
    Refusal,
    RefusalCode,
    Report,
    Transfer,
    Uploaded,
    UploadRequest,
)
from orion.common.protocol.records import (
    Boundaries,
    BoundaryQuery,
    CommitmentQuery,
    Commitments,
    Ledger,
    LedgerQuery,
    MergeQuery,
    MergeRecord,
    PathwayQuery,
    Pathways,
    ScoreSheet,
    Verdict,
)
from orion.common.protocol.refusals import RefusedError, refused
from orion.simulator.host import MESSAGE_BYTES, ORCHESTRATOR, STORE, Ask, AskAll, wire_bytes
from orion.simulator.store import GetObject, PutObject, Stored

AnswerT = TypeVar("AnswerT")


@dataclass(frozen=True, slots=True, eq=False)
class TensorSent:
    """A request with a tensor body, from miner to miner. Answered by `Accepted` or a `Refusal`."""

    transfer: Transfer
    body: bytes


def expect(answer: object | None, answer_type: type[AnswerT], what: str) -> AnswerT:
    """The answer, when it is one. Raises RefusedError for a refusal, TransportError when nobody was reached."""
    if answer is None:
        raise TransportError(f"{what}: unreachable")
    if isinstance(answer, Refusal):
        raise RefusedError(answer)
    assert isinstance(answer, answer_type), f"{what} was answered with {answer!r}"
    return answer


class SimulatedOrchestrator:
    """The orchestrator as one process asks it."""

    async def call(self, message: Message, answer_type: type[AnswerT], timeout_s: float | None = None) -> AnswerT:
        """Any message that the orchestrator answers."""
        answer = await Ask(ORCHESTRATOR, message, wire_bytes(message), timeout_s)
        return expect(answer, answer_type, type(message).__name__)

    async def join(self, join: Join) -> Joined:
        return await self.call(join, Joined)

    async def lease(self, request: LeaseRequest) -> Lease:
        return await self.call(request, Lease)

    async def report(self, report: Report) -> Done:
        return await self.call(report, Done)

    async def uploaded(self, uploaded: Uploaded) -> Done:
        return await self.call(uploaded, Done)

    async def reduced(self, reduced: Reduced) -> Done:
        return await self.call(reduced, Done)

    async def applied(self, applied: Applied) -> Done:
        return await self.call(applied, Done)

    async def checkpoint(self, checkpoint: CheckpointUploaded) -> Done:
        return await self.call(checkpoint, Done)

    async def manifests(self, stage_index: int, from_outer_step: int) -> Manifests:
        return await self.call(ManifestQuery(stage_index=stage_index, from_outer_step=from_outer_step), Manifests)

    async def commitments(self, outer_step: int) -> Commitments:
        return await self.call(CommitmentQuery(outer_step=outer_step), Commitments)

    async def ledger(self, from_outer_step: int) -> Ledger:
        return await self.call(LedgerQuery(from_outer_step=from_outer_step), Ledger)

    async def merge(self, stage_index: int, outer_step: int) -> MergeRecord:
        return await self.call(MergeQuery(stage_index=stage_index, outer_step=outer_step), MergeRecord)

    async def entries(self, from_sequence: int) -> LedgerPage:
        return await self.call(EntriesQuery(from_sequence=from_sequence), LedgerPage)

    async def pathways(self, outer_step: int, offset: int) -> Pathways:
        return await self.call(PathwayQuery(outer_step=outer_step, offset=offset), Pathways)

    async def boundaries(self, after: Hotkey | None) -> Boundaries:
        return await self.call(BoundaryQuery(after=after), Boundaries)

    async def verdict(self, verdict: Verdict) -> Done:
        return await self.call(verdict, Done)

    async def scores(self, sheet: ScoreSheet) -> Done:
        return await self.call(sheet, Done)

    async def grants(self, request: GrantRequest) -> Grants:
        return await self.call(request, Grants)

    async def uploads(self, request: UploadRequest) -> Done:
        return await self.call(request, Done)


class SimulatedObjects:
    """The object store as one process sees it; every transfer is granted by the orchestrator first."""

    def __init__(self, orchestrator: SimulatedOrchestrator) -> None:
        self._orchestrator = orchestrator

    async def get(self, ref: ObjectRef) -> bytearray:
        return (await self.get_many([ref]))[0]

    async def get_many(self, refs: Sequence[ObjectRef], wait_s: float = 0.0) -> list[bytearray]:
        """As from a store that cannot tell when objects come: nothing is waited for."""
        if not refs:
            return []
        await self._grant_reading([ref.key for ref in refs])
        answers = await AskAll([Ask(STORE, GetObject(ref.key)) for ref in refs])
        return [_checked(ref, expect(answer, bytes, ref.key)) for ref, answer in zip(refs, answers, strict=True)]

    async def put(self, key: str, body: Body) -> ObjectRef:
        return (await self.put_many({key: body}))[0]

    async def put_many(self, bodies: Mapping[str, Body]) -> list[ObjectRef]:
        if not bodies:
            return []
        refs = [ObjectRef(key=key, digest=body.digest, size_bytes=body.size_bytes) for key, body in bodies.items()]
        await self._grant_writing(refs)
        answers = await AskAll(
            [
                Ask(STORE, PutObject(key, body.tobytes()), MESSAGE_BYTES + body.size_bytes)
                for key, body in bodies.items()
            ]
        )
        for key, answer in zip(bodies, answers, strict=True):
            expect(answer, Stored, key)
        return refs

    async def _grant_reading(self, keys: Sequence[str]) -> None:
        await self._orchestrator.grants(GrantRequest(keys=tuple(keys)))

    async def _grant_writing(self, refs: Sequence[ObjectRef]) -> None:
        for start in range(0, len(refs), UPLOADS_MAX):
            await self._orchestrator.uploads(UploadRequest(objects=tuple(refs[start : start + UPLOADS_MAX])))


class SimulatedRpc:
    """Other miners as one process asks them. URLs are not needed: the receiver's hotkey is its address."""

    def __init__(self, hotkey: Hotkey) -> None:
        self.hotkey = hotkey

    async def call(
        self,
        base_url: str,
        receiver: Hotkey,
        route: str,
        message: Message,
        answer_type: type[AnswerT],
        *,
        timeout_s: float,
    ) -> AnswerT:
        answer = await Ask(receiver, message, wire_bytes(message), timeout_s)
        return expect(answer, answer_type, route)

    async def send_tensor(
        self, base_url: str, receiver: Hotkey, route: str, transfer: Transfer, body: Body, *, timeout_s: float
    ) -> Accepted:
        request = TensorSent(transfer, body.tobytes())
        answer = await Ask(receiver, request, MESSAGE_BYTES + body.size_bytes, timeout_s)
        return expect(answer, Accepted, route)

    async def fetch_tensor(
        self, base_url: str, receiver: Hotkey, route: str, message: Message, *, size_bytes_max: int, timeout_s: float
    ) -> bytes:
        answer = await Ask(receiver, message, MESSAGE_BYTES, timeout_s)
        body = expect(answer, bytes, route)
        if len(body) > size_bytes_max:
            raise refused(RefusalCode.TOO_LARGE, f"{route}: {len(body)} bytes")
        return body


class SimulatedStatePeers:
    """Replicas as one process asks them for their anchor."""

    async def ask_all(self, requests: Sequence[StateRequest]) -> list[bytes | TransportError | RefusedError]:
        asks = [Ask(request.peer.hotkey, request.query, timeout_s=ANSWER_GRACE_S) for request in requests]
        return [_state_answer(request, answer) for request, answer in zip(requests, await AskAll(asks), strict=True)]


def _state_answer(request: StateRequest, answer: object | None) -> bytes | TransportError | RefusedError:
    try:
        body = expect(answer, bytes, "state")
    except (TransportError, RefusedError) as error:
        return error
    if len(body) > request.size_bytes_max:
        return refused(RefusalCode.TOO_LARGE, f"state: {len(body)} bytes")
    return body


def _checked(ref: ObjectRef, body: bytes) -> bytearray:
    if len(body) != ref.size_bytes or blake3(body).hexdigest() != ref.digest:
        raise refused(RefusalCode.DIGEST_MISMATCH, f"{ref.key} is not what its reference says")
    return bytearray(body)
