"""What every server checks of every request before anything else looks at it. Free of any web framework."""

from collections.abc import Callable, Mapping
from typing import TypeVar

from pydantic import ValidationError

from orion.common.clock import Clock
from orion.common.ids import PROTOCOL_VERSION, Digest, Hotkey
from orion.common.protocol.messages import (
    Message,
    RefusalCode,
)
from orion.common.protocol.refusals import malformed, refused
from orion.common.protocol.signing import Verifier

MessageT = TypeVar("MessageT", bound=Message)

REQUEST_BYTES_MAX = 8 * 1024 * 1024
"""Largest JSON request: a report of 4,096 receipts and as many trips over a dozen stages."""


class Gate:
    """Protocol version, run, signature, admission: in this order, so that a mismatch is told even to those who can't
    sign, and nothing of a body is looked at before its sender is known."""

    def __init__(
        self,
        verifier: Verifier,
        run_digest: Digest | None,
        clock: Clock,
        admit: Callable[[Hotkey], None] = lambda _: None,
    ) -> None:
        """`run_digest` is None where there is no run. `admit` raises RefusedError FORBIDDEN for
        who may ask nothing at all; without it whoever can sign passes."""
        self._verifier = verifier
        self._run_digest = run_digest
        self._clock = clock
        self._admit = admit

    @property
    def hotkey(self) -> Hotkey:
        """Whom requests must be signed for."""
        return self._verifier.self_hotkey

    def check(
        self,
        method: str,
        path_and_query: str,
        query: Mapping[str, str],
        headers: Mapping[str, str],
        body: bytes,
    ) -> Hotkey:
        """Who sent the request. `path_and_query` as received, `query` parsed, `body` the bytes that were signed (none
        for a tensor). Raises RefusedError PROTOCOL_MISMATCH, RUN_MISMATCH, BAD_SIGNATURE, FORBIDDEN or BUSY."""
        _same(RefusalCode.PROTOCOL_MISMATCH, "protocol", query.get("protocol"), str(PROTOCOL_VERSION))
        if self._run_digest is not None:
            _same(RefusalCode.RUN_MISMATCH, "run", query.get("run"), self._run_digest)
        now_ns = int(self._clock.now_s() * 1e9)
        sender = self._verifier.verify(headers, body, method, path_and_query, now_ns)
        self._admit(sender)
        return sender


def parse_request(message_type: type[MessageT], body: bytes | str) -> MessageT:
    """The message in a request. Raises RefusedError MALFORMED."""
    try:
        return message_type.model_validate_json(body)
    except ValidationError as error:
        raise malformed(error) from error


def check_request_size(size_bytes: int, size_bytes_max: int) -> None:
    """Raises RefusedError TOO_LARGE."""
    if size_bytes > size_bytes_max:
        raise refused(RefusalCode.TOO_LARGE, f"body of {size_bytes} bytes or more, at most {size_bytes_max} are taken")


def _same(code: RefusalCode, name: str, theirs: str | None, ours: str) -> None:
    if theirs != ours:
        raise refused(code, f"{name} is {(theirs or 'missing')[:80]}, ours is {ours}")
