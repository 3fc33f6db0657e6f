"""The orchestrator as its callers see it: one method per route of docs/PROTOCOL.md section 2.

Every method raises RefusedError or TransportError. None retries: whoever calls knows whether the question still
matters.
"""

import asyncio
from pathlib import Path
from urllib.parse import quote

from orion.common.config import RunSpec
from orion.common.ids import Digest, Hotkey
from orion.common.net.http import HttpClient
from orion.common.net.partial_file import PartialFile
from orion.common.net.rpc import MessageT, RpcClient, parse_answer
from orion.common.protocol import routes
from orion.common.protocol.entries import EntriesQuery, LedgerPage
from orion.common.protocol.messages import (
    Applied,
    CheckpointUploaded,
    CompleteUpload,
    Done,
    Feed,
    GrantRequest,
    Grants,
    Heartbeat,
    Join,
    Joined,
    Lease,
    LeaseRequest,
    Leave,
    ManifestQuery,
    Manifests,
    Message,
    Reduced,
    Report,
    RunInfo,
    Uploaded,
    UploadGrants,
    UploadRequest,
)
from orion.common.protocol.pay import MinerPay
from orion.common.protocol.records import (
    Boundaries,
    BoundaryQuery,
    CommitmentQuery,
    Commitments,
    Ledger,
    LedgerQuery,
    Losses,
    LossQuery,
    MergeQuery,
    MergeRecord,
    PathwayQuery,
    Pathways,
    RunStatus,
    ScoreSheet,
    Verdict,
)

REQUEST_TIMEOUT_S = 20.0
"""For the orchestrator to answer; it decides in memory, so this covers a slow link and a loaded machine."""

COMPLETE_TIMEOUT_S = 300.0
"""For an object of some gigabytes to be put together, and perhaps to be read once."""


class OrchestratorClient:
    """Talks to one run's orchestrator in the name of the client's hotkey."""

    def __init__(
        self, rpc: RpcClient, base_url: str, orchestrator: Hotkey, *, timeout_s: float = REQUEST_TIMEOUT_S
    ) -> None:
        """`base_url` without a trailing slash, e.g. `http://127.0.0.1:8700`."""
        self.rpc = rpc
        self.base_url = base_url
        self.orchestrator = orchestrator
        self._timeout_s = timeout_s

    # --- what anyone may ask

    @staticmethod
    async def run_spec(http: HttpClient, base_url: str, timeout_s: float = REQUEST_TIMEOUT_S) -> tuple[RunSpec, Hotkey]:
        """The run's specification and the orchestrator's hotkey; needed before there can be a client.

        Raises ConfigError too, when this version of the code does not know that specification.
        """
        info = parse_answer(RunInfo, await http.read("GET", base_url + routes.RUN, timeout_s=timeout_s), routes.RUN)
        return RunSpec.parse(dict(info.spec), f"{base_url}{routes.RUN}"), info.orchestrator

    @staticmethod
    async def status(http: HttpClient, base_url: str, timeout_s: float = REQUEST_TIMEOUT_S) -> RunStatus:
        """What the run is doing; public."""
        body = await http.read("GET", base_url + routes.STATUS, timeout_s=timeout_s)
        return parse_answer(RunStatus, body, routes.STATUS)

    @staticmethod
    async def losses(http: HttpClient, base_url: str, offset: int, timeout_s: float = REQUEST_TIMEOUT_S) -> Losses:
        """Losses in order of arrival, from the given one on, a batch at a time; public."""
        body = LossQuery(offset=offset).model_dump_json().encode()
        answer = await http.read("POST", base_url + routes.LOSSES, data=body, timeout_s=timeout_s)
        return parse_answer(Losses, answer, routes.LOSSES)

    @staticmethod
    async def read_entries(
        http: HttpClient, base_url: str, from_sequence: int, timeout_s: float = REQUEST_TIMEOUT_S
    ) -> LedgerPage:
        """A page of the public ledger; public."""
        body = EntriesQuery(from_sequence=from_sequence).model_dump_json().encode()
        answer = await http.read("POST", base_url + routes.ENTRIES, data=body, timeout_s=timeout_s)
        return parse_answer(LedgerPage, answer, routes.ENTRIES)

    @staticmethod
    async def miner(http: HttpClient, base_url: str, hotkey: Hotkey, timeout_s: float = REQUEST_TIMEOUT_S) -> MinerPay:
        """A miner's whole pay; public."""
        answer = await http.read("GET", f"{base_url}{routes.MINERS}/{quote(hotkey)}", timeout_s=timeout_s)
        return parse_answer(MinerPay, answer, routes.MINERS)

    # --- membership

    async def join(self, join: Join) -> Joined:
        """Takes part; asking again gives the same assignment."""
        return await self._call(routes.JOIN, join, Joined)

    async def heartbeat(self, heartbeat: Heartbeat) -> Done:
        """Renews the membership. Refused with NOT_MEMBER when it has lapsed: join again."""
        return await self._call(routes.HEARTBEAT, heartbeat, Done)

    async def leave(self, reason: str) -> Done:
        """Goes on purpose."""
        return await self._call(routes.LEAVE, Leave(reason=reason), Done)

    async def feed(self, since: int, wait_s: float) -> Feed:
        """The state once its version is above `since`, or as it is after `wait_s` (at most FEED_WAIT_S_MAX)."""
        query = {"since": str(since), "wait_s": f"{min(wait_s, routes.FEED_WAIT_S_MAX):g}"}
        return await self.rpc.get(
            self.base_url, self.orchestrator, routes.FEED, Feed, query=query, timeout_s=wait_s + self._timeout_s
        )

    # --- work

    async def lease(self, request: LeaseRequest) -> Lease:
        """Rights to start microbatches. Refused with NO_WORK when there are none."""
        return await self._call(routes.LEASE, request, Lease)

    async def report(self, report: Report) -> Done:
        """Hands in a batch of records."""
        return await self._call(routes.REPORT, report, Done)

    # --- the outer step

    async def uploaded(self, uploaded: Uploaded) -> Done:
        return await self._call(routes.UPLOADED, uploaded, Done)

    async def reduced(self, reduced: Reduced) -> Done:
        return await self._call(routes.REDUCED, reduced, Done)

    async def applied(self, applied: Applied) -> Done:
        return await self._call(routes.APPLIED, applied, Done)

    async def checkpoint(self, checkpoint: CheckpointUploaded) -> Done:
        return await self._call(routes.CHECKPOINT, checkpoint, Done)

    async def manifests(self, stage_index: int, from_outer_step: int) -> Manifests:
        """A stage's manifests from one outer step on, in order, as far as they exist (a batch at a time)."""
        query = ManifestQuery(stage_index=stage_index, from_outer_step=from_outer_step)
        return await self._call(routes.MANIFESTS, query, Manifests)

    # --- validation

    async def commitments(self, outer_step: int) -> Commitments:
        return await self._call(routes.COMMITMENTS, CommitmentQuery(outer_step=outer_step), Commitments)

    async def pathways(self, outer_step: int, offset: int) -> Pathways:
        """Path and loss of an outer step's applied trips from the given one on, a batch at a time."""
        return await self._call(routes.PATHWAYS, PathwayQuery(outer_step=outer_step, offset=offset), Pathways)

    async def boundaries(self, after: Hotkey | None) -> Boundaries:
        """What miners last reported of their neighbours, from behind the given hotkey on, a page at a time."""
        return await self._call(routes.BOUNDARIES, BoundaryQuery(after=after), Boundaries)

    async def ledger(self, from_outer_step: int) -> Ledger:
        return await self._call(routes.LEDGER, LedgerQuery(from_outer_step=from_outer_step), Ledger)

    async def merge(self, stage_index: int, outer_step: int) -> MergeRecord:
        """How a stage's outer step was merged. Refused with BUSY while that is open."""
        query = MergeQuery(stage_index=stage_index, outer_step=outer_step)
        return await self._call(routes.MERGES, query, MergeRecord)

    async def entries(self, from_sequence: int) -> LedgerPage:
        """A page of the public ledger."""
        return await self.read_entries(self.rpc.http, self.base_url, from_sequence, self._timeout_s)

    async def verdict(self, verdict: Verdict) -> Done:
        return await self._call(routes.VERDICT, verdict, Done)

    async def scores(self, sheet: ScoreSheet) -> Done:
        """Publishes this validator's scores."""
        return await self._call(routes.SCORES, sheet, Done)

    # --- objects and files

    async def grants(self, request: GrantRequest, wait_s: float = 0.0) -> Grants:
        """Signed URLs; those that are relative begin with a slash and belong behind `base_url`. Answered once the
        objects are there, or after `wait_s` (at most GRANT_WAIT_S_MAX), by a store that knows when they come."""
        wait_s = min(wait_s, routes.GRANT_WAIT_S_MAX)
        query = {"wait_s": f"{wait_s:g}"} if wait_s > 0 else None
        return await self.rpc.call(
            self.base_url,
            self.orchestrator,
            routes.GRANTS,
            request,
            Grants,
            query=query,
            timeout_s=wait_s + self._timeout_s,
        )

    async def uploads(self, request: UploadRequest) -> UploadGrants:
        """What is missing of objects, and URLs for it, of the same two kinds."""
        return await self._call(routes.UPLOADS, request, UploadGrants)

    async def complete(self, request: CompleteUpload) -> Done:
        """Has an object made of the parts that were sent."""
        return await self.rpc.call(
            self.base_url, self.orchestrator, routes.COMPLETE, request, Done, timeout_s=COMPLETE_TIMEOUT_S
        )

    async def fetch_data_file(self, name: str, destination: Path, *, size_bytes_max: int, timeout_s: float) -> Digest:
        """Downloads one of the prepared data's files and returns its digest.

        The file appears under its name only when it is whole; an existing one is replaced. Also raises OSError.
        """
        target, headers = self.rpc.signed_head("GET", self.orchestrator, f"{routes.DATA}/{quote(name)}", {})
        partial = PartialFile(destination.with_name(destination.name + ".partial"))
        try:
            async with self.rpc.http.open(
                "GET", self.base_url + target, headers=headers, timeout_s=timeout_s
            ) as answer:
                await partial.fill(answer.content.iter_any(), size_bytes_max)
            await asyncio.to_thread(partial.path.replace, destination)
        finally:
            await partial.discard()
        return partial.digest

    async def _call(self, route: str, message: Message, answer_type: type[MessageT]) -> MessageT:
        return await self.rpc.call(
            self.base_url, self.orchestrator, route, message, answer_type, timeout_s=self._timeout_s
        )
