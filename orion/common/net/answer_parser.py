"""The answer to one request, put together from what a socket brings. Pure: bytes in, an answer out.

Parsed by llhttp, bounded before it is kept. Only what is told to be complete counts: an answer that would end with its
connection is none, since nobody could tell it from one that broke off.
"""

from dataclasses import dataclass

import httptools

from orion.common.errors import TransportError

ANSWER_BYTES_MAX = 64 * 1024
"""Head and body together: what tensors are answered with is a short message or a refusal."""
_INFORMATIONAL_END = 200


@dataclass(frozen=True, slots=True)
class Answer:
    """A whole answer."""

    status: int
    body: bytes
    keeps_alive: bool
    """The connection may be used for another request."""


class AnswerParser:
    """Takes one answer in."""

    def __init__(self) -> None:
        self._parser = httptools.HttpResponseParser(self)
        self._num_bytes = 0
        self._is_followed = False
        """Something came after the answer."""
        self._body = bytearray()
        self._answer: Answer | None = None

    def feed(self, data: bytes) -> Answer | None:
        """The answer once it is whole. Raises TransportError for what is no answer, or one beyond the bound.

        What comes after the answer was not asked for: then its connection is not to be used again.
        """
        self._num_bytes += len(data)
        if self._num_bytes > ANSWER_BYTES_MAX:
            raise TransportError(f"an answer of more than {ANSWER_BYTES_MAX} bytes")
        try:
            self._parser.feed_data(data)
        except (httptools.HttpParserError, httptools.HttpParserUpgrade) as error:
            raise TransportError(f"no HTTP answer: {type(error).__name__}: {error}") from error
        if self._answer is not None and self._is_followed:
            return Answer(self._answer.status, self._answer.body, keeps_alive=False)
        return self._answer

    # --- what llhttp tells --------------------------------------------------------------------------------------------

    def on_message_begin(self) -> None:
        self._is_followed = self._answer is not None

    def on_body(self, body: bytes) -> None:
        if self._answer is None:
            self._body += body

    def on_message_complete(self) -> None:
        status = self._parser.get_status_code()
        if self._answer is None and status >= _INFORMATIONAL_END:
            self._answer = Answer(status, bytes(self._body), self._parser.should_keep_alive())
