"""The receiving end on Starlette or FastAPI, for the orchestrator: the same checks and answers as on aiohttp."""

import asyncio
from typing import TypeVar

from fastapi.exceptions import RequestValidationError
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response

from orion.common.ids import Hotkey
from orion.common.net.gate import REQUEST_BYTES_MAX, Gate, check_request_size, parse_request
from orion.common.protocol.entries import Proof
from orion.common.protocol.messages import (
    Message,
    Refusal,
    RefusalCode,
)
from orion.common.protocol.refusals import RefusedError, refusal_from_answer, refused, status_of
from orion.common.protocol.signing import proof_of

MessageT = TypeVar("MessageT", bound=Message)

READ_TIMEOUT_S = 30.0
"""For a JSON body to arrive."""


def install(app: Starlette, gate: Gate) -> None:
    """Lets the application's handlers raise RefusedError and use the functions below."""
    app.state.gate = gate
    app.add_exception_handler(RefusedError, _answer_refused)
    app.add_exception_handler(HTTPException, _answer_http_exception)
    app.add_exception_handler(RequestValidationError, _answer_validation_error)
    app.add_exception_handler(ClientDisconnect, _answer_nobody)


async def signed_json(
    request: Request, message_type: type[MessageT], size_bytes_max: int = REQUEST_BYTES_MAX
) -> tuple[Hotkey, MessageT]:
    """Sender and message of a signed JSON request. Raises RefusedError."""
    body = await read_bounded(request, size_bytes_max)
    return verify_starlette(request, body), parse_request(message_type, body)


async def signed_statement(
    request: Request, message_type: type[MessageT], size_bytes_max: int = REQUEST_BYTES_MAX
) -> tuple[Hotkey, MessageT, Proof]:
    """Sender and message of a signed JSON request, and the proof for anybody else that the sender said so.

    The body must be the message's own JSON, byte for byte: only then can a third party rebuild what was signed. Raises
    RefusedError, MALFORMED for any other spelling.
    """
    body = await read_bounded(request, size_bytes_max)
    hotkey = verify_starlette(request, body)
    message = parse_request(message_type, body)
    if message.model_dump_json().encode() != body:
        raise refused(RefusalCode.MALFORMED, "the body must be the message's canonical JSON: every field, no spaces")
    return hotkey, message, proof_of(request.headers, _target(request))


async def read_bounded(request: Request, size_bytes_max: int) -> bytes:
    """The body of a request. Raises RefusedError TOO_LARGE (before reading, where the size is announced) or MALFORMED
    when it doesn't arrive in time."""
    check_request_size(_content_length(request), size_bytes_max)
    parts: list[bytes] = []
    size_bytes = 0
    try:
        async with asyncio.timeout(READ_TIMEOUT_S):
            async for part in request.stream():
                size_bytes += len(part)
                check_request_size(size_bytes, size_bytes_max)
                parts.append(part)
    except TimeoutError as error:
        raise refused(RefusalCode.MALFORMED, f"the body did not arrive within {READ_TIMEOUT_S:g} s") from error
    return b"".join(parts)


def verify_starlette(request: Request, body: bytes) -> Hotkey:
    """Who signed this request. Raises RefusedError."""
    gate: Gate = request.app.state.gate
    return gate.check(request.method, _target(request), request.query_params, request.headers, body)


def _target(request: Request) -> str:
    """Path and query as they came."""
    target: str = request.scope["raw_path"].decode("latin-1")
    if request.scope["query_string"]:
        target += "?" + request.scope["query_string"].decode("latin-1")
    return target


def json_answer(message: Message, status: int = 200) -> Response:
    """A message as an answer. Faster than the framework's own way, which validates it again."""
    return Response(message.model_dump_json(), status_code=status, media_type="application/json")


def _content_length(request: Request) -> int:
    announced = request.headers.get("content-length", "0")
    if not announced.isdecimal() or len(announced) > 18:
        raise refused(RefusalCode.MALFORMED, "Content-Length is no number")
    return int(announced)


def _refusal_answer(refusal: Refusal) -> Response:
    return json_answer(refusal, status_of(refusal.code))


async def _answer_refused(_: Request, error: Exception) -> Response:
    assert isinstance(error, RefusedError)
    return _refusal_answer(error.refusal)


async def _answer_http_exception(_: Request, error: Exception) -> Response:
    # The framework's own refusals: no such route, wrong method.
    assert isinstance(error, HTTPException)
    return _refusal_answer(refusal_from_answer(error.status_code, b""))


async def _answer_validation_error(_: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    first = error.errors()[0]
    where = ".".join(str(part) for part in first["loc"])
    return _refusal_answer(Refusal(code=RefusalCode.MALFORMED, message=f"{where}: {first['msg']}"[:500]))


async def _answer_nobody(_: Request, error: Exception) -> Response:
    # The sender broke off in the middle of its body: no mistake of ours, and nobody is left to read an answer.
    assert isinstance(error, ClientDisconnect)
    return _refusal_answer(Refusal(code=RefusalCode.MALFORMED, message="the body broke off"))
