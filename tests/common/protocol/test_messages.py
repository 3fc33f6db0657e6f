"""Bounds of messages that more than one part relies on."""

import pytest
from pydantic import ValidationError

from orion.common.protocol.messages import Join


def join(url: str) -> Join:
    return Join(url=url, device="cpu", memory_bytes=0)


@pytest.mark.parametrize(
    "url", ["http://10.0.0.1:8000", "https://miner-3.example.org", "http://localhost:1", "http://[2001:db8::1]:8000"]
)
def test_a_base_url_is_scheme_host_and_port(url: str) -> None:
    assert join(url).url == url


@pytest.mark.parametrize(
    "url",
    [
        "10.0.0.1:8000",
        "ftp://10.0.0.1",
        "http://",
        "http://host/",
        "http://host/path",
        "http://host?x",
        "http://host#x",
        "http://user@host",
        "http://user:password@host",
        "http://host:port",
        "http://host:123456",
        "http://a b",
        "http://host\n",
        "http://hóst",
        "http://[host]",
        "http://" + "a" * 300,
    ],
)
def test_nothing_else_is_a_base_url(url: str) -> None:
    with pytest.raises(ValidationError):
        join(url)
