"""Objects over HTTP for a Starlette or FastAPI application: who asks is told where to read and write, and the objects
of a directory are served behind signed URLs.

`GrantRoutes` works with any store; `ObjectRoutes` are for the one that this process serves itself.
"""

import asyncio
import math
import re
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from typing import TypeVar

import structlog
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse

from orion.common.clock import Clock
from orion.common.errors import TransportError
from orion.common.ids import Hotkey
from orion.common.net.directory_store import DirectoryStore
from orion.common.net.starlette_server import json_answer, signed_json
from orion.common.net.store import ObjectStore
from orion.common.net.url_signer import UrlSigner
from orion.common.protocol import routes
from orion.common.protocol.messages import (
    CompleteUpload,
    Done,
    GrantRequest,
    Grants,
    RefusalCode,
    UploadGrants,
    UploadRequest,
)
from orion.common.protocol.refusals import refused

OBJECT_ROUTE = routes.OBJECTS + "/{key:path}"
SILENCE_S_MAX = 30.0
"""An upload of which nothing arrives for this long is given up."""
_RETRY_S = 2.0
_RANGE = re.compile(r"bytes=([0-9]{1,15})-([0-9]{1,15})")
"""The one form that our clients use; any other may be answered with the whole object."""

Question = GrantRequest | UploadRequest | CompleteUpload
ResultT = TypeVar("ResultT")

_log = structlog.get_logger("orion.objects")


class GrantRoutes:
    """`POST /v1/grants`, `/v1/uploads` and `/v1/complete`."""

    def __init__(
        self, store: ObjectStore, clock: Clock, grant_s: float, check: Callable[[Hotkey, Question], None]
    ) -> None:
        """URLs must be used within `grant_s`. `check` raises RefusedError where a hotkey may not do what it asks."""
        self._store = store
        self._clock = clock
        self._grant_s = grant_s
        self._check = check

    async def grants(self, request: Request) -> Response:
        """URLs to read objects, once they are there or the time that the asker would wait is over. Raises
        RefusedError."""
        hotkey, asked = await signed_json(request, GrantRequest)
        self._check(hotkey, asked)
        if (wait_s := _wait_s(request)) > 0:
            await self._store.wait_until_there(asked.keys, wait_s)
        expires_s = self._clock.now_s() + self._grant_s
        urls = await _of_the_store(self._store.grant_read(key, expires_s) for key in asked.keys)
        return json_answer(Grants(urls=tuple(urls), expires_s=expires_s))

    async def uploads(self, request: Request) -> Response:
        """What is missing of objects, and URLs to write it. Raises RefusedError."""
        hotkey, asked = await signed_json(request, UploadRequest)
        self._check(hotkey, asked)
        expires_s = self._clock.now_s() + self._grant_s
        granted = await _of_the_store(self._store.grant_write(ref, expires_s) for ref in asked.objects)
        return json_answer(UploadGrants(grants=tuple(granted), expires_s=expires_s))

    async def complete(self, request: Request) -> Response:
        """Makes an object of its parts. Raises RefusedError."""
        hotkey, asked = await signed_json(request, CompleteUpload)
        self._check(hotkey, asked)
        await _of_the_store([self._store.complete(asked.object)])
        return json_answer(Done())


class ObjectRoutes:
    """`PUT` and `GET /v1/objects/{key}`; whoever holds a URL that `signer` made may use them."""

    def __init__(self, store: DirectoryStore, signer: UrlSigner, clock: Clock) -> None:
        self._store = store
        self._signer = signer
        self._clock = clock

    async def put(self, request: Request) -> Response:
        """Takes an object or a part in; durable when answered. Raises RefusedError."""
        key: str = request.path_params["key"]
        size_bytes = self._signer.verify("PUT", key, request.query_params, self._clock.now_s())
        if part := request.query_params.get("part"):
            await self._store.put_part(key, part, _arriving(request), size_bytes)
        else:
            await self._store.put(key, _arriving(request), size_bytes)
        return json_answer(Done())

    async def get(self, request: Request) -> Response:
        """Hands an object or a range of it out. Raises RefusedError."""
        key: str = request.path_params["key"]
        self._signer.verify("GET", key, request.query_params, self._clock.now_s())
        stored = await self._store.stat(key)
        if stored is None:
            raise refused(RefusalCode.NOT_FOUND, f"no object {key}")
        start, end, status = 0, stored.size_bytes, 200
        headers = {"Accept-Ranges": "bytes"}
        if asked := _RANGE.fullmatch(request.headers.get("range", "")):
            start, end, status = int(asked[1]), min(int(asked[2]) + 1, stored.size_bytes), 206
            if start >= end:
                raise refused(RefusalCode.BAD_TENSOR, f"{key} has no such bytes, but {stored.size_bytes}")
            headers["Content-Range"] = f"bytes {start}-{end - 1}/{stored.size_bytes}"
        headers["Content-Length"] = str(end - start)
        body = self._store.get(key, start, end - start)
        return StreamingResponse(body, status, headers=headers, media_type="application/octet-stream")


def _wait_s(request: Request) -> float:
    """How long the asker would wait for the objects."""
    try:
        wait_s = float(request.query_params.get("wait_s", "0"))
    except ValueError as error:
        raise refused(RefusalCode.MALFORMED, "wait_s is no number") from error
    return min(wait_s, routes.GRANT_WAIT_S_MAX) if math.isfinite(wait_s) else 0.0


async def _of_the_store(asking: Iterable[Awaitable[ResultT]]) -> list[ResultT]:
    """What the store says, all together. Raises RefusedError BUSY when it cannot be reached."""
    try:
        return await asyncio.gather(*asking)
    except TransportError as error:
        _log.warning("store_not_reached", error=str(error))
        raise refused(RefusalCode.BUSY, "the object store cannot be reached", _RETRY_S) from error


async def _arriving(request: Request) -> AsyncIterator[bytes]:
    stream = request.stream()
    while True:
        try:
            async with asyncio.timeout(SILENCE_S_MAX):
                part = await anext(stream)
        except StopAsyncIteration:
            return
        except TimeoutError as error:
            raise refused(RefusalCode.MALFORMED, f"nothing arrived for {SILENCE_S_MAX:g} s") from error
        yield part
