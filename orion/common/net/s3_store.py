"""The object store on S3: AWS, R2 or any server that speaks it, through URLs that are signed in advance.

Miners and validators need no credentials, and no object passes through the orchestrator, but for being read and hashed
once, where the address asks for that. Invariants: an object's metadata hold the digest it was granted for, and with
`verify=content` it is durable only if its bytes have it; what is known of an unfinished upload lies beside the objects,
so that another process goes on with it. boto3 blocks, so everything runs in threads of the store's own.
"""

import asyncio
import json
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar

from blake3 import blake3

from orion.common.clock import Clock
from orion.common.errors import TransportError
from orion.common.ids import Digest
from orion.common.net.part_layout import part_ranges, part_size
from orion.common.net.s3_access import THREADS_MAX, NotThereError, S3Access
from orion.common.net.store import StoredObject, check_key, check_prefix, check_writable
from orion.common.protocol.fields import PART_URLS_MAX
from orion.common.protocol.messages import ObjectRef, PartUrl, RefusalCode, UploadGrant
from orion.common.protocol.refusals import refused

_DIGEST = "blake3"
"""Name of the digest among an object's metadata."""
_DIGEST_HEADER = "x-amz-meta-blake3"
_UPLOADS = "uploads/"
"""Before the key of the note on an unfinished upload."""
_NOTE_BYTES_MAX = 4096
_READ_BYTES = 4 * 1024 * 1024
_DELETED_AT_ONCE = 1000
"""Keys in one request, which is what S3 takes."""
_URL_S_MAX = 7 * 86_400
_LOCKS = 256

ResultT = TypeVar("ResultT")


@dataclass(frozen=True, slots=True)
class Upload:
    """An unfinished upload, as the note on it says."""

    upload_id: str
    digest: Digest
    size_bytes: int
    part_bytes: int


@dataclass(frozen=True, slots=True)
class Head:
    """What S3 says of an object."""

    size_bytes: int
    digest: str | None
    """That it was granted for; None: it is not from us."""
    etag: str


class S3Store:
    """Objects under a prefix of a bucket, which belongs to one run."""

    def __init__(self, access: S3Access, clock: Clock) -> None:
        self._access = access
        self._client = access.client
        self._bucket = access.address.bucket
        self._clock = clock
        self._threads = ThreadPoolExecutor(THREADS_MAX, thread_name_prefix="s3")
        self._locks = [asyncio.Lock() for _ in range(_LOCKS)]
        self._uploads: dict[str, Upload] = {}
        self._read: dict[str, tuple[str, Digest]] = {}
        """ETag and true digest of objects whose content was read, until they are deleted."""

    async def stat(self, key: str) -> StoredObject | None:
        return await self._in_thread(lambda: self._stat(check_key(key)))

    async def wait_until_there(self, keys: Sequence[str], timeout_s: float) -> None:
        """S3 tells nobody what others write."""

    async def grant_read(self, key: str, expires_s: float) -> str:
        params = {"Bucket": self._bucket, "Key": self._access.key(check_key(key))}
        return await self._in_thread(lambda: self._presigned("get_object", params, expires_s))

    async def grant_write(self, ref: ObjectRef, expires_s: float) -> UploadGrant:
        async with self._lock(ref.key):  # or two uploads of one object would begin
            return await self._in_thread(lambda: self._grant_write(ref, expires_s))

    async def complete(self, ref: ObjectRef) -> None:
        async with self._lock(ref.key):
            await self._in_thread(lambda: self._complete(ref))

    async def put_file(self, path: Path, ref: ObjectRef) -> None:
        async with self._lock(ref.key):
            await self._in_thread(lambda: self._put_file(path, ref))

    async def delete_prefix(self, prefix: str) -> None:
        check_prefix(prefix)
        await self._in_thread(lambda: self._delete_prefix(prefix))

    def close(self) -> None:
        """Waits for what is being asked."""
        self._threads.shutdown(wait=True, cancel_futures=True)
        self._client.close()

    async def _in_thread(self, work: Callable[[], ResultT]) -> ResultT:
        def translated() -> ResultT:
            try:
                with self._access.translated():
                    return work()
            except NotThereError as error:
                raise refused(RefusalCode.NOT_FOUND, "the object has been deleted meanwhile") from error

        return await asyncio.get_running_loop().run_in_executor(self._threads, translated)

    def _lock(self, key: str) -> asyncio.Lock:
        return self._locks[hash(key) % _LOCKS]

    # --- what blocks, in threads; each raises botocore's errors, which `_in_thread` translates

    def _stat(self, key: str) -> StoredObject | None:
        head = self._head(key)
        if head is None:
            return None
        if self._access.address.verify == "content":
            return StoredObject(head.size_bytes, self._true_digest(key, head.etag))
        if head.digest is None:
            raise TransportError(f"S3 object {self._access.key(key)} was not written by this run; remove it")
        return StoredObject(head.size_bytes, Digest(head.digest))

    def _head(self, key: str) -> Head | None:
        try:
            with self._access.translated():
                answer = self._client.head_object(Bucket=self._bucket, Key=self._access.key(key))
        except NotThereError:
            return None
        return Head(answer["ContentLength"], answer.get("Metadata", {}).get(_DIGEST), answer["ETag"])

    def _true_digest(self, key: str, etag: str) -> Digest:
        """Reads the object, unless that has been done before."""
        known = self._read.get(key)
        if known is not None and known[0] == etag:
            return known[1]
        hasher = blake3()
        # Of the very version that was looked at.
        answer = self._client.get_object(Bucket=self._bucket, Key=self._access.key(key), IfMatch=etag)
        with closing(answer["Body"]) as body:
            for data in body.iter_chunks(_READ_BYTES):
                hasher.update(data)
        digest = Digest(hasher.hexdigest())
        self._read[key] = (etag, digest)
        return digest

    def _presigned(self, operation: str, params: dict[str, Any], expires_s: float) -> str:
        lifetime_s = min(max(1, int(expires_s - self._clock.now_s())), _URL_S_MAX)
        url: str = self._client.generate_presigned_url(operation, Params=params, ExpiresIn=lifetime_s)
        return url

    def _grant_write(self, ref: ObjectRef, expires_s: float) -> UploadGrant:
        if check_writable(ref, self._stat(check_key(ref.key))):
            return UploadGrant(is_durable=True, part_bytes=ref.size_bytes)
        target = {"Bucket": self._bucket, "Key": self._access.key(ref.key)}
        part_bytes = part_size(ref.size_bytes, self._access.address.part_bytes)
        if ref.size_bytes <= part_bytes:
            headers = ((_DIGEST_HEADER, str(ref.digest)), ("If-None-Match", "*"))
            whole = {**target, "ContentLength": ref.size_bytes, "Metadata": {_DIGEST: ref.digest}, "IfNoneMatch": "*"}
            url = self._presigned("put_object", whole, expires_s)
            return UploadGrant(part_bytes=ref.size_bytes, parts=(PartUrl(index=0, url=url),), headers=headers)
        upload = self._upload_of(ref) or self._begin(ref, part_bytes)
        ranges = part_ranges(ref.size_bytes, upload.part_bytes)
        present = self._parts(ref.key, upload)
        missing = [index for index, part in enumerate(ranges) if present.get(index, ("", -1))[1] != len(part)]
        parts = []
        for index in missing[:PART_URLS_MAX]:
            part = {"UploadId": upload.upload_id, "PartNumber": index + 1, "ContentLength": len(ranges[index])}
            url = self._presigned("upload_part", {**target, **part}, expires_s)
            parts.append(PartUrl(index=index, url=url))
        return UploadGrant(part_bytes=upload.part_bytes, in_parts=True, parts=tuple(parts))

    def _complete(self, ref: ObjectRef) -> None:
        if check_writable(ref, self._stat(check_key(ref.key))):
            return
        upload = self._upload_of(ref)
        ranges = [] if upload is None else part_ranges(ref.size_bytes, upload.part_bytes)
        present = {} if upload is None else self._parts(ref.key, upload)
        sizes = [present.get(index, ("", -1))[1] for index in range(len(ranges))]
        if upload is None or sizes != [len(part) for part in ranges]:
            raise refused(RefusalCode.NOT_FOUND, f"parts of {ref.key} are missing; ask for them again")
        parts = [{"PartNumber": index + 1, "ETag": present[index][0]} for index in range(len(ranges))]
        self._client.complete_multipart_upload(
            Bucket=self._bucket,
            Key=self._access.key(ref.key),
            UploadId=upload.upload_id,
            MultipartUpload={"Parts": parts},
        )
        if (head := self._head(ref.key)) is None or head.size_bytes != ref.size_bytes:
            raise TransportError(f"S3 object {self._access.key(ref.key)} is not there after its upload: {head}")
        self._forget_upload(ref.key)
        if self._stat(ref.key) != StoredObject(ref.size_bytes, ref.digest):
            # Only its owner can have written it; now it may write it anew.
            self._client.delete_object(Bucket=self._bucket, Key=self._access.key(ref.key))
            self._read.pop(ref.key, None)
            raise refused(RefusalCode.DIGEST_MISMATCH, f"the parts of {ref.key} are not what its digest says")

    def _put_file(self, path: Path, ref: ObjectRef) -> None:
        if check_writable(ref, self._stat(check_key(ref.key))):
            return
        metadata = {"Metadata": {_DIGEST: ref.digest}}
        self._client.upload_file(str(path), self._bucket, self._access.key(ref.key), ExtraArgs=metadata)
        check_writable(ref, self._stat(ref.key))

    # --- unfinished uploads

    def _upload_of(self, ref: ObjectRef) -> Upload | None:
        """The unfinished upload of these very bytes, also one that an earlier process began."""
        upload = self._uploads.get(ref.key) or self._read_note(ref.key)
        if upload is None:
            return None
        if (upload.digest, upload.size_bytes) != (ref.digest, ref.size_bytes):
            self._abort(ref.key, upload)
            return None
        self._uploads[ref.key] = upload
        try:
            with self._access.translated():
                self._client.list_parts(
                    Bucket=self._bucket, Key=self._access.key(ref.key), UploadId=upload.upload_id, MaxParts=1
                )
        except NotThereError:  # the bucket has dropped it
            self._forget_upload(ref.key)
            return None
        return upload

    def _begin(self, ref: ObjectRef, part_bytes: int) -> Upload:
        answer = self._client.create_multipart_upload(
            Bucket=self._bucket, Key=self._access.key(ref.key), Metadata={_DIGEST: ref.digest}
        )
        upload = Upload(answer["UploadId"], ref.digest, ref.size_bytes, part_bytes)
        self._client.put_object(
            Bucket=self._bucket, Key=self._note_key(ref.key), Body=json.dumps(asdict(upload)).encode()
        )
        self._uploads[ref.key] = upload
        return upload

    def _parts(self, key: str, upload: Upload) -> dict[int, tuple[str, int]]:
        """ETag and size of the parts that are there, by index."""
        pages = self._client.get_paginator("list_parts").paginate(
            Bucket=self._bucket, Key=self._access.key(key), UploadId=upload.upload_id
        )
        return {
            part["PartNumber"] - 1: (part["ETag"], part["Size"]) for page in pages for part in page.get("Parts", ())
        }

    def _abort(self, key: str, upload: Upload) -> None:
        try:
            with self._access.translated():
                self._client.abort_multipart_upload(
                    Bucket=self._bucket, Key=self._access.key(key), UploadId=upload.upload_id
                )
        except NotThereError:
            pass  # it has ended in another way
        self._forget_upload(key)

    def _forget_upload(self, key: str) -> None:
        self._uploads.pop(key, None)
        self._client.delete_object(Bucket=self._bucket, Key=self._note_key(key))

    def _read_note(self, key: str) -> Upload | None:
        try:
            with self._access.translated():
                answer = self._client.get_object(Bucket=self._bucket, Key=self._note_key(key))
        except NotThereError:
            return None
        with closing(answer["Body"]) as body:
            return Upload(**json.loads(body.read(_NOTE_BYTES_MAX)))

    def _note_key(self, key: str) -> str:
        return self._access.key(_UPLOADS + key)

    # --- deleting

    def _delete_prefix(self, prefix: str) -> None:
        for key in [key for key in self._uploads if key.startswith(prefix)]:
            self._uploads.pop(key, None)
        for key in [key for key in self._read if key.startswith(prefix)]:
            self._read.pop(key, None)
        for key, upload_id in self._unfinished(self._access.key(prefix)):
            try:
                with self._access.translated():
                    self._client.abort_multipart_upload(Bucket=self._bucket, Key=key, UploadId=upload_id)
            except NotThereError:
                continue
        for full in (self._access.key(prefix), self._note_key(prefix)):
            keys = list(self._keys(full))
            for start in range(0, len(keys), _DELETED_AT_ONCE):
                objects = [{"Key": key} for key in keys[start : start + _DELETED_AT_ONCE]]
                answer = self._client.delete_objects(Bucket=self._bucket, Delete={"Objects": objects, "Quiet": True})
                if errors := answer.get("Errors"):
                    raise TransportError(f"S3 bucket {self._bucket}: {len(errors)} not deleted, first {errors[0]}")

    def _keys(self, full_prefix: str) -> Iterator[str]:
        pages = self._client.get_paginator("list_objects_v2").paginate(Bucket=self._bucket, Prefix=full_prefix)
        for page in pages:
            for found in page.get("Contents", ()):
                yield found["Key"]

    def _unfinished(self, full_prefix: str) -> list[tuple[str, str]]:
        pages = self._client.get_paginator("list_multipart_uploads").paginate(Bucket=self._bucket, Prefix=full_prefix)
        return [(found["Key"], found["UploadId"]) for page in pages for found in page.get("Uploads", ())]
