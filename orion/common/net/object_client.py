"""The object store as miners and validators see it: objects by key, checked while they arrive."""

import asyncio
from collections.abc import Coroutine, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, TypeVar

from orion.common.errors import TransportError
from orion.common.net.http import read_exact
from orion.common.net.orchestrator_client import OrchestratorClient
from orion.common.protocol.fields import PARTITIONS_MAX
from orion.common.protocol.messages import (
    GrantRequest,
    ObjectRef,
)

if TYPE_CHECKING:
    from orion.common.protocol.codec import Body

TRANSFERS_MAX = 4
"""Objects on their way at a time: enough to fill a link with a long round trip, few enough to be fair to others."""
TRANSFER_TIMEOUT_S = 600.0
"""For one object; a phase's deadline usually comes first."""

ResultT = TypeVar("ResultT")


class ObjectClient:
    """Reads and writes objects through URLs that the orchestrator grants.

    Every method raises RefusedError (NOT_FOUND, DIGEST_MISMATCH, CONFLICT, …) or TransportError, and may be repeated.
    """

    def __init__(
        self,
        orchestrator: OrchestratorClient,
        *,
        transfers_max: int = TRANSFERS_MAX,
        timeout_s: float = TRANSFER_TIMEOUT_S,
    ) -> None:
        self._orchestrator = orchestrator
        self._http = orchestrator.rpc.http
        self._transfers = asyncio.Semaphore(transfers_max)
        self._timeout_s = timeout_s

    async def put(self, key: str, body: "Body") -> ObjectRef:
        """Writes an object; durable on return."""
        return (await self.put_many({key: body}))[0]

    async def put_many(self, bodies: "Mapping[str, Body]") -> list[ObjectRef]:
        """Writes objects, granted by one request; all are durable on return. With an error, some may be."""
        if not bodies:
            return []
        urls = await self._urls("PUT", list(bodies), max(body.size_bytes for body in bodies.values()))
        return await _all(self._put(url, key, body) for url, (key, body) in zip(urls, bodies.items(), strict=True))

    async def get(self, ref: ObjectRef) -> bytearray:
        """An object's bytes, which are what `ref` says."""
        return (await self.get_many([ref]))[0]

    async def get_many(self, refs: Sequence[ObjectRef]) -> list[bytearray]:
        """The bytes of objects, in the same order, granted by one request. All are held in memory at the same time."""
        if not refs:
            return []
        urls = await self._urls("GET", [ref.key for ref in refs], 0)
        return await _all(self._get(url, ref) for url, ref in zip(urls, refs, strict=True))

    async def _put(self, url: str, key: str, body: "Body") -> ObjectRef:
        async with self._transfers, self._http.open("PUT", url, data=body, timeout_s=self._timeout_s):
            return ObjectRef(key=key, digest=body.digest, size_bytes=body.size_bytes)

    async def _get(self, url: str, ref: ObjectRef) -> bytearray:
        async with self._transfers, self._http.open("GET", url, timeout_s=self._timeout_s) as answer:
            return await read_exact(answer, ref.size_bytes, ref.digest)

    async def _urls(self, method: Literal["GET", "PUT"], keys: list[str], size_bytes_max: int) -> list[str]:
        urls: list[str] = []
        for start in range(0, len(keys), PARTITIONS_MAX):
            asked = tuple(keys[start : start + PARTITIONS_MAX])
            request = GrantRequest(method=method, keys=asked, size_bytes_max=size_bytes_max)
            granted = (await self._orchestrator.grants(request)).urls
            if len(granted) != len(asked):
                raise TransportError(f"asked for {len(asked)} grants, got {len(granted)}")
            urls += granted
        return [self._orchestrator.base_url + url if url.startswith("/") else url for url in urls]


async def _all(work: Iterable[Coroutine[Any, Any, ResultT]]) -> list[ResultT]:
    """All results in order; when one fails, the others are stopped and its error is raised as it is."""
    tasks = [asyncio.create_task(coroutine) for coroutine in work]
    try:
        return list(await asyncio.gather(*tasks))
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
