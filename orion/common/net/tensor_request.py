"""What a handler of tensor requests sees of one, whoever reads it from the socket."""

from collections.abc import Awaitable, Callable, Mapping
from typing import Protocol

from orion.common.ids import Digest
from orion.common.protocol.messages import Message


class TensorRequest(Protocol):
    """A request whose body is a tensor, of which nothing was read yet."""

    @property
    def method(self) -> str: ...

    @property
    def target(self) -> str:
        """Path and query exactly as they were sent, and signed."""
        ...

    @property
    def query(self) -> Mapping[str, str]: ...

    @property
    def headers(self) -> Mapping[str, str]: ...

    @property
    def content_length(self) -> int | None: ...

    async def receive(self, size_bytes: int, digest: Digest) -> memoryview:
        """The body in writable memory that is the caller's alone, hashed while it arrives; once.

        `size_bytes` must be the announced `content_length`. Raises RefusedError BAD_TENSOR (short) or DIGEST_MISMATCH,
        and ConnectionError when the sender breaks off.
        """
        ...


TensorHandler = Callable[[TensorRequest], Awaitable[Message]]
"""Answers with a message; raises RefusedError."""
