"""How browsers get the page's data: the whole of it when they ask, or section by section as it changes.

Owns when the page is made anew (at most once a second, and only while somebody looks), who listens, and how long a slow
listener is waited for. Invariants: listeners are bounded; each gets the newest of every section and no backlog, so one
that reads slowly misses what was between and holds nothing up; one that does not read at all is cut off.
"""

import asyncio
import contextlib
from collections.abc import Callable, Hashable, Iterator
from functools import partial

from starlette.types import Receive, Scope, Send

from orion.common.clock import Clock
from orion.common.protocol.messages import RefusalCode
from orion.common.protocol.refusals import refused
from orion.orchestrator.dashboard import trust, view
from orion.orchestrator.dashboard.page import Head, Ranked
from orion.orchestrator.dashboard.watch import RunWatch
from orion.orchestrator.state import RunState

LISTENERS_MAX = 64
"""Browsers that are told of changes at a time; further ones ask by themselves."""
REFRESH_S = 1.0
SEND_S_MAX = 20.0
"""A listener that takes no byte for so long is cut off."""
BEAT_S = 10.0
"""A sign of life at least this often, also when nothing changes."""
_RANK_COST_SHARE = 0.02
"""Of the time at most goes into the ranking, which costs a walk over the ledger's window."""
_RANK_EVERY_S = 5.0
_RETRY_MS = 3_000
_RETRY_LISTENING_S = 30.0

SECTIONS = ("head", "map", "curves", "timeline", "trust", "log")
"""In the order in which they are sent: what the eye looks for first."""


class LivePage:
    """The page's sections as JSON, each with a revision that grows when it changes."""

    def __init__(self, watch: RunWatch, clock: Clock, *, refresh_s: float = REFRESH_S) -> None:
        self._watch = watch
        self._clock = clock
        self._refresh_s = refresh_s
        self._made_s: float | None = None
        self._sections: dict[str, bytes] = dict.fromkeys(SECTIONS, b"null")
        self._revisions: dict[str, int] = dict.fromkeys(SECTIONS, 0)
        self._ranking: tuple[Ranked, ...] = ()
        self._rank_due_s = 0.0
        self._num_listeners = 0
        self._woken = asyncio.Event()
        self.is_closed = False

    @property
    def num_listeners(self) -> int:
        return self._num_listeners

    def close(self) -> None:
        """No more is told; listeners end."""
        self.is_closed = True
        self._woken.set()

    def whole(self) -> bytes:
        """All sections as one JSON object; a second old at most."""
        self._refresh()
        sections = b",".join(b'"%s":%s' % (name.encode(), self._sections[name]) for name in SECTIONS)
        return b'{"now_s":%.2f,%s}' % (self._clock.now_s(), sections)

    def changes(self, seen: dict[str, int]) -> bytes:
        """The sections that are newer than `seen`, which is brought up to date, as server-sent events."""
        self._refresh()
        events = [b"event: now\ndata: %.2f\n\n" % self._clock.now_s()]
        for name in SECTIONS:
            if seen.get(name) != self._revisions[name]:
                seen[name] = self._revisions[name]
                events.append(b"event: %s\ndata: %s\n\n" % (name.encode(), self._sections[name]))
        return b"".join(events)

    def has_news(self, seen: dict[str, int]) -> bool:
        """Whether some section is newer than that."""
        self._refresh()
        return seen != self._revisions

    def head(self) -> Head:
        """The run's figures now."""
        return self._watch.core.look(partial(view.head, watch=self._watch))

    @property
    def num_notices(self) -> int:
        """Ever given."""
        return self._watch.core.num_notices

    def uploads(self) -> list[tuple[int, float, float]]:
        """By stage, the usual and the longest upload of its newest outer step that is through; seconds."""
        return view.upload_figures(self._watch)

    async def pause(self) -> None:
        """Until it is worth looking again, or the page is closed."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(self._refresh_s):
                await self._woken.wait()

    @contextlib.contextmanager
    def listening(self) -> Iterator[None]:
        """A listener's place. Raises RefusedError (BUSY) when all are taken."""
        if self._num_listeners >= LISTENERS_MAX or self.is_closed:
            raise refused(RefusalCode.BUSY, "as many listen as may: ask for the page instead", _RETRY_LISTENING_S)
        self._num_listeners += 1
        try:
            yield
        finally:
            self._num_listeners -= 1

    def _refresh(self) -> None:
        now_s = self._clock.monotonic_s()
        if self._made_s is not None and now_s < self._made_s + self._refresh_s:
            return
        self._made_s = now_s
        if now_s >= self._rank_due_s:
            self._ranking = self._watch.core.look(trust.rank)
            cost_s = self._clock.monotonic_s() - now_s
            self._rank_due_s = now_s + max(_RANK_EVERY_S, cost_s / _RANK_COST_SHARE)
        for name, section in self._watch.core.look(self._render).items():
            if section != self._sections[name]:
                self._sections[name] = section
                self._revisions[name] += 1

    def _render(self, state: RunState) -> dict[str, bytes]:
        watch = self._watch
        models = {
            "head": view.head(state, watch),
            "map": view.pipeline_map(state, watch),
            "curves": view.curves(state, watch),
            "timeline": view.timeline(state, watch),
            "trust": trust.trust(state, watch, self._ranking),
            "log": view.log(watch),
        }
        return {name: model.model_dump_json().encode() for name, model in models.items()}


class LiveStream:
    """The answer to one listener: an ASGI application that ends with its listener, or when it does not read."""

    def __init__(
        self,
        page: LivePage,
        headers: list[tuple[bytes, bytes]],
        drop: Callable[[Hashable], None],
        *,
        send_s_max: float = SEND_S_MAX,
    ) -> None:
        """`drop` ends the connection of the client with this address, whatever is still to be sent on it."""
        self._page = page
        self._headers = [*headers, (b"content-type", b"text/event-stream"), (b"x-accel-buffering", b"no")]
        self._drop = drop
        self._send_s_max = send_s_max

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        with self._page.listening():
            gone = asyncio.create_task(_until_gone(receive))
            try:
                await self._tell(send, gone)
            except TimeoutError:
                self._drop(_address(scope))
            finally:
                gone.cancel()

    async def _tell(self, send: Send, gone: "asyncio.Task[None]") -> None:
        page, seen, idle_s = self._page, dict[str, int](), 0.0
        await send({"type": "http.response.start", "status": 200, "headers": self._headers})
        await self._send(send, b"retry: %d\n\n" % _RETRY_MS)
        while not gone.done() and not page.is_closed:
            if page.has_news(seen) or idle_s >= BEAT_S:
                await self._send(send, page.changes(seen))
                idle_s = 0.0
            await page.pause()
            idle_s += REFRESH_S
        if not gone.done():
            await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _send(self, send: Send, body: bytes) -> None:
        async with asyncio.timeout(self._send_s_max):
            await send({"type": "http.response.body", "body": body, "more_body": True})


async def _until_gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


def _address(scope: Scope) -> Hashable:
    client = scope["client"]
    return None if client is None else (client[0], client[1])
