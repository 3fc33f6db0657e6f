"""PeerServer on a real socket: signed requests from real keys, answered by a real core."""

import asyncio
import math
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from random import Random

import aiohttp
import pytest
import torch
from blake3 import blake3
from miner_kit import STATE_DIGEST, World, make_spec

from orion.common.clock import SystemClock
from orion.common.errors import TransportError
from orion.common.ids import PROTOCOL_VERSION, DataId, Direction, Hotkey, MemberState, MicrobatchId, Operation, Phase
from orion.common.net.aiohttp_server import serve
from orion.common.net.gate import Gate
from orion.common.net.rpc import RpcClient
from orion.common.net.state_fetcher import RpcStatePeers, fetch_state
from orion.common.protocol import routes
from orion.common.protocol.codec import Body, activation_spec, encode
from orion.common.protocol.messages import (
    Accepted,
    Cancel,
    Done,
    Joined,
    Peer,
    Refusal,
    RefusalCode,
    StateQuery,
    Transfer,
)
from orion.common.protocol.records import (
    CommittedLog,
    EvidenceRequest,
    LogRequest,
)
from orion.common.protocol.refusals import RefusedError
from orion.common.protocol.signing import Keypair, NonceSource, Verifier, keypair_from_uri, sign_request
from orion.common.protocol.signing import hotkey_of as hotkey_of_key
from orion.common.train.anchor import initial_anchor
from orion.common.train.outer import OuterState, state_digest
from orion.miner.boundary_monitor import BoundaryMonitor
from orion.miner.cache import Slot, TensorCache
from orion.miner.core import MinerCore
from orion.miner.desk import Desk
from orion.miner.effects import Accept, Compute, Effect, FreeTensors, PersistLog, ReadBody, Refuse
from orion.miner.events import (
    AnchorLoaded,
    BodyRef,
    ComputeEnded,
    Event,
    FeedArrived,
    ForwardDone,
    JoinEnded,
    LogPersisted,
    Ticked,
)
from orion.miner.memory_archive import MemoryArchive, MemoryDisk
from orion.miner.peer_server import PeerServer
from orion.miner.state_parts import StateParts

SPEC = make_spec(3)
SENDER, RECEIVER, STRANGER, FELLOW = (
    keypair_from_uri(f"//miner/{name}") for name in ("sender", "receiver", "stranger", "fellow")
)
"""The fellow is a replica of the receiver's stage."""

NONCES = NonceSource()


class Running:
    """A miner of stage 1 without a device: its core, and who may ask it."""

    def __init__(self) -> None:
        self.hotkey = hotkey_of_key(RECEIVER)
        self.clock = SystemClock()
        self.core = MinerCore(SPEC, self.hotkey, Random(1))
        self.desk = Desk()
        self.cache = TensorCache(SPEC.flow.in_flight_max)
        self.evidence = MemoryArchive(MemoryDisk(), 1 << 20)
        self.monitor = BoundaryMonitor(1)
        self.world = World(SPEC, self.hotkey, 1)
        self.world.everybody[0] = hotkey_of_key(SENDER)
        self.world.everybody[2] = self.hotkey
        self.world.everybody[3] = hotkey_of_key(FELLOW)
        self.outer_state: OuterState | None = initial_anchor(SPEC, 1)
        self.effects: list[Effect] = []
        self.url = ""
        self.server: PeerServer
        self.changed = asyncio.Event()
        self.take(JoinEnded(Joined(stage_index=1, state=MemberState.ACTIVE)))
        self.take(FeedArrived(self.world.feed()))
        self.take(AnchorLoaded(1, 0, STATE_DIGEST))

    def take(self, event: Event) -> list[Effect]:
        effects = self.core.handle(event, self.clock.now_s())
        self.core.check_invariants()
        for effect in effects:
            if isinstance(effect, ReadBody | Accept | Refuse):
                self.desk.answer(effect)
            if isinstance(effect, FreeTensors):
                self.cache.free(effect.microbatch_id)
            if isinstance(effect, PersistLog):
                self.persist(effect)
        self.effects += effects
        self.changed.set()
        return effects

    def persist(self, effect: PersistLog) -> None:
        """Makes it durable at once."""
        self.take(LogPersisted(self.evidence.persist(effect.stage_index, effect.entries, effect.commitment)))

    async def pump(self) -> None:
        while True:
            event = await self.desk.next_event(1.0)
            self.take(event or Ticked())

    async def until_free(self) -> None:
        """Waits until nothing is held any more."""
        async with asyncio.timeout(5.0):
            while self.num_held:
                self.changed.clear()
                await self.changed.wait()

    def of_kind(self, kind: type) -> list[Effect]:
        return [effect for effect in self.effects if isinstance(effect, kind)]

    @property
    def num_held(self) -> int:
        return self.core.heartbeat(0, 0).in_flight


@asynccontextmanager
async def running_miner() -> AsyncIterator[Running]:
    miner = Running()
    gate = Gate(Verifier(miner.hotkey), SPEC.digest, miner.clock)
    server = PeerServer(
        SPEC,
        gate,
        core=miner.core,
        desk=miner.desk,
        cache=miner.cache,
        archive=miner.evidence,
        monitor=miner.monitor,
        parts=StateParts(miner),
    )
    miner.server = server
    pumping = asyncio.create_task(miner.pump())
    try:
        async with serve(server.app, "127.0.0.1", 0) as port:
            miner.url = f"http://127.0.0.1:{port}"
            yield miner
    finally:
        pumping.cancel()
        await asyncio.gather(pumping, return_exceptions=True)


@pytest.fixture
async def miner() -> AsyncIterator[Running]:
    async with running_miner() as running:
        yield running


def activation(fill: float = 0.5) -> Body:
    expected = activation_spec(SPEC, 1)
    z = torch.full(expected["z"].shape, fill, dtype=expected["z"].dtype)
    return encode({"z": z, "ids": torch.zeros(expected["ids"].shape, dtype=torch.int32)})


def transfer_of(body: Body, number: int = 1, **fields: object) -> Transfer:
    base: dict[str, object] = {
        "direction": Direction.ACTIVATION,
        "microbatch_id": MicrobatchId(number),
        "data_id": DataId(number),
        "outer_step": 0,
        "to_stage": 1,
        "path": (hotkey_of_key(SENDER),),
        "deadline_s": SystemClock().now_s() + 30.0,
        "digest": body.digest,
        "size_bytes": body.size_bytes,
    }
    return Transfer.model_validate(base | fields)


async def send(
    miner: Running,
    body: Body,
    transfer: Transfer,
    *,
    key: Keypair = SENDER,
    receiver: Hotkey | None = None,
    route: str = routes.FORWARD,
) -> Accepted:
    async with RpcClient(key, SPEC.digest) as rpc:
        return await rpc.send_tensor(miner.url, receiver or miner.hotkey, route, transfer, body, timeout_s=5.0)


async def refused_code(miner: Running, body: Body, transfer: Transfer, **fields: object) -> RefusalCode:
    with pytest.raises(RefusedError) as caught:
        await send(miner, body, transfer, **fields)  # type: ignore[arg-type]  # keyword arguments of `send`
    return caught.value.code


async def test_a_good_activation_is_accepted_and_lies_in_the_cache(miner: Running) -> None:
    body = activation()

    accepted = await send(miner, body, transfer_of(body))

    assert accepted.credits == SPEC.flow.in_flight_max - 1
    parcel = miner.cache.get(MicrobatchId(1), Slot.ACTIVATION_IN)
    assert parcel is not None and parcel.body.digest == body.digest
    assert len(miner.of_kind(Compute)) == 1


async def test_a_duplicate_is_accepted_again_and_changes_nothing(miner: Running) -> None:
    body = activation()
    transfer = transfer_of(body)

    first, second = await send(miner, body, transfer), await send(miner, body, transfer)

    assert first.credits == second.credits
    assert miner.num_held == 1


async def test_a_body_that_is_not_what_its_digest_says_frees_its_credit(miner: Running) -> None:
    announced = transfer_of(activation(0.5))

    assert await refused_code(miner, activation(0.25), announced) is RefusalCode.DIGEST_MISMATCH
    assert miner.num_held == 0
    assert miner.cache.num_microbatches == 0
    assert await send(miner, activation(0.5), transfer_of(activation(0.5), number=2))


async def test_an_oversized_body_is_refused_before_it_is_read(miner: Running) -> None:
    large = encode({"z": torch.zeros(1 << 16), "ids": torch.zeros(4, dtype=torch.int32)})

    assert await refused_code(miner, large, transfer_of(large)) is RefusalCode.TOO_LARGE
    assert miner.num_held == 0


async def test_what_is_not_finite_is_refused(miner: Running) -> None:
    body = activation(float("nan"))

    assert await refused_code(miner, body, transfer_of(body)) is RefusalCode.NOT_FINITE
    assert miner.num_held == 0


async def test_what_came_in_and_what_was_unfit_is_counted_against_its_sender_once(miner: Running) -> None:
    body, bad = activation(0.25), activation(float("nan"))
    for _ in range(2):  # the second is a duplicate
        await send(miner, body, transfer_of(body))
    await refused_code(miner, bad, transfer_of(bad, number=2))

    report = miner.monitor.due_report(0, Phase.UPLOAD)

    assert report is not None
    (seen,) = report.peers
    assert (seen.peer, seen.direction) == (hotkey_of_key(SENDER), Direction.ACTIVATION)
    assert (seen.num_tensors, seen.num_refused) == (1, 1)
    assert seen.log_rms == pytest.approx(math.log(0.25), abs=1e-4)


async def test_other_tensors_of_the_right_size_are_refused(miner: Running) -> None:
    good = activation()
    shape = activation_spec(SPEC, 1)["z"].shape
    swapped = encode({"z": torch.zeros(shape[::-1]), "ids": torch.zeros((2, 9), dtype=torch.int32)})
    assert swapped.size_bytes == good.size_bytes

    assert await refused_code(miner, swapped, transfer_of(swapped)) is RefusalCode.BAD_TENSOR


async def test_the_same_tensors_in_other_words_are_refused(miner: Running) -> None:
    """Their evidence, written in our words, would not match the log."""
    body = activation()
    header = body.header.replace(b'"dtype":"F32","shape"', b'"shape"', 1)
    assert header != body.header, "the header names dtype before shape"
    start = header.index(b'"shape"')
    end = header.index(b"}", start)
    header = header[:end] + b',"dtype":"F32"' + header[end:]
    assert len(header) == len(body.header)
    reworded = Body(header, body.parts, body.size_bytes, body.digest)
    digest = blake3(reworded.tobytes()).hexdigest()

    assert await refused_code(miner, reworded, transfer_of(reworded, digest=digest)) is RefusalCode.BAD_TENSOR


@pytest.mark.parametrize(
    ("fields", "code"),
    [
        ({"key": STRANGER}, RefusalCode.FORBIDDEN),
        ({"receiver": hotkey_of_key(STRANGER)}, RefusalCode.BAD_SIGNATURE),
        ({"route": routes.BACKWARD}, RefusalCode.MALFORMED),
    ],
)
async def test_wrong_senders_receivers_and_routes(miner: Running, fields: dict[str, object], code: RefusalCode) -> None:
    body = activation()

    assert await refused_code(miner, body, transfer_of(body), **fields) is code
    assert miner.num_held == 0


async def test_without_a_credit_the_answer_is_busy_with_a_hint(miner: Running) -> None:
    body = activation()
    for number in range(SPEC.flow.in_flight_max):
        await send(miner, body, transfer_of(body, number))

    with pytest.raises(RefusedError) as caught:
        await send(miner, body, transfer_of(body, 99))

    assert caught.value.code is RefusalCode.BUSY
    assert caught.value.retry_after_s is not None


async def test_a_sender_that_breaks_off_frees_its_credit(miner: Running) -> None:
    body = activation()
    transfer = transfer_of(body)

    async with RpcClient(SENDER, SPEC.digest) as rpc:
        rpc_body = Body(body.header, body.parts[:1], body.size_bytes, body.digest)
        with pytest.raises((TransportError, RefusedError)):
            await rpc.send_tensor(miner.url, miner.hotkey, routes.FORWARD, transfer, rpc_body, timeout_s=0.5)
    await miner.until_free()

    assert miner.of_kind(FreeTensors) == [FreeTensors(MicrobatchId(1))]


async def test_a_cancel_frees(miner: Running) -> None:
    body = activation()
    await send(miner, body, transfer_of(body))
    cancel = Cancel(microbatch_id=MicrobatchId(1), outer_step=0, reason="test")
    miner.take(ComputeEnded(ForwardDone(MicrobatchId(1), BodyRef(body.digest, body.size_bytes), None)))

    async with RpcClient(SENDER, SPEC.digest) as rpc:
        await rpc.call(miner.url, miner.hotkey, routes.CANCEL, cancel, Done, timeout_s=5.0)
    await miner.until_free()

    assert miner.cache.num_microbatches == 0


async def test_logs_and_evidence_are_handed_out_once_committed(miner: Running) -> None:
    body = activation()
    await send(miner, body, transfer_of(body))
    miner.evidence.begin(0)
    miner.evidence.add(0, Operation.FORWARD, MicrobatchId(1), came_in=body)
    miner.take(ComputeEnded(ForwardDone(MicrobatchId(1), BodyRef(body.digest, body.size_bytes), None)))
    question = LogRequest(outer_step=0, sizes=(1,), start=0, stop=1)
    wanted = EvidenceRequest(outer_step=0, microbatch_id=MicrobatchId(1), operation=Operation.FORWARD, side="input")

    async with RpcClient(STRANGER, SPEC.digest) as rpc:

        async def ask() -> tuple[CommittedLog, bytes]:
            log = await rpc.call(miner.url, miner.hotkey, routes.LOG, question, CommittedLog, timeout_s=5.0)
            evidence = await rpc.fetch_tensor(
                miner.url, miner.hotkey, routes.EVIDENCE, wanted, size_bytes_max=body.size_bytes, timeout_s=5.0
            )
            return log, evidence

        with pytest.raises(RefusedError) as caught:
            await ask()
        assert caught.value.code is RefusalCode.FORBIDDEN, "it is no validator"
        assert caught.value.retry_after_s is not None, "it may become one"
        miner.world.validators = (hotkey_of_key(STRANGER),)
        miner.take(FeedArrived(miner.world.feed()))
        with pytest.raises(RefusedError) as caught:
            await ask()
        assert caught.value.code is RefusalCode.NOT_FOUND, "nothing was committed to yet"
        miner.world.set_phase(Phase.UPLOAD, 0)
        miner.take(FeedArrived(miner.world.feed()))
        log, evidence = await ask()

    assert log.entries[0].input_digest == body.digest
    assert log.entries == miner.core.committed_log(0)
    assert log.proof == ()
    assert evidence == body.tobytes()


POLICY = {
    "unsigned": (401, RefusalCode.BAD_SIGNATURE),
    "wrong signature": (401, RefusalCode.BAD_SIGNATURE),
    "other run": (409, RefusalCode.RUN_MISMATCH),
    "other protocol": (409, RefusalCode.PROTOCOL_MISMATCH),
}


@pytest.mark.parametrize("case", POLICY)
async def test_every_signed_route_refuses_alike(miner: Running, case: str) -> None:
    asked = [route.resource for route in miner.server.app.router.routes() if route.method == "POST"]
    assert len(asked) >= 5
    async with aiohttp.ClientSession() as session:
        for resource in asked:
            assert resource is not None
            protocol = 99 if case == "other protocol" else PROTOCOL_VERSION
            run = "ab" * 32 if case == "other run" else SPEC.digest
            target = f"{resource.canonical}?protocol={protocol}&run={run}"
            nonce_ns = NONCES.next_ns(miner.clock.now_s())
            headers = sign_request(SENDER, "POST", target, b"", miner.hotkey, nonce_ns=nonce_ns)
            if case == "wrong signature":
                headers["X-Bittensor-Signature"] = "0x" + "ab" * 64
            async with session.post(
                miner.url + target, data=b"", headers=None if case == "unsigned" else headers
            ) as answer:
                refusal = Refusal.model_validate_json(await answer.read())
            assert (target, answer.status, refusal.code) == (target, *POLICY[case])
            if case == "other run":
                assert run in refusal.message and SPEC.digest in refusal.message
            if case == "other protocol":
                assert "99" in refusal.message and str(PROTOCOL_VERSION) in refusal.message


async def test_a_stranger_cancels_nothing(miner: Running) -> None:
    body = activation()
    await send(miner, body, transfer_of(body))
    cancel = Cancel(microbatch_id=MicrobatchId(1), outer_step=0, reason="test")

    async with RpcClient(STRANGER, SPEC.digest) as rpc:
        with pytest.raises(RefusedError) as caught:
            await rpc.call(miner.url, miner.hotkey, routes.CANCEL, cancel, Done, timeout_s=5.0)

    assert caught.value.code is RefusalCode.FORBIDDEN
    assert miner.num_held == 1


async def fetched_by(keypair: Keypair, miner: Running, wanted: StateQuery) -> OuterState | None:
    peer = Peer(hotkey=miner.hotkey, url=miner.url, stage_index=1, state=MemberState.ACTIVE)
    async with RpcClient(keypair, SPEC.digest) as rpc:
        return await fetch_state(RpcStatePeers(rpc, 1e6), wanted, SPEC.stage_sizes[1], [peer])


async def test_a_replica_of_the_stage_reads_the_anchor_and_nobody_else_does(miner: Running) -> None:
    assert miner.outer_state is not None
    wanted = StateQuery(stage_index=1, outer_step=0, state_digest=state_digest(miner.outer_state))
    fetched = await fetched_by(FELLOW, miner, wanted)
    assert fetched is not None and state_digest(fetched) == wanted.state_digest
    for keypair in (SENDER, STRANGER):
        assert await fetched_by(keypair, miner, wanted) is None
    for other in ({"outer_step": 1}, {"state_digest": STATE_DIGEST}, {"stage_index": 2}):
        assert await fetched_by(FELLOW, miner, wanted.model_copy(update=other)) is None
    async with RpcClient(FELLOW, SPEC.digest) as rpc:
        with pytest.raises(RefusedError) as caught:
            beyond = wanted.model_copy(update={"part_index": 16_000})
            await rpc.fetch_tensor(miner.url, miner.hotkey, routes.STATE, beyond, size_bytes_max=100, timeout_s=5.0)
    assert caught.value.code is RefusalCode.NOT_FOUND


async def test_health_needs_no_signature(miner: Running) -> None:
    async with aiohttp.ClientSession() as session, session.get(miner.url + routes.HEALTH) as answer:
        assert (await answer.json())["stage_index"] == 1
