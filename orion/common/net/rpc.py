"""Requests between processes, as the caller: signed, with the protocol's version and the run's digest in the query.

Owns how a request looks on the wire; which routes there are is `orchestrator_client` and the roles' business. Answers
are not signed: what must not be forged (objects, evidence, logs) has its digest known beforehand.
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING, TypeVar
from urllib.parse import quote, urlencode

from pydantic import ValidationError

from orion.common.clock import Clock, SystemClock
from orion.common.errors import TransportError
from orion.common.ids import PROTOCOL_VERSION, Digest, Hotkey
from orion.common.net.answer_parser import ANSWER_BYTES_MAX
from orion.common.net.http import MESSAGE_BYTES_MAX, HttpClient, read_bounded
from orion.common.net.tensor_sender import TensorSender, address_of
from orion.common.protocol.messages import (
    Accepted,
    Message,
    Transfer,
)
from orion.common.protocol.refusals import RefusedError, refusal_from_answer
from orion.common.protocol.signing import Keypair, NonceSource, hotkey_of, sign_request

if TYPE_CHECKING:
    from orion.common.protocol.codec import Body

MessageT = TypeVar("MessageT", bound=Message)


class RpcClient:
    """Signs and sends requests for one hotkey. Make it inside a running event loop; close it in the end."""

    def __init__(self, keypair: Keypair, run_digest: Digest | None, clock: Clock | None = None) -> None:
        """`run_digest` is None where there is no run."""
        self.http = HttpClient()
        self._tensors = TensorSender()
        self.hotkey = hotkey_of(keypair)
        self._keypair = keypair
        self._run_digest = run_digest
        self._clock = clock if clock is not None else SystemClock()
        self._nonces = NonceSource()

    async def __aenter__(self) -> "RpcClient":
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def close(self) -> None:
        self._tensors.close()
        await self.http.close()

    async def call(
        self,
        base_url: str,
        receiver: Hotkey,
        route: str,
        message: Message,
        answer_type: type[MessageT],
        *,
        timeout_s: float,
        query: Mapping[str, str] | None = None,
    ) -> MessageT:
        """POSTs a message, with further query fields, and returns the answer. Raises RefusedError, or TransportError
        (also for an answer that is not of `answer_type`)."""
        body = message.model_dump_json().encode()
        target = self._target(route, query or {})
        headers = {**self._sign("POST", target, body, receiver), "Content-Type": "application/json"}
        async with self.http.open("POST", base_url + target, headers=headers, data=body, timeout_s=timeout_s) as answer:
            return parse_answer(answer_type, await read_bounded(answer, MESSAGE_BYTES_MAX), route)

    async def get(
        self,
        base_url: str,
        receiver: Hotkey,
        route: str,
        answer_type: type[MessageT],
        *,
        query: Mapping[str, str],
        timeout_s: float,
    ) -> MessageT:
        """GETs a route with further query fields; signed, answered and failing as `call`."""
        target, headers = self.signed_head("GET", receiver, route, query)
        async with self.http.open("GET", base_url + target, headers=headers, timeout_s=timeout_s) as answer:
            return parse_answer(answer_type, await read_bounded(answer, MESSAGE_BYTES_MAX), route)

    async def send_tensor(
        self, base_url: str, receiver: Hotkey, route: str, transfer: Transfer, body: "Body", *, timeout_s: float
    ) -> Accepted:
        """Sends a tensor body that `transfer` describes (digest and size must be the body's). Raises as `call`."""
        query = {"transfer": transfer.model_dump_json(exclude_defaults=True)}
        target, headers = self.signed_head("POST", receiver, route, query)
        address = address_of(base_url)
        if address is None:
            url = base_url + target
            async with self.http.open("POST", url, headers=headers, data=body, timeout_s=timeout_s) as response:
                return parse_answer(Accepted, await read_bounded(response, ANSWER_BYTES_MAX), route)
        try:
            answer = await self._tensors.post(address, target, headers, body, timeout_s=timeout_s)
        except TransportError as error:
            raise TransportError(f"POST {base_url}{route}: {error}") from error
        if answer.status == 200:
            return parse_answer(Accepted, answer.body, route)
        if 400 <= answer.status < 500:
            raise RefusedError(refusal_from_answer(answer.status, answer.body))
        raise TransportError(f"POST {base_url}{route}: answered {answer.status}")

    async def fetch_tensor(
        self, base_url: str, receiver: Hotkey, route: str, message: Message, *, size_bytes_max: int, timeout_s: float
    ) -> bytes:
        """POSTs a message that is answered with tensor bytes, at most `size_bytes_max`. Raises RefusedError (TOO_LARGE
        when there are more) or TransportError. What the bytes are is the caller's to check."""
        body = message.model_dump_json().encode()
        target = self._target(route, {})
        headers = {**self._sign("POST", target, body, receiver), "Content-Type": "application/json"}
        async with self.http.open("POST", base_url + target, headers=headers, data=body, timeout_s=timeout_s) as answer:
            return await read_bounded(answer, size_bytes_max)

    def signed_head(
        self, method: str, receiver: Hotkey, route: str, query: Mapping[str, str]
    ) -> tuple[str, dict[str, str]]:
        """Target (path and query) and headers of a request whose body is not signed, for `http.open` to send."""
        target = self._target(route, query)
        return target, self._sign(method, target, b"", receiver)

    def _target(self, route: str, query: Mapping[str, str]) -> str:
        fields = {"protocol": str(PROTOCOL_VERSION), **query}
        if self._run_digest is not None:
            fields["run"] = self._run_digest
        # Signs of JSON that a query may hold as they are: half of what would be escaped here, and undone there.
        return f"{route}?{urlencode(fields, safe=':,', quote_via=quote)}"

    def _sign(self, method: str, target: str, body: bytes, receiver: Hotkey) -> dict[str, str]:
        nonce_ns = self._nonces.next_ns(self._clock.now_s())
        return sign_request(self._keypair, method, target, body, receiver, nonce_ns=nonce_ns)


def parse_answer(answer_type: type[MessageT], body: bytes, route: str) -> MessageT:
    """The message in a 200 answer. Raises TransportError for anything else: such a peer is as good as unreachable."""
    try:
        return answer_type.model_validate_json(body)
    except ValidationError as error:
        raise TransportError(
            f"{route}: the answer is no {answer_type.__name__}: {error.error_count()} errors"
        ) from error
