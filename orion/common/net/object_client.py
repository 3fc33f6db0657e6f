"""The object store as miners and validators see it: objects by key, whole or in parts, checked as they arrive.

Large objects move in parts, several at a time. What is there already is never sent again: of an upload the store knows
it, of a download this process, and the next one too where a folder is given. Memory: an upload aliases the body, a
download has one buffer of the object's size, or a file.
"""

import asyncio
from collections.abc import AsyncIterator, Coroutine, Iterable, Mapping, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import structlog

from orion.common.clock import Clock, SystemClock
from orion.common.errors import TransportError
from orion.common.net.bandwidth import BandwidthMeter
from orion.common.net.body_slice import BodySlice
from orion.common.net.http import read_into
from orion.common.net.object_download import ObjectDownload
from orion.common.net.orchestrator_client import OrchestratorClient
from orion.common.net.part_layout import PART_BYTES, part_ranges
from orion.common.net.part_plan import Pace, PartPlan
from orion.common.net.part_runner import Move, run_parts
from orion.common.protocol.fields import PART_URLS_MAX, PARTITIONS_MAX, UPLOADS_MAX
from orion.common.protocol.messages import (
    CompleteUpload,
    GrantRequest,
    ObjectRef,
    RefusalCode,
    UploadGrant,
    UploadRequest,
)
from orion.common.protocol.refusals import RefusedError

if TYPE_CHECKING:
    from orion.common.protocol.codec import Body

TRANSFERS_MAX = 4
"""Objects or parts on their way at a time: enough to fill a link with a long round trip, few enough to be fair to
others."""
TRANSFER_TIMEOUT_S = 600.0
"""For one part; a phase's deadline usually comes first."""
_ROUNDS_MAX = 3
"""Times that a transfer which gets nowhere is granted anew: URLs expire, and what was there may have been dropped."""
_REGRANTED = frozenset({RefusalCode.FORBIDDEN, RefusalCode.CONFLICT, RefusalCode.NOT_FOUND})
"""Refusals of a PUT that another look at what the store holds may explain."""

ResultT = TypeVar("ResultT")

_log = structlog.get_logger("orion.objects")


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
        part_bytes: int = PART_BYTES,
        folder: Path | None = None,
        clock: Clock | None = None,
    ) -> None:
        """Objects larger than `part_bytes` are read in parts, through a file in `folder` where one is given; how they
        are written the store says."""
        self._orchestrator = orchestrator
        self._http = orchestrator.rpc.http
        self._transfers_max = transfers_max
        self._transfers = asyncio.Semaphore(transfers_max)
        self._timeout_s = timeout_s
        self._part_bytes = part_bytes
        self._folder = folder
        self._clock = clock if clock is not None else SystemClock()
        self._in_folder: set[str] = set()
        self._upload_pace, self._download_pace = Pace(), Pace()
        self.upload_meter, self.download_meter = BandwidthMeter(), BandwidthMeter()
        self.num_hedged = 0
        """Parts that were tried a second time because they were slow."""

    # --- writing

    async def put(self, key: str, body: "Body") -> ObjectRef:
        """Writes an object; durable on return."""
        return (await self.put_many({key: body}))[0]

    async def put_many(self, bodies: "Mapping[str, Body]") -> list[ObjectRef]:
        """Writes objects; all are durable on return. With an error, some may be, and parts of others: repeating it goes
        on from there."""
        refs = [ObjectRef(key=key, digest=body.digest, size_bytes=body.size_bytes) for key, body in bodies.items()]
        for start in range(0, len(refs), UPLOADS_MAX):
            asked = refs[start : start + UPLOADS_MAX]
            grants = await self._upload_grants(asked)
            await _all(self._put(ref, bodies[ref.key], grant) for ref, grant in zip(asked, grants, strict=True))
        return refs

    async def _put(self, ref: ObjectRef, body: "Body", grant: UploadGrant) -> None:
        """Sends what is missing, and looks again, until nothing is."""
        rounds = 0
        sent: set[int] = set()
        while not grant.is_durable:
            num_sent = len(sent)
            try:
                await self._send_parts(ref, body, grant, sent)
                if not grant.in_parts:
                    return
                if len(grant.parts) < PART_URLS_MAX:
                    await self._orchestrator.complete(CompleteUpload(object=ref))
                    return
            except RefusedError as error:
                rounds = 1 if len(sent) > num_sent else rounds + 1
                if error.code not in _REGRANTED or rounds >= _ROUNDS_MAX:
                    raise
            (grant,) = await self._upload_grants([ref])

    async def _send_parts(self, ref: ObjectRef, body: "Body", grant: UploadGrant, sent: set[int]) -> None:
        """Sends what the grant names; `sent` gets the indices of what has arrived."""
        ranges = _ranges(ref, grant.part_bytes)
        urls = {part.index: self._absolute(part.url) for part in grant.parts}
        if urls and max(urls) >= len(ranges):
            raise TransportError(f"was granted part {max(urls)} of {ref.key}, which has {len(ranges)}")
        headers = dict(grant.headers)

        async def move(index: int) -> None:
            part = BodySlice(body, ranges[index])
            async with (
                self._measured(self.upload_meter, part.size_bytes),
                self._http.open("PUT", urls[index], headers=headers, data=part, timeout_s=self._timeout_s),
            ):
                sent.add(index)

        plan = PartPlan({index: len(ranges[index]) for index in urls}, self._upload_pace, self._transfers_max)
        await self._run(plan, move)

    async def _upload_grants(self, refs: Sequence[ObjectRef]) -> Sequence[UploadGrant]:
        grants = (await self._orchestrator.uploads(UploadRequest(objects=tuple(refs)))).grants
        if len(grants) != len(refs):
            raise TransportError(f"asked for {len(refs)} grants, got {len(grants)}")
        return grants

    # --- reading

    async def get(self, ref: ObjectRef) -> bytearray:
        """An object's bytes, which are what `ref` says."""
        return (await self.get_many([ref]))[0]

    async def get_many(self, refs: Sequence[ObjectRef], wait_s: float = 0.0) -> list[bytearray]:
        """The bytes of objects, in the same order. All are held in memory at the same time. Where the store can tell
        when they come, they are waited for so long."""
        bodies: list[bytearray] = []
        for start in range(0, len(refs), PARTITIONS_MAX):
            asked = refs[start : start + PARTITIONS_MAX]
            urls = await self._read_grants(asked, wait_s)
            bodies += await _all(self._get(url, ref) for url, ref in zip(urls, asked, strict=True))
        return bodies

    async def _get(self, url: str, ref: ObjectRef) -> bytearray:
        folder = self._folder if ref.digest not in self._in_folder else None
        self._in_folder.add(ref.digest)
        try:
            try:
                download = await asyncio.to_thread(ObjectDownload, ref, self._part_bytes, folder)
            except OSError as error:
                _log.warning("download_folder_not_used", folder=str(folder), error=str(error))
                download = ObjectDownload(ref, self._part_bytes, None)
            try:
                await self._fetch(url, download)
                return await asyncio.to_thread(download.take)
            finally:
                download.close()
        finally:
            if folder is not None:
                self._in_folder.discard(ref.digest)

    async def _fetch(self, url: str, download: ObjectDownload) -> None:
        """Fetches what is missing, with a new URL when the old one has expired."""
        rounds = 0
        while len(download.present) < len(download.ranges):
            num_present = len(download.present)
            try:
                await self._fetch_parts(url, download)
            except RefusedError as error:
                rounds = 1 if len(download.present) > num_present else rounds + 1
                if error.code is not RefusalCode.FORBIDDEN or rounds >= _ROUNDS_MAX:
                    raise
                (url,) = await self._read_grants([download.ref])

    async def _fetch_parts(self, url: str, download: ObjectDownload) -> None:
        ranges, in_parts = download.ranges, download.in_parts

        async def move(index: int) -> None:
            part = ranges[index]
            headers = {"Range": f"bytes={part.start}-{part.stop - 1}"} if in_parts else {}
            async with (
                self._measured(self.download_meter, len(part)),
                self._http.open(
                    "GET", url, headers=headers, timeout_s=self._timeout_s, status=206 if in_parts else 200
                ) as answer,
            ):
                download.check_announced(index, answer.content_length, answer.headers.get("Content-Range"))
                with download.open()[part.start : part.stop] as piece:
                    await read_into(answer.content, piece)
            download.note(index)

        missing = {index: len(part) for index, part in enumerate(ranges) if index not in download.present}
        await self._run(PartPlan(missing, self._download_pace, self._transfers_max), move)

    async def _read_grants(self, refs: Sequence[ObjectRef], wait_s: float = 0.0) -> list[str]:
        urls = (await self._orchestrator.grants(GrantRequest(keys=tuple(ref.key for ref in refs)), wait_s)).urls
        if len(urls) != len(refs):
            raise TransportError(f"asked for {len(refs)} grants, got {len(urls)}")
        return [self._absolute(url) for url in urls]

    # --- both

    async def _run(self, plan: PartPlan, move: Move) -> None:
        try:
            await run_parts(plan, move, self._clock, self._transfers)
        finally:
            self.num_hedged += plan.num_hedged

    @asynccontextmanager
    async def _measured(self, meter: BandwidthMeter, size_bytes: int) -> AsyncIterator[None]:
        meter.began(self._clock.monotonic_s())
        try:
            yield
            meter.moved(size_bytes, self._clock.monotonic_s())
        finally:
            meter.ended(self._clock.monotonic_s())

    def _absolute(self, url: str) -> str:
        return self._orchestrator.base_url + url if url.startswith("/") else url


def _ranges(ref: ObjectRef, part_bytes: int) -> list[range]:
    """Raises TransportError for a size that the store cannot mean."""
    if part_bytes <= 0 < ref.size_bytes:
        raise TransportError(f"was granted parts of {part_bytes} bytes")
    try:
        return part_ranges(ref.size_bytes, max(part_bytes, 1))
    except ValueError as error:
        raise TransportError(f"was granted what cannot be: {error}") from error


async def _all(work: Iterable[Coroutine[Any, Any, ResultT]]) -> list[ResultT]:
    """All results in order; when one fails, the others are stopped and its error is raised as it is."""
    tasks = [asyncio.create_task(coroutine) for coroutine in work]
    try:
        return list(await asyncio.gather(*tasks))
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
