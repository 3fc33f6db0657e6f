"""AnswerParser: one whole answer, however it is cut, and nothing that could be half of one."""

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orion.common.errors import TransportError
from orion.common.net.answer_parser import ANSWER_BYTES_MAX, Answer, AnswerParser

OK = b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nhello"
CHUNKED = b"HTTP/1.1 429 Busy\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nhel\r\n2\r\nlo\r\n0\r\n\r\n"
LAST = b"HTTP/1.1 503 No\r\nConnection: close\r\nContent-Length: 5\r\n\r\nhello"
CONTINUE = b"HTTP/1.1 100 Continue\r\n\r\n"
ANSWERS = {
    OK: Answer(200, b"hello", keeps_alive=True),
    CHUNKED: Answer(429, b"hello", keeps_alive=True),
    LAST: Answer(503, b"hello", keeps_alive=False),
    CONTINUE + OK: Answer(200, b"hello", keeps_alive=True),
}


@given(st.sampled_from(sorted(ANSWERS)), st.sets(st.integers(1, len(CHUNKED) - 1)))
def test_an_answer_is_whole_with_its_last_byte_and_not_before(data: bytes, cuts: set[int]) -> None:
    places = [0, *sorted(cut for cut in cuts if cut < len(data)), len(data)]
    parser = AnswerParser()
    found = [parser.feed(data[begin:end]) for begin, end in pairwise(places)]
    assert found == [None] * (len(found) - 1) + [ANSWERS[data]]


def test_what_nobody_asked_for_ends_a_connection() -> None:
    assert AnswerParser().feed(OK + OK) == Answer(200, b"hello", keeps_alive=False)
    assert AnswerParser().feed(OK + CONTINUE) == Answer(200, b"hello", keeps_alive=False)


def test_an_answer_that_would_end_with_its_connection_never_is_whole() -> None:
    assert AnswerParser().feed(b"HTTP/1.1 200 OK\r\n\r\nhello") is None


@pytest.mark.parametrize(
    "data",
    [
        b"hello\r\n\r\n",
        b"SSH-2.0-OpenSSH\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\nContent-Length: 6\r\n\r\nhello",
        b"HTTP/1.1 200 OK\r\nContent-Length: -5\r\n\r\nhello",
        b"HTTP/1.1 101 Switching\r\nUpgrade: x\r\nConnection: upgrade\r\n\r\nhello",
    ],
)
def test_what_is_no_answer_is_an_error(data: bytes) -> None:
    with pytest.raises(TransportError, match="no HTTP answer"):
        AnswerParser().feed(data)


@pytest.mark.parametrize("start", [b"HTTP/1.1 200 OK\r\nX: ", b"HTTP/1.1 200 OK\r\nContent-Length: 9999999\r\n\r\n"])
def test_an_endless_answer_is_cut_off(start: bytes) -> None:
    parser = AnswerParser()
    assert parser.feed(start) is None
    with pytest.raises(TransportError, match="more than"):
        for _ in range(ANSWER_BYTES_MAX // 1000 + 1):
            parser.feed(b"x" * 1000)
