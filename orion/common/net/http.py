"""Plain HTTP as a client: persistent connections, bounded answers, and only two kinds of error.

Knows nothing of signatures or messages. Whatever goes wrong is a `RefusedError` (the other side said no, 4xx) or a
`TransportError` (everything else: nothing is known about what the other side did).
"""

from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

import aiohttp
from blake3 import blake3
from yarl import URL

from orion.common.errors import TransportError
from orion.common.ids import Digest
from orion.common.protocol.messages import RefusalCode
from orion.common.protocol.refusals import RefusedError, refusal_from_answer, refused

if TYPE_CHECKING:
    from orion.common.net.body_slice import BodySlice
    from orion.common.protocol.codec import Body

KEEPALIVE_S = 15.0
"""A client drops a connection that was idle for this long. Servers must keep theirs longer, or a request could be sent
into a connection that is being closed."""
SERVER_KEEPALIVE_S = 75.0

MESSAGE_BYTES_MAX = 64 * 1024 * 1024
"""Largest JSON answer that is read: a ledger of some hundred thousand records."""
_REFUSAL_BYTES_MAX = 64 * 1024
_CONNECTIONS_MAX = 512
_CONNECTIONS_PER_HOST_MAX = 64
_READ_BUFFER_BYTES = 1 << 20
"""What may lie received and unread per connection before the sender is slowed down."""


class HttpClient:
    """A pool of connections. Make it inside a running event loop; close it in the end (or use `async with`)."""

    def __init__(self) -> None:
        connector = aiohttp.TCPConnector(
            limit=_CONNECTIONS_MAX, limit_per_host=_CONNECTIONS_PER_HOST_MAX, keepalive_timeout=KEEPALIVE_S
        )
        self._session = aiohttp.ClientSession(
            connector=connector,
            auto_decompress=False,  # a small answer must not unfold into a large one
            read_bufsize=_READ_BUFFER_BYTES,
            skip_auto_headers=("Accept-Encoding", "User-Agent"),
        )

    async def __aenter__(self) -> "HttpClient":
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def close(self) -> None:
        """Closes every connection; what is still under way fails with TransportError."""
        await self._session.close()

    @asynccontextmanager
    async def open(
        self,
        method: str,
        url: str,
        *,
        timeout_s: float,
        headers: Mapping[str, str] | None = None,
        data: "bytes | Body | BodySlice | None" = None,
        status: int = 200,
    ) -> AsyncIterator[aiohttp.ClientResponse]:
        """Sends a request and gives the answer once its head is there, if it has this status; reading it is the
        caller's.

        `url` is sent exactly as given. `timeout_s` covers everything until the block is left, and errors inside the
        block are translated too. Raises RefusedError for a 4xx, TransportError otherwise.
        """
        target = parse_url(url)
        try:
            async with self._session.request(
                method,
                target,
                data=_payload(data),
                headers=_with_length(headers, data),
                allow_redirects=False,
                timeout=aiohttp.ClientTimeout(total=timeout_s),
            ) as response:
                if response.status != status:
                    error = await _error_of(response, method, url)
                    if not isinstance(data, bytes | None):
                        # Leaving the block would first send the rest of the body, which nobody wants any more.
                        response.close()
                    raise error
                yield response
        except TimeoutError as error:
            raise TransportError(f"{method} {_short(url)}: no answer within {timeout_s:g} s") from error
        except (aiohttp.ClientError, OSError) as error:
            raise TransportError(f"{method} {_short(url)}: {type(error).__name__}: {error}") from error

    async def read(
        self,
        method: str,
        url: str,
        *,
        timeout_s: float,
        data: bytes | None = None,
        size_bytes_max: int = MESSAGE_BYTES_MAX,
    ) -> bytes:
        """The whole answer to an unsigned request (`data` is JSON), bounded. Raises as `open`."""
        headers = None if data is None else {"Content-Type": "application/json"}
        async with self.open(method, url, headers=headers, data=data, timeout_s=timeout_s) as response:
            return await read_bounded(response, size_bytes_max)


async def read_bounded(response: aiohttp.ClientResponse, size_bytes_max: int) -> bytes:
    """An answer of unknown size. Raises RefusedError TOO_LARGE as soon as it exceeds the bound."""
    if (response.content_length or 0) > size_bytes_max:
        raise refused(RefusalCode.TOO_LARGE, f"answer of {response.content_length} bytes exceeds {size_bytes_max}")
    parts: list[bytes] = []
    size_bytes = 0
    async for part in response.content.iter_any():
        size_bytes += len(part)
        if size_bytes > size_bytes_max:
            raise refused(RefusalCode.TOO_LARGE, f"answer exceeds {size_bytes_max} bytes")
        parts.append(part)
    return b"".join(parts)


async def receive_exact(content: aiohttp.StreamReader, size_bytes: int, digest: Digest) -> bytearray:
    """Reads a stream into one buffer of its known size and checks the digest on the way. Raises RefusedError TOO_LARGE,
    BAD_TENSOR (short) or DIGEST_MISMATCH."""
    buffer = bytearray(size_bytes)
    view = memoryview(buffer)
    hasher = blake3()
    position = 0
    async for part in content.iter_any():
        end = position + len(part)
        if end > size_bytes:
            raise refused(RefusalCode.TOO_LARGE, f"body exceeds the {size_bytes} bytes that were announced")
        view[position:end] = part
        hasher.update(part)
        position = end
    if position != size_bytes:
        raise refused(RefusalCode.BAD_TENSOR, f"body ended after {position} of {size_bytes} bytes")
    if hasher.hexdigest() != digest:
        raise refused(RefusalCode.DIGEST_MISMATCH, "body is not what its digest says")
    return buffer


async def read_into(content: aiohttp.StreamReader, view: memoryview) -> None:
    """Fills a buffer with a stream that must have that very size. Errors as `receive_exact`."""
    position = 0
    async for part in content.iter_any():
        end = position + len(part)
        if end > len(view):
            raise refused(RefusalCode.TOO_LARGE, f"body exceeds the {len(view)} bytes that were announced")
        view[position:end] = part
        position = end
    if position != len(view):
        raise refused(RefusalCode.BAD_TENSOR, f"body ended after {position} of {len(view)} bytes")


async def _error_of(response: aiohttp.ClientResponse, method: str, url: str) -> RefusedError | TransportError:
    if 400 <= response.status < 500:
        return RefusedError(refusal_from_answer(response.status, await read_bounded(response, _REFUSAL_BYTES_MAX)))
    return TransportError(f"{method} {_short(url)}: answered {response.status}")


def parse_url(url: str) -> URL:
    """Peers say where they are, so what is no address must not be our mistake. Raises TransportError."""
    try:
        target = URL(url, encoded=True)
        (target.host or "").encode("idna")
    except ValueError as error:
        raise TransportError(f"{_short(url)} is no address: {error}") from error
    return target


def _payload(data: "bytes | Body | BodySlice | None") -> bytes | AsyncIterator[bytes | memoryview] | None:
    return data if data is None or isinstance(data, bytes) else body_chunks(data)


async def body_chunks(body: "Body | BodySlice") -> AsyncIterator[bytes | memoryview]:
    """A body in pieces that suit a socket."""
    for chunk in body.chunks():
        yield chunk


def _with_length(headers: Mapping[str, str] | None, data: "bytes | Body | BodySlice | None") -> dict[str, str]:
    """Announces a streamed body's size: the receiver decides by it, and chunked encoding would cost CPU."""
    complete = dict(headers or {})
    if data is not None and not isinstance(data, bytes):
        complete["Content-Length"] = str(data.size_bytes)
    return complete


def _short(url: str) -> str:
    """Without the query, which may be long and hold a signature."""
    return url.partition("?")[0]
