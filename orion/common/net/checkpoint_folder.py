"""Checkpoints that a run can go on from, as files: beside a model in Orion's layout, or in a run's own state.

Owns where they lie and whether they are whole. A checkpoint folder holds

    resume/run.json          the specification of the run that left it
    resume/checkpoint.json   a `RunCheckpoint`: outer step, next data id, and every stage's digests; written last
    resume/stage-N.safetensors
                             `anchor` and `momentum` of stage N, the very bytes of the object that the digests are of

The state folder of an orchestrator (also of one that was killed) serves as well: its public ledger names the newest
checkpoint of the whole model, and its store holds the objects, or notes the bucket that does. Nothing is changed there.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from blake3 import blake3
from pydantic import ValidationError

from orion.common.config import RunSpec
from orion.common.errors import ConfigError, DataError
from orion.common.net.s3_access import fetch_objects
from orion.common.net.s3_address import parse_s3_address
from orion.common.net.store import ObjectStore
from orion.common.protocol.messages import CheckpointRef, RunCheckpoint
from orion.common.protocol.start import whole_start

RESUME_FOLDER = "resume"
_RUN_FILE, _CHECKPOINT_FILE = "run.json", "checkpoint.json"
_READ_BYTES = 1024 * 1024


@dataclass(frozen=True, slots=True)
class CheckpointFiles:
    """A checkpoint of the whole model on this machine's disk, or what is known of one whose objects lie in a bucket."""

    spec: RunSpec
    """Of the run that left it."""
    checkpoint: RunCheckpoint
    paths: tuple[Path, ...]
    """A file for each stage; none where they are to be fetched first (`fetched`)."""
    store: str | None = None
    """Address of the bucket that holds the stages' objects."""


def fetched(found: CheckpointFiles, folder: Path) -> CheckpointFiles:
    """The same, a file for each stage: below `folder` what lies in a bucket, unless it has been put there before.

    Raises ConfigError when the bucket cannot be read, DataError when an object has been deleted. Blocks.
    """
    if found.store is None:
        return found
    keys = [ref.object.key for ref in found.checkpoint.stages]
    return replace(found, paths=fetch_objects(parse_s3_address(found.store), keys, folder), store=None)


def write_checkpoint(folder: Path, spec: RunSpec, checkpoint: RunCheckpoint, bodies: Sequence[bytes]) -> None:
    """Writes `resume/` into a checkpoint's folder; `bodies` are the stages' objects. Blocks."""
    resume = folder / RESUME_FOLDER
    resume.mkdir(parents=True, exist_ok=True)
    for ref, body in zip(checkpoint.stages, bodies, strict=True):
        if blake3(body).hexdigest() != ref.object.digest:
            raise ValueError(f"the body of stage {ref.stage_index} is not the object of the checkpoint")
        _write(resume / _stage_file(ref.stage_index), body)
    _write(resume / _RUN_FILE, json.dumps(spec.model_dump(mode="json"), indent=1).encode())
    _write(resume / _CHECKPOINT_FILE, checkpoint.model_dump_json(indent=1).encode())


def read_checkpoint(folder: Path) -> CheckpointFiles:
    """What a checkpoint folder holds. Raises DataError when a run cannot go on from it. Blocks."""
    resume = folder / RESUME_FOLDER
    if not (resume / _CHECKPOINT_FILE).is_file():
        raise DataError(
            f"{folder} is no checkpoint that a run can go on from: it has no {RESUME_FOLDER}/{_CHECKPOINT_FILE}; "
            "name the folder `checkpoint` of a run, or the state folder of its orchestrator"
        )
    try:
        spec = RunSpec.load(resume / _RUN_FILE)
        checkpoint = RunCheckpoint.model_validate_json((resume / _CHECKPOINT_FILE).read_bytes())
    except (OSError, ValidationError, ConfigError) as error:
        raise DataError(f"{resume} is damaged: {error}") from error
    return CheckpointFiles(spec, checkpoint, tuple(resume / _stage_file(ref.stage_index) for ref in checkpoint.stages))


def check_file(path: Path, ref: CheckpointRef) -> None:
    """Raises DataError unless the file is the very object that the checkpoint names. Reads it whole; blocks."""
    hasher, size_bytes = blake3(), 0
    try:
        with path.open("rb") as file:
            while piece := file.read(_READ_BYTES):
                hasher.update(piece)
                size_bytes += len(piece)
    except OSError as error:
        raise DataError(
            f"{path}, stage {ref.stage_index} of the checkpoint, cannot be read: {error.strerror}"
        ) from None
    if (hasher.hexdigest(), size_bytes) != (ref.object.digest, ref.object.size_bytes):
        raise DataError(
            f"{path} is not stage {ref.stage_index} of the checkpoint of outer step {ref.outer_step}: damaged"
        )


async def store_start(store: ObjectStore, spec: RunSpec, paths: Sequence[Path]) -> None:
    """Puts the checkpoint that the run goes on from into its store, unless it is there already.

    `paths` are the stages' files; none: all must be there. Raises ConfigError when they are needed and not named,
    DataError when a file is not what the run's specification pins.
    """
    assert spec.start is not None
    for ref in whole_start(spec.start).stages:
        stored = await store.stat(ref.object.key)
        if stored is not None and stored.digest == ref.object.digest:
            continue
        if len(paths) != len(spec.start.stages):
            raise ConfigError(
                f"this run goes on from a checkpoint of outer step {ref.outer_step}: name its folder with --from"
            )
        check_file(paths[ref.stage_index], ref)
        await store.put_file(paths[ref.stage_index], ref.object)


def _stage_file(stage_index: int) -> str:
    return f"stage-{stage_index}.safetensors"


def _write(path: Path, content: bytes) -> None:
    partial = path.with_name(f"{path.name}.partial")
    partial.write_bytes(content)
    partial.replace(path)
