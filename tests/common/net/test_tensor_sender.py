"""TensorSender against a peer that is told how to behave: what is reused, what is closed, and what never hangs."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable

import pytest
import torch

from orion.common.errors import TransportError
from orion.common.net import tensor_sender
from orion.common.net.tensor_sender import Address, TensorSender, address_of
from orion.common.protocol.codec import Body, encode

BODY = encode({"x": torch.arange(1_000_000, dtype=torch.int64), "y": torch.ones(3)})
"""8 MB: more than the sockets' buffers hold, so that whoever does not read holds up the sender."""
SMALL = encode({"x": torch.ones(4)})
ANSWER = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok"
BUSY = b"HTTP/1.1 429 Busy\r\nContent-Length: 4\r\n\r\nbusy"

Behaviour = Callable[["Peer", asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


class Peer:
    """Counts its connections and does on each what it is told."""

    def __init__(self) -> None:
        self.address = Address("127.0.0.1", 0)
        self.behave: Behaviour = answers
        self.heads: list[bytes] = []
        self.bodies: list[bytes] = []
        self.num_connections = 0
        self.num_ended = 0
        self.changed = asyncio.Condition()
        self.goes_on = asyncio.Event()

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.num_connections += 1
        try:
            await self.behave(self, reader, writer)
        except (ConnectionError, asyncio.IncompleteReadError):
            pass
        finally:
            writer.close()
            async with self.changed:
                self.num_ended += 1
                self.changed.notify_all()

    async def head(self, reader: asyncio.StreamReader) -> int:
        """Reads a head; the size of the body to come."""
        head = await reader.readuntil(b"\r\n\r\n")
        self.heads.append(head)
        fields = dict(line.split(b": ", 1) for line in head.split(b"\r\n")[1:-2])
        return int(fields[b"Content-Length"])

    async def all_ended(self) -> None:
        """Once every connection so far has ended on this side."""
        async with asyncio.timeout(5), self.changed:
            await self.changed.wait_for(lambda: self.num_ended == self.num_connections)


async def answers(peer: Peer, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    while True:
        peer.bodies.append(await reader.readexactly(await peer.head(reader)))
        writer.write(ANSWER)


async def answers_once(peer: Peer, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    peer.bodies.append(await reader.readexactly(await peer.head(reader)))
    writer.write(ANSWER)


async def never_answers(peer: Peer, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    await peer.head(reader)
    async with peer.changed:
        peer.changed.notify_all()
    await reader.read(-1)


async def reads_nothing_more(peer: Peer, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    await peer.head(reader)
    writer.write(BUSY)
    await peer.goes_on.wait()


async def accepts_without_the_body(peer: Peer, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    await peer.head(reader)
    writer.write(ANSWER)
    await peer.goes_on.wait()


async def dies_in_the_middle(peer: Peer, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    await peer.head(reader)
    await reader.readexactly(100_000)


async def dies_in_its_answer(peer: Peer, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    await reader.readexactly(await peer.head(reader))
    writer.write(ANSWER[:-1])


async def talks_nonsense(peer: Peer, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    await peer.head(reader)
    writer.write(b"220 smtp ready\r\n")
    await reader.read(-1)


@pytest.fixture
async def peer() -> AsyncIterator[Peer]:
    peer = Peer()
    server = await asyncio.start_server(peer.serve, "127.0.0.1", 0)
    async with server:
        peer.address = Address(*server.sockets[0].getsockname())
        yield peer
        server.close()


@pytest.fixture
async def sender(peer: Peer) -> AsyncIterator[TensorSender]:
    sender = TensorSender()
    yield sender
    sender.close()
    await peer.all_ended()


async def post(sender: TensorSender, peer: Peer, body: Body = BODY, timeout_s: float = 5) -> tuple[int, bytes]:
    answer = await sender.post(peer.address, "/take?a=b%20c", {"X-Signed": "yes"}, body, timeout_s=timeout_s)
    return answer.status, answer.body


async def test_bodies_arrive_whole_and_one_connection_is_enough(sender: TensorSender, peer: Peer) -> None:
    for body in (BODY, SMALL, BODY):
        assert await post(sender, peer, body) == (200, b"ok")
    assert peer.bodies == [BODY.tobytes(), SMALL.tobytes(), BODY.tobytes()]
    assert peer.num_connections == 1
    request, *fields = peer.heads[1].split(b"\r\n")
    assert request == b"POST /take?a=b%20c HTTP/1.1"
    host = f"Host: 127.0.0.1:{peer.address.port}".encode()
    assert {host, b"X-Signed: yes", f"Content-Length: {SMALL.size_bytes}".encode()} < set(fields)


async def test_bodies_at_the_same_time_have_connections_of_their_own_that_are_kept(
    sender: TensorSender, peer: Peer
) -> None:
    for _ in range(2):
        assert await asyncio.gather(*(post(sender, peer) for _ in range(4))) == [(200, b"ok")] * 4
    assert peer.bodies == [BODY.tobytes()] * 8
    assert peer.num_connections == 4


async def test_who_finds_no_room_waits(monkeypatch: pytest.MonkeyPatch, peer: Peer) -> None:
    monkeypatch.setattr(tensor_sender, "CONNECTIONS_MAX", 2)
    sender = TensorSender()
    assert await asyncio.gather(*(post(sender, peer, SMALL) for _ in range(6))) == [(200, b"ok")] * 6
    assert peer.num_connections == 2
    sender.close()


async def test_a_connection_that_the_peer_closed_while_it_was_kept_is_not_used(
    sender: TensorSender, peer: Peer
) -> None:
    peer.behave = answers_once
    for number in range(1, 4):
        assert await post(sender, peer) == (200, b"ok")
        await peer.all_ended()
        assert peer.num_connections == number
    assert len(peer.bodies) == 3


async def test_a_connection_that_waited_too_long_is_closed(
    monkeypatch: pytest.MonkeyPatch, sender: TensorSender, peer: Peer
) -> None:
    monkeypatch.setattr(tensor_sender, "KEEPALIVE_S", 0.01)
    await post(sender, peer, SMALL)
    await peer.all_ended()
    monkeypatch.undo()
    await post(sender, peer, SMALL)
    assert peer.num_connections == 2


@pytest.mark.parametrize(
    ("behave", "expected"), [(reads_nothing_more, (429, b"busy")), (accepts_without_the_body, (200, b"ok"))]
)
async def test_an_answer_that_comes_before_the_body_was_sent_is_one_and_ends_the_connection(
    sender: TensorSender, peer: Peer, behave: Behaviour, expected: tuple[int, bytes]
) -> None:
    peer.behave = behave
    for number in (1, 2):
        assert await post(sender, peer) == expected
        assert peer.num_connections == number
    peer.goes_on.set()


@pytest.mark.parametrize("behave", [dies_in_the_middle, dies_in_its_answer, talks_nonsense])
async def test_a_peer_that_breaks_off_is_a_transport_error(sender: TensorSender, peer: Peer, behave: Behaviour) -> None:
    peer.behave = behave
    with pytest.raises(TransportError):
        await post(sender, peer)
    await peer.all_ended()
    assert len(peer.heads) == 1, "nothing is sent twice"


async def test_silence_is_a_transport_error_and_closes_the_connection(sender: TensorSender, peer: Peer) -> None:
    peer.behave = never_answers
    with pytest.raises(TransportError, match=r"within 0\.05 s"):
        await post(sender, peer, timeout_s=0.05)
    await peer.all_ended()


async def test_who_is_cancelled_closes_the_connection(sender: TensorSender, peer: Peer) -> None:
    peer.behave = never_answers
    task = asyncio.create_task(post(sender, peer))
    async with asyncio.timeout(5), peer.changed:
        await peer.changed.wait_for(lambda: bool(peer.heads))
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    await peer.all_ended()


async def test_closing_ends_what_is_under_way(sender: TensorSender, peer: Peer) -> None:
    peer.behave = never_answers
    task = asyncio.create_task(post(sender, peer))
    async with asyncio.timeout(5), peer.changed:
        await peer.changed.wait_for(lambda: bool(peer.heads))
    sender.close()
    with pytest.raises(TransportError, match="closed"):
        await task
    with pytest.raises(TransportError, match="closed"):
        await post(sender, peer)


async def test_nobody_there_is_a_transport_error(sender: TensorSender, unused_tcp_port: int) -> None:
    for host in ("127.0.0.1", "host.invalid", "::1"):
        with pytest.raises(TransportError):
            await sender.post(Address(host, unused_tcp_port), "/", {}, SMALL, timeout_s=5)


async def test_names_and_other_families_are_resolved(sender: TensorSender) -> None:
    peer = Peer()
    for host in ("localhost", "::1"):
        async with await asyncio.start_server(peer.serve, host, 0) as server:
            address = Address(host, server.sockets[0].getsockname()[1])
            answer = await sender.post(address, "/", {}, SMALL, timeout_s=5)
            assert answer.body == b"ok"
            sender.close()
            await peer.all_ended()
            sender = TensorSender()
    sender.close()


def test_addresses() -> None:
    assert address_of("http://1.2.3.4:56") == Address("1.2.3.4", 56)
    assert address_of("http://a.example") == Address("a.example", 80)
    assert address_of("http://[::1]:9") == Address("::1", 9)
    assert Address("::1", 9).authority == "[::1]:9"
    assert address_of("https://a.example") is None


@pytest.mark.parametrize("host", ["a:99999999", "[", "[::1", ":80", "a:b:c", "@", "a..invalid", "x" * 250])
def test_an_address_that_is_none_is_a_transport_error(host: str) -> None:
    with pytest.raises(TransportError):
        address_of(f"http://{host}")
