"""The dashboard's routes: the page, its files, its data, and the stream of changes. All read-only and unsigned.

Owns headers and caching. Files are read once and served by name from memory, so no path leads anywhere else. URLs are
relative, so the page also works below another path of a reverse proxy.
"""

from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass
from importlib.resources import files
from importlib.resources.abc import Traversable
from types import MappingProxyType
from typing import Final

from blake3 import blake3
from fastapi import FastAPI
from starlette.requests import Request
from starlette.responses import RedirectResponse, Response
from starlette.routing import Route

from orion.common.protocol import routes
from orion.common.protocol.messages import RefusalCode
from orion.common.protocol.refusals import refused
from orion.orchestrator.dashboard.live import LivePage, LiveStream

_TYPES: Final[Mapping[str, str]] = MappingProxyType(
    {
        "html": "text/html; charset=utf-8",
        "css": "text/css; charset=utf-8",
        "js": "text/javascript; charset=utf-8",
        "svg": "image/svg+xml",
        "woff2": "font/woff2",
        "txt": "text/plain; charset=utf-8",
        "md": "text/plain; charset=utf-8",
    }
)

HEADERS: Final[Mapping[str, str]] = MappingProxyType(
    {
        "content-security-policy": (
            "default-src 'none'; script-src 'self'; style-src 'self'; font-src 'self'; img-src 'self' data:; "
            "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
        ),
        "cache-control": "no-cache",
        "cross-origin-opener-policy": "same-origin",
        "referrer-policy": "no-referrer",
        "x-content-type-options": "nosniff",
    }
)


@dataclass(frozen=True, slots=True)
class _File:
    content: bytes
    media_type: str
    etag: str


def add_dashboard(app: FastAPI, page: LivePage, drop: Callable[[Hashable], None]) -> None:
    """Adds the routes. `drop` ends the connection of the client with this address."""
    served = _load(files("orion.orchestrator.dashboard") / "static")
    index = served["index.html"]

    async def to_page(_: Request) -> Response:
        return RedirectResponse(routes.DASHBOARD.removeprefix("/"))

    @app.get(routes.DASHBOARD)
    async def dashboard(request: Request) -> Response:
        return _answer(request, index)

    @app.get(routes.DASHBOARD + "assets/{name:path}")
    async def asset(request: Request, name: str) -> Response:
        if name not in served:
            raise refused(RefusalCode.NOT_FOUND, "no such file")
        return _answer(request, served[name])

    @app.get(routes.DASHBOARD + "page")
    async def data() -> Response:
        return Response(page.whole(), media_type="application/json", headers=dict(HEADERS))

    headers = [(name.encode(), value.encode()) for name, value in HEADERS.items()]
    app.router.routes.append(
        Route(routes.DASHBOARD + "live", LiveStream(page, headers, drop), methods=["GET"], name="live")
    )
    app.router.routes.append(Route("/", to_page, methods=["GET"]))


def _answer(request: Request, file: _File) -> Response:
    headers = {**HEADERS, "etag": file.etag}
    if request.headers.get("if-none-match") == file.etag:
        return Response(status_code=304, headers=headers)
    return Response(file.content, media_type=file.media_type, headers=headers)


def _load(folder: Traversable, prefix: str = "") -> dict[str, _File]:
    """Every file below a folder, by its path there."""
    served: dict[str, _File] = {}
    for entry in folder.iterdir():
        if entry.is_dir():
            served.update(_load(entry, f"{prefix}{entry.name}/"))
        elif (media_type := _TYPES.get(entry.name.rsplit(".", 1)[-1])) is not None:
            content = entry.read_bytes()
            served[prefix + entry.name] = _File(content, media_type, f'"{blake3(content).hexdigest(length=12)}"')
    return served
