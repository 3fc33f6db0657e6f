"""Where an S3 object store is, as people write it: `s3://BUCKET/PREFIX?endpoint=URL&region=NAME&style=path`. Pure.

It never holds credentials: these come from the environment or a profile, as boto3 finds them.
"""

import re
from collections.abc import Collection
from dataclasses import dataclass
from typing import Literal
from urllib.parse import parse_qsl, urlsplit

from orion.common.errors import ConfigError
from orion.common.net.part_layout import PART_BYTES

SCHEME = "s3://"
_MIB = 1024 * 1024
_PART_MIB_MIN = 5
"""What S3 takes; only the last part may be smaller."""
_PART_MIB_MAX = 1024
_BUCKET = re.compile(r"[a-z0-9][a-z0-9.-]{1,61}[a-z0-9]")
_PREFIX = re.compile(r"([A-Za-z0-9][A-Za-z0-9._-]*(/[A-Za-z0-9][A-Za-z0-9._-]*)*)?")
_DAYS_MAX = 3650


@dataclass(frozen=True, slots=True)
class S3Address:
    """One prefix of one bucket."""

    bucket: str
    prefix: str = ""
    """Before every key; empty, or ends with a slash. Belongs to one run."""
    endpoint: str | None = None
    """URL of a server other than AWS; miners and validators must reach it too."""
    region: str | None = None
    """None: as the environment or profile says; `auto` for R2."""
    style: Literal["auto", "path", "virtual"] = "auto"
    """Whether the bucket's name is in the path or in the host's name."""
    verify: Literal["content", "size"] = "content"
    """What makes an object durable: that its content was read and hashed once, or that its size is right."""
    part_bytes: int = PART_BYTES
    """Larger objects are written in parts of this size."""
    abort_days: int = 2
    """Unfinished uploads are dropped by the bucket after so many days; 0 = its lifecycle is left alone."""
    expire_days: int = 0
    """Objects are dropped by the bucket after so many days, whatever became of the run; 0 = never."""


def parse_s3_address(text: str) -> S3Address:
    """Raises ConfigError that says what is wrong with it."""
    if not text.startswith(SCHEME):
        raise ConfigError(f"store {text!r} is no S3 address; write s3://BUCKET/PREFIX?endpoint=URL&region=NAME")
    parts = urlsplit(text)
    if "@" in parts.netloc:
        raise ConfigError("a store's address must not hold credentials; set AWS_ACCESS_KEY_ID and its like instead")
    prefix = parts.path.strip("/")
    if not _BUCKET.fullmatch(parts.netloc):
        raise ConfigError(f"store: {parts.netloc!r} cannot be a bucket's name; write s3://BUCKET/PREFIX")
    if not _PREFIX.fullmatch(prefix):
        raise ConfigError(f"store: prefix {prefix!r} must be words of letters, digits, dots and dashes between slashes")
    options = dict(parse_qsl(parts.query, keep_blank_values=True))
    if unknown := sorted(options.keys() - _OPTIONS):
        raise ConfigError(f"store: unknown option {unknown[0]!r}; there are {', '.join(sorted(_OPTIONS))}")
    endpoint = options.get("endpoint")
    if endpoint is not None and not re.fullmatch(r"https?://[^/?#@\s]+/?", endpoint):
        raise ConfigError(f"store: endpoint {endpoint!r} must be http:// or https:// and a host, nothing behind it")
    return S3Address(
        bucket=parts.netloc,
        prefix=f"{prefix}/" if prefix else "",
        endpoint=None if endpoint is None else endpoint.rstrip("/"),
        region=options.get("region"),
        style=_STYLES[_word(options, "style", "auto", _STYLES)],
        verify=_VERIFY[_word(options, "verify", "content", _VERIFY)],
        part_bytes=_number(options, "part_mib", PART_BYTES // _MIB, _PART_MIB_MIN, _PART_MIB_MAX) * _MIB,
        abort_days=_number(options, "abort_days", 2, 0, _DAYS_MAX),
        expire_days=_number(options, "expire_days", 0, 0, _DAYS_MAX),
    )


def below(text: str, name: str) -> str:
    """The address of a further prefix below an address's own. Raises ConfigError when either is none."""
    parse_s3_address(text)
    parts = urlsplit(text)
    address = parts._replace(path=f"{parts.path.rstrip('/')}/{name}").geturl()
    parse_s3_address(address)
    return address


_OPTIONS = frozenset({"endpoint", "region", "style", "verify", "part_mib", "abort_days", "expire_days"})


_STYLES: dict[str, Literal["auto", "path", "virtual"]] = {"auto": "auto", "path": "path", "virtual": "virtual"}
_VERIFY: dict[str, Literal["content", "size"]] = {"content": "content", "size": "size"}


def _word(options: dict[str, str], name: str, default: str, words: Collection[str]) -> str:
    word = options.get(name, default)
    if word not in words:
        raise ConfigError(f"store: {name} is one of {', '.join(words)}, not {word!r}")
    return word


def _number(options: dict[str, str], name: str, default: int, least: int, most: int) -> int:
    text = options.get(name, str(default))
    if not re.fullmatch(r"[0-9]{1,6}", text) or not least <= int(text) <= most:
        raise ConfigError(f"store: {name} is a number from {least} to {most}, not {text!r}")
    return int(text)
