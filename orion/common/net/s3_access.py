"""A bucket through boto3: opening it, what its errors mean, the rules that tidy it up. Everything here blocks.

The only module, beside `s3_store`, that knows boto3, and the only one that imports it; it is an optional dependency.
"""

import secrets
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import structlog

from orion.common.errors import ConfigError, DataError, TransportError
from orion.common.net.s3_address import S3Address

THREADS_MAX = 16
"""Requests to S3 at a time."""
_CONNECT_TIMEOUT_S = 5.0
_READ_TIMEOUT_S = 60.0
"""For an answer; completing a large upload takes S3 seconds."""
_ATTEMPTS_MAX = 3
_RULE_PREFIX = "orion-"
_OWNER = "owner"
"""Key of the note whose objects these are."""
_OWNER_BYTES_MAX = 256

_NO_CREDENTIALS = (
    "S3: no credentials found; set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY (or AWS_PROFILE) for the orchestrator"
)
_WRONG_CREDENTIALS = frozenset({"InvalidAccessKeyId", "SignatureDoesNotMatch", "InvalidToken", "ExpiredToken"})
_WRONG_REGION = frozenset({"PermanentRedirect", "AuthorizationHeaderMalformed", "IllegalLocationConstraintException"})
_NOT_FOUND = frozenset({"404", "NoSuchKey", "NotFound", "NoSuchUpload"})

_log = structlog.get_logger("orion.s3")


class S3Access:
    """An open bucket: `client` is boto3's; whoever uses it wraps calls in `translated`."""

    def __init__(self, client: Any, address: S3Address) -> None:
        self.client = client
        self.address = address

    def key(self, name: str) -> str:
        """An object's key in the bucket."""
        return self.address.prefix + name

    @contextmanager
    def translated(self) -> Iterator[None]:
        """Turns boto3's errors into TransportError; those that say that something isn't there into `NotThereError`."""
        from boto3.exceptions import Boto3Error  # noqa: PLC0415
        from botocore.exceptions import BotoCoreError, ClientError  # noqa: PLC0415

        try:
            yield
        except ClientError as error:
            if error_code(error) in _NOT_FOUND:
                raise NotThereError from error
            raise TransportError(f"S3 bucket {self.address.bucket}: {error}") from error
        except (BotoCoreError, Boto3Error) as error:
            raise TransportError(f"S3 bucket {self.address.bucket}: {error}") from error


class NotThereError(Exception):
    """No such object or upload."""


def error_code(error: Any) -> str:
    """S3's name of an error."""
    return str(error.response.get("Error", {}).get("Code", ""))


def open_bucket(address: S3Address, owner: str) -> S3Access:
    """Opens a bucket and tries that it can be listed, written to and deleted from; sets its lifecycle.

    `owner` names the one state folder whose objects lie under the prefix: another's would be taken for this run's.
    Raises ConfigError, one line that says what to do, when it cannot be used as it is.
    """
    with _advised(address):
        access = S3Access(make_client(address), address)
        _try(access)
        _claim(access, owner)
    _set_lifecycle(access)
    return access


def fetch_objects(address: S3Address, keys: Sequence[str], folder: Path) -> tuple[Path, ...]:
    """Makes files of objects, below `folder` at their keys, unless they are there already. Claims and writes nothing.

    What is in the files is the caller's to check. Raises ConfigError as `open_bucket`, DataError for a missing object.
    """
    paths = tuple(folder / key for key in keys)
    with _advised(address), closing(make_client(address)) as client:
        for key, path in zip(keys, paths, strict=True):
            if path.is_file():
                continue
            path.parent.mkdir(parents=True, exist_ok=True)
            _fetch(S3Access(client, address), key, path)
    return paths


def _fetch(access: S3Access, key: str, path: Path) -> None:
    """Downloads one object; the file is there once it is whole. Raises DataError, and botocore's errors."""
    from botocore.exceptions import ClientError  # noqa: PLC0415

    bucket = access.address.bucket
    try:
        access.client.download_file(bucket, access.key(key), str(path))
    except ClientError as error:
        if error_code(error) not in _NOT_FOUND:
            raise
        raise DataError(f"S3: {access.key(key)} is no longer in bucket {bucket!r}") from error


@contextmanager
def _advised(address: S3Address) -> Iterator[None]:
    """Makes botocore's errors a ConfigError of one line that says what to do."""
    try:
        import boto3  # noqa: F401, PLC0415
    except ImportError:
        raise ConfigError("S3 needs boto3: pip install 'orion-swarm[s3]'") from None
    from botocore.exceptions import (  # noqa: PLC0415
        BotoCoreError,
        ClientError,
        NoCredentialsError,
        NoRegionError,
        PartialCredentialsError,
        ProfileNotFound,
    )

    try:
        yield
    except (NoCredentialsError, PartialCredentialsError):
        raise ConfigError(_NO_CREDENTIALS) from None
    except ProfileNotFound as error:
        raise ConfigError(f"S3: {error}; correct AWS_PROFILE") from None
    except NoRegionError:
        raise ConfigError("S3: no region; add region=NAME to the store's address (auto for R2)") from None
    except ClientError as error:
        raise ConfigError(_advice(address, error_code(error), str(error))) from error
    except BotoCoreError as error:
        where = address.endpoint or "AWS"
        raise ConfigError(f"S3: {where} cannot be reached ({error}); check endpoint= and the network") from error


def make_client(address: S3Address) -> Any:
    """boto3's client for an address; asks nothing yet. Raises botocore's errors."""
    import boto3  # noqa: PLC0415
    from botocore.config import Config  # noqa: PLC0415

    return boto3.Session().client(
        "s3",
        endpoint_url=address.endpoint,
        region_name=address.region,
        config=Config(
            signature_version="s3v4",
            s3={"addressing_style": address.style},
            connect_timeout=_CONNECT_TIMEOUT_S,
            read_timeout=_READ_TIMEOUT_S,
            retries={"max_attempts": _ATTEMPTS_MAX, "mode": "standard"},
            max_pool_connections=THREADS_MAX,
            # Not every server knows the newer checksums; blake3 goes end to end anyway.
            request_checksum_calculation="when_required",
            response_checksum_validation="when_required",
        ),
    )


def _advice(address: S3Address, code: str, text: str) -> str:
    """What to do about S3's refusal at the start."""
    where = address.endpoint or "AWS"
    if code in ("NoSuchBucket", "404"):
        return f"S3: there is no bucket {address.bucket!r} at {where}; create it, or correct the store's address"
    if code in _WRONG_CREDENTIALS:
        return f"S3: {where} refuses these credentials ({code}); check AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"
    if code in _WRONG_REGION:
        return f"S3: bucket {address.bucket!r} is in another region ({text}); add region=NAME to the store's address"
    if code in ("AccessDenied", "403"):
        return (
            f"S3: these credentials may not use bucket {address.bucket!r}; they need s3:ListBucket, GetObject, "
            f"PutObject, DeleteObject, AbortMultipartUpload and the lists of multipart uploads and parts ({text})"
        )
    return f"S3: bucket {address.bucket!r} at {where} cannot be used: {text}"


def _try(access: S3Access) -> None:
    """Lists, writes, writes again, deletes. Raises botocore's errors."""
    from botocore.exceptions import ClientError  # noqa: PLC0415

    client, bucket = access.client, access.address.bucket
    client.list_objects_v2(Bucket=bucket, Prefix=access.address.prefix, MaxKeys=1)
    key = access.key(f"probe/{secrets.token_hex(8)}")
    client.put_object(Bucket=bucket, Key=key, Body=b"1", IfNoneMatch="*")
    try:
        client.put_object(Bucket=bucket, Key=key, Body=b"2", IfNoneMatch="*")
    except ClientError as error:
        if error_code(error) not in ("PreconditionFailed", "412"):
            raise
    else:
        _log.warning("objects_can_be_overwritten", bucket=bucket, because="the server ignores If-None-Match")
    finally:
        client.delete_object(Bucket=bucket, Key=key)


def _claim(access: S3Access, owner: str) -> None:
    """Notes whose the prefix is, or sees that it is ours. Raises ConfigError, and botocore's errors."""
    from botocore.exceptions import ClientError  # noqa: PLC0415

    where = {"Bucket": access.address.bucket, "Key": access.key(_OWNER)}
    try:
        with closing(access.client.get_object(**where)["Body"]) as body:
            found = body.read(_OWNER_BYTES_MAX).decode("ascii", "replace")
    except ClientError as error:
        if error_code(error) not in _NOT_FOUND:
            raise
        access.client.put_object(**where, Body=owner.encode("ascii"))
        return
    if found != owner:
        raise ConfigError(
            f"S3: prefix {access.address.prefix or '(none)'!r} of bucket {access.address.bucket!r} holds another run's "
            "objects; give another prefix, or the state folder that belongs to them"
        )


def lifecycle_rules(address: S3Address, present: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The bucket's rules with ours for this prefix, unless one of a shorter prefix does the same; others stay as they
    are. Pure."""
    name = _RULE_PREFIX + (address.prefix.strip("/").replace("/", "-") or "all")
    ours: dict[str, Any] = {
        "ID": name,
        "Status": "Enabled",
        "Filter": {"Prefix": address.prefix},
        "AbortIncompleteMultipartUpload": {"DaysAfterInitiation": address.abort_days},
    }
    if address.expire_days:
        ours["Expiration"] = {"Days": address.expire_days}
    if not address.expire_days and any(_aborts_below(rule, address.prefix) for rule in present):
        return present
    return [*(rule for rule in present if rule.get("ID") != name), ours]


def _aborts_below(rule: dict[str, Any], prefix: str) -> bool:
    """Whether a rule drops unfinished uploads of a shorter prefix than this."""
    of_rule = str(rule.get("Filter", {}).get("Prefix", rule.get("Prefix", "")))
    is_plain = not rule.get("Filter", {}).keys() - {"Prefix"}
    aborts = rule.get("Status") == "Enabled" and "AbortIncompleteMultipartUpload" in rule
    return aborts and is_plain and of_rule != prefix and prefix.startswith(of_rule)


def _set_lifecycle(access: S3Access) -> None:
    """Has the bucket drop what a run leaves behind that ends for good. A safety net: without it all else works."""
    from botocore.exceptions import BotoCoreError, ClientError  # noqa: PLC0415

    address, client = access.address, access.client
    if address.abort_days == 0:
        return
    try:
        try:
            present = client.get_bucket_lifecycle_configuration(Bucket=address.bucket).get("Rules", [])
        except ClientError as error:
            if error_code(error) != "NoSuchLifecycleConfiguration":
                raise
            present = []
        wanted = lifecycle_rules(address, present)
        if wanted != present:
            client.put_bucket_lifecycle_configuration(Bucket=address.bucket, LifecycleConfiguration={"Rules": wanted})
    except (BotoCoreError, ClientError) as error:
        _log.warning(
            "lifecycle_not_set",
            bucket=address.bucket,
            error=str(error),
            advice="set a rule yourself that aborts incomplete multipart uploads, and silence this with abort_days=0",
        )
