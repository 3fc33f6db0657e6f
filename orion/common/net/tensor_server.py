"""Tensors on the receiving end: taken in without copies and checked before anybody sees them, and handed out."""

import asyncio
from collections.abc import Mapping

from aiohttp import web
from torch import Tensor

from orion.common.net.aiohttp_server import arrival
from orion.common.net.http import body_chunks
from orion.common.net.tensor_request import TensorRequest
from orion.common.protocol.codec import Body, body_size, check_finite, decode, received_body
from orion.common.protocol.messages import (
    RefusalCode,
    Transfer,
)
from orion.common.protocol.refusals import refused
from orion.common.train.compress import TensorSpec

_CHECK_INLINE_BYTES_MAX = 4 * 1024 * 1024
"""Larger bodies are searched for infinities in a thread: it takes a millisecond for this many bytes."""


async def receive_body(
    request: TensorRequest, transfer: Transfer, expected: Mapping[str, TensorSpec], *, timeout_s: float
) -> tuple[dict[str, Tensor], Body]:
    """A request's body: exactly the expected tensors, all finite, and the same memory as a body to hand on.

    Checks size before it takes memory, then digest, layout (`encode`'s own) and values. `timeout_s` bounds the whole
    arrival. Raises RefusedError; the memory is the caller's alone.
    """
    size_bytes = body_size(expected)
    if transfer.size_bytes != size_bytes or request.content_length != size_bytes:
        announced = max(transfer.size_bytes, request.content_length or 0)
        code = RefusalCode.TOO_LARGE if announced > size_bytes else RefusalCode.BAD_TENSOR
        raise refused(code, f"{announced} bytes are announced, the tensors of this run take {size_bytes}")
    async with arrival(timeout_s):
        buffer = await request.receive(size_bytes, transfer.digest)
    tensors = decode(buffer, expected, size_bytes)
    body = received_body(buffer, expected, transfer.digest)
    if size_bytes > _CHECK_INLINE_BYTES_MAX:
        await asyncio.to_thread(check_finite, tensors)
    else:
        check_finite(tensors)
    return tensors, body


def tensor_answer(body: Body | bytes) -> web.Response:
    """A tensor body as an answer."""
    if isinstance(body, bytes):
        return web.Response(body=body, content_type="application/octet-stream")
    # As a payload, not written by the handler: a receiver that breaks off is then the framework's to notice.
    return web.Response(
        body=body_chunks(body),
        headers={"Content-Type": "application/octet-stream", "Content-Length": str(body.size_bytes)},
    )
