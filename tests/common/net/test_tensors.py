"""Tensor bodies over loopback: taken whole and checked, or refused, and never half kept."""

import asyncio
import logging
from collections.abc import AsyncIterator
from urllib.parse import urlsplit

import pytest
import torch
from aiohttp import web
from blake3 import blake3
from net_loopback import CLIENT, SERVER
from torch import Tensor

from orion.common.errors import TransportError
from orion.common.ids import DataId, Digest, Direction, MicrobatchId
from orion.common.net import aiohttp_server
from orion.common.net.gate import Gate
from orion.common.net.rpc import RpcClient
from orion.common.net.tensor_request import TensorRequest
from orion.common.net.tensor_server import receive_body, tensor_answer
from orion.common.protocol.codec import Body, decode, encode
from orion.common.protocol.messages import (
    Accepted,
    Cancel,
    RefusalCode,
    Transfer,
)
from orion.common.protocol.refusals import RefusedError, refused
from orion.common.train.compress import TensorSpec

EXPECTED = {"z": TensorSpec(torch.bfloat16, (4, 64, 2048)), "ids": TensorSpec(torch.int32, (4, 65))}
"""1 MiB: several chunks, and more than the sockets' buffers hold at once."""
RECEIVE_TIMEOUT_S = 1.0


def tensors(fill: float = 0.5) -> dict[str, Tensor]:
    z = torch.full((4, 64, 2048), fill, dtype=torch.bfloat16)
    return {"z": z, "ids": torch.arange(260, dtype=torch.int32).reshape(4, 65)}


def transfer_of(body: Body, **changed: object) -> Transfer:
    transfer = Transfer(
        direction=Direction.ACTIVATION,
        microbatch_id=MicrobatchId(1),
        data_id=DataId(2),
        outer_step=0,
        to_stage=1,
        path=(CLIENT,),
        deadline_s=0.0,
        digest=body.digest,
        size_bytes=body.size_bytes,
    )
    return transfer.model_copy(update=changed)


class Receiver:
    """A server that keeps what it took."""

    def __init__(self, gate: Gate) -> None:
        self.gate = gate
        self.taken: list[dict[str, Tensor]] = []
        self.base_url = ""
        self.evidence = encode({})

    async def forward(self, request: TensorRequest) -> Accepted:
        sender, transfer = aiohttp_server.signed_transfer(self.gate, request)
        assert sender == CLIENT
        received, body = await receive_body(request, transfer, EXPECTED, timeout_s=RECEIVE_TIMEOUT_S)
        assert (body.digest, body.tobytes()) == (transfer.digest, encode(received).tobytes())
        self.taken.append(received)
        return Accepted(credits=3, queued=1)

    async def busy(self, request: TensorRequest) -> Accepted:
        aiohttp_server.signed_transfer(self.gate, request)
        raise refused(RefusalCode.BUSY, "no credits", retry_after_s=0.1)

    async def hand_over(self, request: web.Request) -> web.StreamResponse:
        await aiohttp_server.signed_json(request, Cancel)
        return tensor_answer(self.evidence)


@pytest.fixture(params=["direct", "framework"])
async def receiver(request: pytest.FixtureRequest, gate: Gate) -> AsyncIterator[Receiver]:
    """Once as peers meet it, and once with every tensor read by the framework, as it reads unusual requests."""
    receiver = Receiver(gate)
    app = aiohttp_server.build_app(gate)
    aiohttp_server.add_tensor_route(app, "/forward", receiver.forward)
    aiohttp_server.add_tensor_route(app, "/busy", receiver.busy)
    if request.param == "framework":
        app[aiohttp_server.TENSORS].clear()
    app.router.add_post("/evidence", receiver.hand_over)
    async with aiohttp_server.serve(app, "127.0.0.1", 0) as port:
        receiver.base_url = f"http://127.0.0.1:{port}"
        yield receiver


async def send(rpc: RpcClient, receiver: Receiver, body: Body, route: str = "/forward", **changed: object) -> Accepted:
    return await rpc.send_tensor(receiver.base_url, SERVER, route, transfer_of(body, **changed), body, timeout_s=5)


async def refusal_code(rpc: RpcClient, receiver: Receiver, body: Body, **changed: object) -> RefusalCode:
    with pytest.raises(RefusedError) as caught:
        await send(rpc, receiver, body, **changed)
    return caught.value.code


async def test_tensors_arrive_as_they_were(rpc: RpcClient, receiver: Receiver) -> None:
    sent = tensors()
    for _ in range(3):
        assert await send(rpc, receiver, encode(sent)) == Accepted(credits=3, queued=1)
    for taken in receiver.taken:
        assert torch.equal(taken["z"], sent["z"])
        assert torch.equal(taken["ids"], sent["ids"])


async def test_a_path_of_hundreds_of_stages_fits_the_query(rpc: RpcClient, receiver: Receiver) -> None:
    await send(rpc, receiver, encode(tensors()), path=(CLIENT,) * 512)
    assert len(receiver.taken) == 1


async def test_a_body_of_another_size_is_refused_by_its_announcement(rpc: RpcClient, receiver: Receiver) -> None:
    small, large = encode({"z": torch.zeros(2)}), encode({"z": torch.zeros(1_000_000)})
    assert await refusal_code(rpc, receiver, small) is RefusalCode.BAD_TENSOR
    assert await refusal_code(rpc, receiver, large) is RefusalCode.TOO_LARGE
    lying = encode(tensors()).size_bytes
    assert await refusal_code(rpc, receiver, large, size_bytes=lying) is RefusalCode.TOO_LARGE
    assert receiver.taken == []


async def test_a_body_that_is_not_its_digest_is_refused(rpc: RpcClient, receiver: Receiver) -> None:
    other = encode(tensors(0.25))
    assert await refusal_code(rpc, receiver, encode(tensors()), digest=other.digest) is RefusalCode.DIGEST_MISMATCH
    assert receiver.taken == []


async def test_other_tensors_of_the_same_size_are_refused(rpc: RpcClient, receiver: Receiver) -> None:
    body = encode({**tensors(), "z": tensors()["z"].view(torch.int16)})
    assert body.size_bytes == encode(tensors()).size_bytes
    assert await refusal_code(rpc, receiver, body) is RefusalCode.BAD_TENSOR


async def test_the_expected_tensors_in_another_layout_are_refused(rpc: RpcClient, receiver: Receiver) -> None:
    body = encode(tensors())
    assert body.header.endswith(b" ")
    header = body.header[:8] + b"{ " + body.header[9:-1]
    digest = blake3(header + body.tobytes()[len(header) :]).hexdigest()
    other = Body(header, body.parts, body.size_bytes, Digest(digest))
    assert decode(other.tobytes(), EXPECTED, other.size_bytes).keys() == EXPECTED.keys()
    assert await refusal_code(rpc, receiver, other) is RefusalCode.BAD_TENSOR


async def test_infinities_are_refused(rpc: RpcClient, receiver: Receiver) -> None:
    assert await refusal_code(rpc, receiver, encode(tensors(float("nan")))) is RefusalCode.NOT_FINITE
    assert receiver.taken == []


async def test_a_refusal_that_comes_before_the_body_was_read_arrives(rpc: RpcClient, receiver: Receiver) -> None:
    large = encode({"z": torch.zeros(4_000_000)})
    for _ in range(3):
        assert await refusal_code(rpc, receiver, large, route="/busy") is RefusalCode.BUSY
    assert await send(rpc, receiver, encode(tensors())) == Accepted(credits=3, queued=1)


async def test_a_request_without_a_transfer_is_malformed(rpc: RpcClient, receiver: Receiver) -> None:
    with pytest.raises(RefusedError) as caught:
        await rpc.get(receiver.base_url, SERVER, "/forward", Accepted, query={}, timeout_s=5)
    assert caught.value.code is RefusalCode.MALFORMED


async def open_raw(rpc: RpcClient, receiver: Receiver, body: Body) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    """A connection on which the head of a tensor request has been sent, but nothing of its body."""
    query = {"transfer": transfer_of(body).model_dump_json(exclude_defaults=True)}
    target, headers = rpc.signed_head("POST", SERVER, "/forward", query)
    address = urlsplit(receiver.base_url)
    reader, writer = await asyncio.open_connection(address.hostname, address.port)
    lines = [f"POST {target} HTTP/1.1", "Host: test", f"Content-Length: {body.size_bytes}"]
    lines += [f"{name}: {value}" for name, value in headers.items()]
    writer.write("\r\n".join([*lines, "", ""]).encode())
    return reader, writer


async def test_a_sender_that_stalls_is_refused(rpc: RpcClient, receiver: Receiver) -> None:
    body = encode(tensors())
    reader, writer = await open_raw(rpc, receiver, body)
    writer.write(body.tobytes()[:1000])
    status = await reader.readline()
    assert status.startswith(b"HTTP/1.1 400")
    writer.close()
    await writer.wait_closed()
    assert receiver.taken == []


async def test_a_sender_that_breaks_off_leaves_nothing_and_is_no_mistake_of_ours(
    rpc: RpcClient, receiver: Receiver, caplog: pytest.LogCaptureFixture
) -> None:
    body = encode(tensors())
    with caplog.at_level(logging.INFO):
        _, writer = await open_raw(rpc, receiver, body)
        writer.write(body.tobytes()[:1000])
        await writer.drain()
        writer.close()
        await writer.wait_closed()
        await send(rpc, receiver, body)
    assert len(receiver.taken) == 1
    assert caplog.records == []


async def test_evidence_is_fetched_within_a_bound(rpc: RpcClient, receiver: Receiver) -> None:
    receiver.evidence = encode(tensors())
    request = Cancel(microbatch_id=MicrobatchId(1), outer_step=0, reason="")
    size_bytes = receiver.evidence.size_bytes
    raw = await rpc.fetch_tensor(
        receiver.base_url, SERVER, "/evidence", request, size_bytes_max=size_bytes, timeout_s=5
    )
    assert torch.equal(decode(raw, EXPECTED, size_bytes)["z"], tensors()["z"])
    with pytest.raises(RefusedError) as caught:
        await rpc.fetch_tensor(
            receiver.base_url, SERVER, "/evidence", request, size_bytes_max=size_bytes - 1, timeout_s=5
        )
    assert caught.value.code is RefusalCode.TOO_LARGE


async def test_a_receiver_of_evidence_that_breaks_off_is_no_mistake_of_ours(
    rpc: RpcClient, receiver: Receiver, caplog: pytest.LogCaptureFixture
) -> None:
    receiver.evidence = encode({"x": torch.zeros(8_000_000)})
    message = Cancel(microbatch_id=MicrobatchId(1), outer_step=0, reason="")
    with caplog.at_level(logging.INFO):
        for _ in range(2):
            with pytest.raises(RefusedError):
                await rpc.fetch_tensor(receiver.base_url, SERVER, "/evidence", message, size_bytes_max=10, timeout_s=5)
        await send(rpc, receiver, encode(tensors()))
    assert caplog.records == []


async def test_a_receiver_that_dies_is_a_transport_error(rpc: RpcClient) -> None:
    async def die(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read(100_000)
        writer.close()

    body = encode(tensors())
    server = await asyncio.start_server(die, "127.0.0.1", 0)
    async with server:
        base_url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
        with pytest.raises(TransportError):
            await rpc.send_tensor(base_url, SERVER, "/forward", transfer_of(body), body, timeout_s=5)
