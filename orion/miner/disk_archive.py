"""The archive of a real miner: one append-only file for each outer step in its state folder.

Owns the files and nothing else. A file is a row of records, each with its digest: a tensor body with its name, or new
entries of the log with the commitment over them. `persist` appends what waits, the log's record last, and then waits
for the disk (fdatasync) once: so a commitment that was made is readable after any crash of the process or the machine.
Reading stops at the first record that is not whole, and the file is cut after the last record of the log before it.

A folder belongs to one process at a time, one hotkey and one run.
"""

import fcntl
import json
import os
import struct
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from blake3 import blake3
from pydantic import TypeAdapter, ValidationError

from orion.common.errors import ConfigError, DataError
from orion.common.ids import MicrobatchId, Operation
from orion.common.protocol.codec import Body
from orion.common.protocol.messages import Commitment
from orion.common.protocol.records import EvidenceRequest, LogEntry
from orion.miner.archive import Account, KeptLog, account_of, outdated, sides_of
from orion.miner.intake import Intake

_HEAD = struct.Struct("<4sBIQ")
"""Magic, kind, bytes of the name, bytes of the content."""
_MAGIC = b"orn1"
_BODY, _LOG = 1, 2
_DIGEST_BYTES = 32
_NAME_BYTES_MAX = 64 * 1024
_CHUNK_BYTES = 8 * 1024 * 1024
_ENTRIES = TypeAdapter(tuple[LogEntry, ...])


@dataclass(frozen=True, slots=True)
class _Place:
    """Where a body lies in its outer step's file."""

    offset: int
    size_bytes: int


@dataclass(frozen=True, slots=True)
class _Found:
    """A whole record of a file."""

    kind: int
    name: bytes
    content_offset: int
    content_bytes: int
    end: int


class DiskArchive:
    """An archive in a folder. Close it when no thread uses it any more."""

    def __init__(self, folder: Path, bytes_max: int) -> None:
        """Reads what earlier processes left. Raises ConfigError when another one is using the folder or it cannot be
        used, DataError when its files are another version's."""
        self._folder = folder
        self._lock = threading.Lock()
        self._files: dict[int, int] = {}
        self._places: dict[EvidenceRequest, _Place] = {}
        self._logs: dict[int, KeptLog] = {}
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._lock_file: int | None = os.open(folder / "lock", os.O_RDWR | os.O_CREAT, 0o600)
        except OSError as error:
            raise ConfigError(f"cannot use the state folder {folder}: {error.strerror}") from error
        try:
            fcntl.flock(self._lock_file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            os.close(self._lock_file)
            raise ConfigError(f"another process of this miner is using {folder}: end it, or name another") from error
        for path in sorted(folder.glob("*.log")):
            self._read(path)
        self._kept = tuple(self._logs[outer_step] for outer_step in sorted(self._logs))
        self._intake = Intake(bytes_max, {step: self._account(log) for step, log in self._logs.items()})

    def close(self) -> None:
        """Lets go of the folder; the files stay. Once is enough."""
        with self._lock:
            for file in self._files.values():
                os.close(file)
            self._files.clear()
            self._places.clear()
            if self._lock_file is not None:
                os.close(self._lock_file)
                self._lock_file = None

    def discard(self) -> None:
        """Removes everything: the run is over and nobody may ask any more. Nothing can be written afterwards."""
        with self._lock:
            paths = [self._path(outer_step) for outer_step in self._files]
            paths += self._folder.glob("*.error")
        for path in paths:
            path.unlink(missing_ok=True)
        self.close()
        (self._folder / "lock").unlink(missing_ok=True)

    def begin(self, outer_step: int) -> None:
        self._intake.begin(outer_step)

    def add(
        self,
        outer_step: int,
        operation: Operation,
        microbatch_id: MicrobatchId | None = None,
        *,
        came_in: Body | None = None,
        went_out: Body | None = None,
    ) -> None:
        self._intake.add(outer_step, operation, microbatch_id, sides_of(came_in, went_out))

    def persist(self, stage_index: int, entries: Sequence[LogEntry], commitment: Commitment) -> Commitment:
        commitment = self._intake.with_num_kept(commitment)
        outer_step = commitment.outer_step
        try:
            touched = {outer_step: self._file(outer_step)}
            for request, body in self._intake.take().items():
                file = touched[request.outer_step] = self._file(request.outer_step)
                offset = _append(file, _BODY, request.model_dump_json().encode(), body)
                with self._lock:
                    self._places[request] = _Place(offset, body.size_bytes)
            name = json.dumps({"stage_index": stage_index, "commitment": commitment.model_dump(mode="json")}).encode()
            _append(touched[outer_step], _LOG, name, _ENTRIES.dump_json(tuple(entries)))
            for file in touched.values():
                os.fdatasync(file)
            self._forget_old()
        except OSError as error:
            raise DataError(
                f"cannot write to {self._folder}: {error.strerror}; make room, or lower evidence_bytes_max"
            ) from error
        return commitment

    def keep_error(self, outer_step: int, body: Body) -> None:
        path = self._error_path(outer_step)
        try:
            # Whole or not at all: a process may end in the middle.
            with path.with_suffix(".part").open("wb") as file:
                for chunk in body.chunks(_CHUNK_BYTES):
                    file.write(chunk)
                file.flush()
                os.fsync(file.fileno())
            path.with_suffix(".part").replace(path)
            _sync_folder(self._folder)
            steps = {int(kept.stem): kept for kept in self._folder.glob("*.error")}
            for old in outdated(steps):
                steps[old].unlink(missing_ok=True)
        except OSError as error:
            raise DataError(f"cannot write to {self._folder}: {error.strerror}; make room") from error

    def error(self, outer_step: int) -> bytes | None:
        try:
            return self._error_path(outer_step).read_bytes()
        except FileNotFoundError:
            return None

    def get(self, request: EvidenceRequest) -> bytes | None:
        if request.operation is Operation.ENCODE:
            return self.error(request.outer_step)
        with self._lock:
            place, file = self._places.get(request), self._files.get(request.outer_step)
            if place is None or file is None:
                return None
            return os.pread(file, place.size_bytes, place.offset)

    def kept(self) -> tuple[KeptLog, ...]:
        return self._kept

    # --- files --------------------------------------------------------------------------------------------------------

    def _error_path(self, outer_step: int) -> Path:
        return self._folder / f"{outer_step:010d}.error"

    def _path(self, outer_step: int) -> Path:
        return self._folder / f"{outer_step:010d}.log"

    def _file(self, outer_step: int) -> int:
        """The open file of an outer step; a new one's name is made durable at once."""
        with self._lock:
            file = self._files.get(outer_step)
            if file is None:
                file = self._files[outer_step] = os.open(
                    self._path(outer_step), os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o600
                )
                _sync_folder(self._folder)
            return file

    def _forget_old(self) -> None:
        with self._lock:
            too_old = outdated(self._files)
            for old in too_old:
                os.close(self._files.pop(old))
                self._path(old).unlink(missing_ok=True)
            if too_old:
                self._places = {
                    request: place for request, place in self._places.items() if request.outer_step in self._files
                }

    def _account(self, log: KeptLog) -> Account:
        outer_step = log.commitment.outer_step
        sizes_bytes = {
            request: place.size_bytes for request, place in self._places.items() if request.outer_step == outer_step
        }
        return account_of(log, sizes_bytes)

    def _read(self, path: Path) -> None:
        """Takes in one file, and cuts off what was being written when its process ended."""
        places: dict[EvidenceRequest, _Place] = {}
        entries: list[LogEntry] = []
        log: KeptLog | None = None
        end = 0
        file = os.open(path, os.O_RDWR | os.O_APPEND)
        try:
            for found in _records(file):
                if found.kind == _BODY:
                    request = EvidenceRequest.model_validate_json(found.name)
                    places[request] = _Place(found.content_offset, found.content_bytes)
                    continue
                named = json.loads(found.name)
                commitment = Commitment.model_validate_json(json.dumps(named["commitment"]))
                entries += _ENTRIES.validate_json(os.pread(file, found.content_bytes, found.content_offset))
                log = KeptLog(named["stage_index"], tuple(entries), commitment)
                end = found.end
        except (ValidationError, ValueError, KeyError) as error:
            os.close(file)
            raise DataError(f"{path} is not of this version: name another state folder, or remove it") from error
        if log is None:
            os.close(file)
            path.unlink()
            return
        os.ftruncate(file, end)
        self._files[log.commitment.outer_step] = file
        self._logs[log.commitment.outer_step] = log
        self._places |= {request: place for request, place in places.items() if place.offset < end}


def _append(file: int, kind: int, name: bytes, content: Body | bytes) -> int:
    """Writes one record; where its content begins."""
    parts = [content] if isinstance(content, bytes) else list(content.chunks(_CHUNK_BYTES))
    head = _HEAD.pack(_MAGIC, kind, len(name), sum(map(len, parts)))
    offset = os.lseek(file, 0, os.SEEK_END) + len(head) + len(name)
    hasher = blake3()
    for part in (head, name, *parts):
        hasher.update(part)
        _write_all(file, part)
    _write_all(file, hasher.digest())
    return offset


def _write_all(file: int, data: bytes | memoryview) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(file, view) :]


def _records(file: int) -> Iterator[_Found]:
    """The whole records from the beginning, up to the first that is not whole."""
    size_bytes, position = os.fstat(file).st_size, 0
    while position + _HEAD.size <= size_bytes:
        head = os.pread(file, _HEAD.size, position)
        magic, kind, name_bytes, content_bytes = _HEAD.unpack(head)
        content_offset = position + _HEAD.size + name_bytes
        end = content_offset + content_bytes + _DIGEST_BYTES
        if magic != _MAGIC or kind not in (_BODY, _LOG) or name_bytes > _NAME_BYTES_MAX or end > size_bytes:
            return
        name = os.pread(file, name_bytes, position + _HEAD.size)
        hasher = blake3(head + name)
        for start in range(content_offset, end - _DIGEST_BYTES, _CHUNK_BYTES):
            hasher.update(os.pread(file, min(_CHUNK_BYTES, end - _DIGEST_BYTES - start), start))
        if hasher.digest() != os.pread(file, _DIGEST_BYTES, end - _DIGEST_BYTES):
            return
        yield _Found(kind, name, content_offset, content_bytes, end)
        position = end


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
