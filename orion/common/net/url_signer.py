"""Signed URLs to objects that the orchestrator serves itself. Pure."""

import hashlib
import hmac
from collections.abc import Mapping
from typing import Literal
from urllib.parse import quote, urlencode

from orion.common.net.store import check_key
from orion.common.protocol import routes
from orion.common.protocol.messages import RefusalCode
from orion.common.protocol.refusals import refused


class UrlSigner:
    """Makes and checks relative URLs that allow one method on one object, or on a part of it, until they expire."""

    def __init__(self, secret: bytes) -> None:
        """At least 32 random bytes that only the store's process knows; with new ones, old URLs end."""
        if len(secret) < 32:
            raise ValueError(f"a secret of {len(secret)} bytes is too short, 32 are the least")
        self._secret = secret

    def sign(
        self, method: Literal["GET", "PUT"], key: str, expires_s: float, size_bytes_max: int = 0, part: str = ""
    ) -> str:
        """A path and query. `expires_s` is Unix time; `size_bytes_max` bounds what a PUT may bring; `part` names a part
        of an upload, empty for the whole object."""
        fields = {"method": method, "expires": str(int(expires_s)), "max": str(size_bytes_max), "part": part}
        fields["sig"] = self._signature(check_key(key), fields)
        return f"{routes.OBJECTS}/{quote(key)}?{urlencode(fields)}"

    def verify(self, method: str, key: str, query: Mapping[str, str], now_s: float) -> int:
        """The bound on the body's size, in bytes. Raises RefusedError FORBIDDEN when the URL isn't ours, is for
        another method or object, or has expired. Afterwards the query's `part` is ours too."""
        fields = {name: query.get(name, "") for name in ("method", "expires", "max", "part")}
        if not hmac.compare_digest(self._signature(key, fields).encode(), query.get("sig", "").encode()):
            raise refused(RefusalCode.FORBIDDEN, "the URL's signature is wrong")
        # From here on the fields are ours, so they are well-formed.
        if fields["method"] != method:
            raise refused(RefusalCode.FORBIDDEN, f"the URL is for {fields['method']}")
        if now_s > int(fields["expires"]):
            raise refused(RefusalCode.FORBIDDEN, "the URL has expired; ask for a new one")
        return int(fields["max"])

    def _signature(self, key: str, fields: Mapping[str, str]) -> str:
        signed = "\n".join((fields["method"], key, fields["expires"], fields["max"], fields["part"]))
        return hmac.new(self._secret, signed.encode(), hashlib.sha256).hexdigest()
