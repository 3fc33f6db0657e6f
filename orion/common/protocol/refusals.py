"""Refusals: what a request that is not granted raises on both sides, and the HTTP status it travels with.

Pure. A refusal is somebody's considered "no"; it is not a lost connection (`TransportError`) nor a mistake of ours.
"""

from types import MappingProxyType

from pydantic import ValidationError

from orion.common.errors import OrionError
from orion.common.protocol.messages import (
    Refusal,
    RefusalCode,
)

_MESSAGE_CHARS_MAX = 500
"""The bound of `Text`; a longer explanation is cut rather than refused in its turn."""

STATUS_BY_CODE = MappingProxyType(
    {
        RefusalCode.MALFORMED: 400,
        RefusalCode.BAD_SIGNATURE: 401,
        RefusalCode.FORBIDDEN: 403,
        RefusalCode.NOT_FOUND: 404,
        RefusalCode.RUN_MISMATCH: 409,
        RefusalCode.PROTOCOL_MISMATCH: 409,
        RefusalCode.NOT_MEMBER: 409,
        RefusalCode.WRONG_STAGE: 409,
        RefusalCode.WRONG_PHASE: 409,
        RefusalCode.CONFLICT: 409,
        RefusalCode.TOO_LARGE: 413,
        RefusalCode.BAD_TENSOR: 422,
        RefusalCode.DIGEST_MISMATCH: 422,
        RefusalCode.NOT_FINITE: 422,
        RefusalCode.BUSY: 429,
        RefusalCode.NO_WORK: 429,
    }
)
"""The only place that maps a code to a status."""

_CODE_BY_BARE_STATUS = MappingProxyType(
    {
        401: RefusalCode.BAD_SIGNATURE,
        403: RefusalCode.FORBIDDEN,
        404: RefusalCode.NOT_FOUND,
        409: RefusalCode.CONFLICT,
        412: RefusalCode.CONFLICT,  # an object that may only be written where there is none
        416: RefusalCode.BAD_TENSOR,  # bytes beyond an object's end
        413: RefusalCode.TOO_LARGE,
        429: RefusalCode.BUSY,
    }
)


class RefusedError(OrionError):
    """A request was refused, by us or by the other side; `refusal` is what was or will be answered."""

    def __init__(self, refusal: Refusal) -> None:
        super().__init__(f"{refusal.code}: {refusal.message}")
        self.refusal = refusal

    @property
    def code(self) -> RefusalCode:
        return self.refusal.code

    @property
    def retry_after_s(self) -> float | None:
        """Seconds until it is worth trying again; None when it is not."""
        return self.refusal.retry_after_s


def refused(code: RefusalCode, message: str, retry_after_s: float | None = None) -> RefusedError:
    """The error to raise for a refusal. Messages beyond the wire's bound are cut."""
    return RefusedError(Refusal(code=code, message=message[:_MESSAGE_CHARS_MAX], retry_after_s=retry_after_s))


def status_of(code: RefusalCode) -> int:
    """HTTP status that a refusal travels with."""
    return STATUS_BY_CODE[code]


def refusal_from_answer(status: int, body: bytes) -> Refusal:
    """What a 4xx answer says. A body that is no refusal (a proxy's, say) gives the code nearest to its status."""
    try:
        return Refusal.model_validate_json(body)
    except ValidationError:
        code = _CODE_BY_BARE_STATUS.get(status, RefusalCode.MALFORMED)
        return Refusal(code=code, message=f"answered {status} without a refusal")


def malformed(error: ValidationError) -> RefusedError:
    """The refusal of a message that did not parse: names the first field that is wrong, and never repeats its value."""
    first = error.errors(include_input=False, include_url=False)[0]
    where = ".".join(str(part) for part in first["loc"])
    return refused(RefusalCode.MALFORMED, f"{error.title}: {where or 'body'}: {first['msg']}")
