"""Who may read or write which object now. Pure; the shell turns a yes into signed URLs.

Writing: the object's own miner, while its stage is in the phase that the object belongs to, and what of a late
contribution was announced until the next upload phase closes. Reading: any registered
hotkey, but nobody reads a pseudo-gradient before all of its stage have announced theirs, nor a mean before it stands:
they could be copied.
"""

from orion.common.ids import Hotkey
from orion.common.protocol.keys import ObjectName, parse_key
from orion.common.protocol.messages import (
    CompleteUpload,
    GrantRequest,
    ObjectRef,
    RefusalCode,
    UploadRequest,
)
from orion.common.protocol.refusals import refused
from orion.orchestrator import late
from orion.orchestrator.figures import StageFigures
from orion.orchestrator.stages import Reducing, StageProgress, Uploading
from orion.orchestrator.state import RunState

Question = GrantRequest | UploadRequest | CompleteUpload


def check_grant(state: RunState, hotkey: Hotkey, request: Question) -> None:
    """Raises RefusedError for the first key that the hotkey may not read or write now."""
    if hotkey not in state.memory.permits:
        raise refused(RefusalCode.FORBIDDEN, "this hotkey is not registered on the subnet")
    match request:
        case GrantRequest():
            for key in request.keys:
                _check_read(state, key)
        case UploadRequest():
            for ref in request.objects:
                _check_write(state, hotkey, ref)
        case CompleteUpload():
            # Its parts were written when that was due, and what is made of them is harmless at any time.
            if _name_of(state, request.object.key).hotkey != hotkey:
                raise refused(RefusalCode.FORBIDDEN, f"{request.object.key} is another miner's")


def _name_of(state: RunState, key: str) -> ObjectName:
    name = parse_key(key)
    if name is None or name.stage_index >= state.memory.num_stages:
        raise refused(RefusalCode.NOT_FOUND, f"no object is called {key}")
    return name


def _check_read(state: RunState, key: str) -> None:
    name = _name_of(state, key)
    stage = state.memory.stages[name.stage_index]
    if name.kind == "pseudo-gradient" and _is_secret(stage, name):
        raise refused(RefusalCode.WRONG_PHASE, f"{key} can be read once all contributions are announced")
    if name.kind == "reduced" and _is_unsettled(stage, name):
        raise refused(RefusalCode.WRONG_PHASE, f"{key} can be read once its partition is settled")


def _check_write(state: RunState, hotkey: Hotkey, ref: ObjectRef) -> None:
    name = _name_of(state, ref.key)
    stage = state.memory.stages[name.stage_index]
    if name.hotkey != hotkey:
        raise refused(RefusalCode.FORBIDDEN, f"{ref.key} is another miner's")
    if not _is_late(stage, hotkey, ref, name) and (name.outer_step != stage.outer_step or not _is_due(stage, name)):
        raise refused(RefusalCode.WRONG_PHASE, f"{ref.key} is not to be written now")
    size_bytes_max = _size_bytes_max(state.figures[name.stage_index], name)
    if ref.size_bytes > size_bytes_max:
        raise refused(RefusalCode.TOO_LARGE, f"{ref.key}: at most {size_bytes_max} bytes")


def _is_late(stage: StageProgress, hotkey: Hotkey, ref: ObjectRef, name: ObjectName) -> bool:
    contribution = late.announced(stage, hotkey, name.outer_step)
    return contribution is not None and ref in contribution.objects


def _is_secret(stage: StageProgress, name: ObjectName) -> bool:
    if name.outer_step != stage.outer_step:
        return name.outer_step > stage.outer_step
    return isinstance(stage.activity, Uploading) and stage.activity.partitions is None


def _is_unsettled(stage: StageProgress, name: ObjectName) -> bool:
    if name.outer_step != stage.outer_step:
        return name.outer_step > stage.outer_step
    return isinstance(stage.activity, Reducing) and any(
        partition.partition_index == name.partition_index and partition.outcome is None
        for partition in stage.activity.partitions
    )


def _is_due(stage: StageProgress, name: ObjectName) -> bool:
    match name.kind:
        case "pseudo-gradient":
            return isinstance(stage.activity, Uploading) and name.hotkey in stage.activity.awaited
        case "reduced":
            return isinstance(stage.activity, Reducing) and any(
                partition.partition_index == name.partition_index and name.hotkey in partition.reducers
                for partition in stage.activity.partitions
            )
        case "checkpoint":
            return stage.task is not None and stage.task.hotkey == name.hotkey
        case "start":
            return False


def _size_bytes_max(figures: StageFigures, name: ObjectName) -> int:
    match name.kind:
        case "pseudo-gradient":
            return figures.contribution_bytes_max
        case "reduced":
            return figures.mean_bytes_max
        case "checkpoint" | "start":
            return figures.checkpoint_bytes_max
