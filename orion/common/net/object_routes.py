"""`PUT` and `GET /v1/objects/{key}` for a Starlette or FastAPI application: the store behind signed URLs."""

import asyncio
from collections.abc import AsyncIterator

from starlette.requests import Request
from starlette.responses import Response, StreamingResponse

from orion.common.clock import Clock
from orion.common.net.starlette_server import json_answer
from orion.common.net.store import ObjectStore, UrlSigner
from orion.common.protocol import routes
from orion.common.protocol.messages import (
    Done,
    RefusalCode,
)
from orion.common.protocol.refusals import refused

OBJECT_ROUTE = routes.OBJECTS + "/{key:path}"
SILENCE_S_MAX = 30.0
"""An upload of which nothing arrives for this long is given up."""


class ObjectRoutes:
    """The two handlers; whoever holds a URL that `signer` made may use them."""

    def __init__(self, store: ObjectStore, signer: UrlSigner, clock: Clock) -> None:
        self._store = store
        self._signer = signer
        self._clock = clock

    async def put(self, request: Request) -> Response:
        """Takes an object in; durable when answered. Raises RefusedError."""
        key: str = request.path_params["key"]
        size_bytes_max = self._signer.verify("PUT", key, request.query_params, self._clock.now_s())
        await self._store.put(key, _arriving(request), size_bytes_max)
        return json_answer(Done())

    async def get(self, request: Request) -> Response:
        """Hands an object out. Raises RefusedError."""
        key: str = request.path_params["key"]
        self._signer.verify("GET", key, request.query_params, self._clock.now_s())
        stored = await self._store.stat(key)
        if stored is None:
            raise refused(RefusalCode.NOT_FOUND, f"no object {key}")
        headers = {"Content-Length": str(stored.size_bytes)}
        return StreamingResponse(self._store.get(key), headers=headers, media_type="application/octet-stream")


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
