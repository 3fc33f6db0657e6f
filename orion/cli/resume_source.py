"""Where `--from` and `orion export` find a checkpoint of the whole model: a checkpoint folder, or a run's state.

Reads only; an orchestrator may be at work on the state, or have been killed.
"""

from pathlib import Path

from pydantic import ValidationError

from orion.common.config import RunSpec
from orion.common.errors import DataError
from orion.common.net.checkpoint_folder import RESUME_FOLDER, CheckpointFiles, read_checkpoint
from orion.common.protocol.entries import CheckpointKept, entry_from_json
from orion.common.protocol.messages import RunCheckpoint
from orion.orchestrator.ledger_store import LEDGER_FILE, read_ledger_file
from orion.orchestrator.object_store import STORE_NOTE

_KEPT_MARK = b'"kind":"checkpoint_kept"'
_OBJECTS = Path("store", "objects")
"""Of an orchestrator's state folder, as its directory store lays it out: a file for each object, at its key."""


def is_run_state(folder: Path) -> bool:
    """Whether the folder is an orchestrator's state, or that of a run of `orion up`."""
    return not (folder / RESUME_FOLDER).is_dir() and _state_folder(folder) is not None


def find_checkpoint(folder: Path, outer_step: int | None = None) -> CheckpointFiles:
    """The checkpoint in a checkpoint folder, a run's folder or an orchestrator's state folder.

    `outer_step`: of several, that one; None = the newest. What lies in a bucket is still to be fetched. Raises
    DataError. Blocks.
    """
    if not folder.is_dir():
        raise DataError(f"there is no folder {folder}")
    state = None if (folder / RESUME_FOLDER).is_dir() else _state_folder(folder)
    found = read_checkpoint(folder) if state is None else _in_state(state, outer_step)
    if outer_step is not None and found.checkpoint.outer_step != outer_step:
        raise DataError(f"{folder} holds the checkpoint of outer step {found.checkpoint.outer_step}, not {outer_step}")
    return found


def _state_folder(folder: Path) -> Path | None:
    return next((place for place in (folder, folder / "state") if (place / LEDGER_FILE).is_file()), None)


def _in_state(state: Path, outer_step: int | None) -> CheckpointFiles:
    run_info, entries = read_ledger_file(state / LEDGER_FILE)
    kept: dict[int, RunCheckpoint] = {}
    try:
        for data in entries:
            if _KEPT_MARK in data:
                fact = entry_from_json(data).fact
                if isinstance(fact, CheckpointKept):
                    kept[fact.checkpoint.outer_step] = fact.checkpoint
    except ValidationError as error:
        raise DataError(f"{state / LEDGER_FILE} cannot be read: {error}") from error
    if not kept:
        raise DataError(f"the run in {state} has not finished any outer step: there is no checkpoint to go on from")
    wanted = max(kept) if outer_step is None else outer_step
    if wanted not in kept:
        steps = ", ".join(map(str, sorted(kept)))
        raise DataError(f"{state} has no checkpoint of outer step {wanted}; it has those of {steps}")
    spec = RunSpec.parse(dict(run_info.spec), str(state))
    if (state / STORE_NOTE).is_file():
        return CheckpointFiles(spec, kept[wanted], (), store=(state / STORE_NOTE).read_text())
    paths = tuple(state / _OBJECTS / ref.object.key for ref in kept[wanted].stages)
    missing = [path for path in paths if not path.is_file()]
    if missing:
        raise DataError(f"the checkpoint of outer step {wanted} is no longer in {state / _OBJECTS}: {missing[0]}")
    return CheckpointFiles(spec, kept[wanted], paths)
