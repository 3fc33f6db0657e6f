"""What a third party needs to repeat a replay that failed: a folder that stands for itself.

Owns the folder's layout and how it is checked again. A bundle holds the run's specification, the commitments, the log
(or its beginning) with the proof, the tensors of the operations, the anchor, the token ids where the stage takes them
from the data, and what was uploaded. Checking it trusts none of these: commitments and bodies must fit the log, and
the replay must fail again. What it cannot show is that the miner made the commitments: for that there is the ledger.
"""

import json
import shutil
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from safetensors.torch import load_file, save_file

from orion.common.config import RunSpec
from orion.common.errors import DataError
from orion.common.ids import Digest, Hotkey, Operation
from orion.common.protocol.codec import encode
from orion.common.protocol.messages import Commitment, Contribution
from orion.common.protocol.records import CommittedLog, LogRequest
from orion.common.train.outer import OuterState, state_digest
from orion.validator.events import ErrorStates, LogProof, ReplayOperation, ReplayResult, ReplayTask, TensorBody
from orion.validator.log_check import Position, log_fault
from orion.validator.replay import TokenSource, replay

_RECORD = "bundle.json"
_ERRORS = "errors.safetensors"


@dataclass(frozen=True, slots=True)
class Confirmation:
    """What checking a bundle again gave."""

    confirms: bool
    finding: str
    """What fails now, or why the bundle shows nothing."""


class BundleShelf:
    """Bundles in one folder, within a budget of bytes: the oldest make room."""

    def __init__(self, folder: Path, bytes_max: int) -> None:
        self._folder = folder
        self._bytes_max = bytes_max

    def keep(
        self,
        task: ReplayTask,
        *,
        state: OuterState,
        uploaded: list[bytearray | None],
        result: ReplayResult,
        spec: RunSpec,
        tokens: TokenSource | None,
        ahead_N: torch.Tensor | None = None,
        errors: ErrorStates | None = None,
    ) -> Path | None:
        """Writes a bundle of what `replay` was given and found; None if it alone exceeds the budget. Raises OSError."""
        folder = self._folder / f"{task.outer_step:08d}-{task.miner}"
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        _write(folder, task, state=state, uploaded=uploaded, ahead_N=ahead_N, result=result, spec=spec, tokens=tokens)
        if errors is not None:
            named = {"before": errors.before_N, "after": errors.after_N}
            save_file({name: error_N for name, error_N in named.items() if error_N is not None}, folder / _ERRORS)
        for old in sorted(self._folder.iterdir()):
            if self._size_bytes() <= self._bytes_max:
                break
            shutil.rmtree(old)
        return folder if folder.exists() else None

    def _size_bytes(self) -> int:
        return sum(path.stat().st_size for path in self._folder.rglob("*") if path.is_file())


def confirm(folder: Path) -> Confirmation:
    """Repeats what a bundle says on this machine's CPU. Raises DataError for a folder that is no bundle."""
    try:
        record = json.loads((folder / _RECORD).read_text())
        spec = RunSpec.parse(record["spec"], str(folder))
        proof = LogProof(
            tuple(Commitment.model_validate_json(json.dumps(each)) for each in record["commitments"]),
            LogRequest.model_validate_json(json.dumps(record["request"])),
            CommittedLog.model_validate_json(json.dumps(record["log"])),
        )
        task, state, ahead_N, uploaded, tokens = _read(folder, record, proof)
        errors = _read_errors(folder)
    except (OSError, KeyError, ValueError) as error:
        raise DataError(f"{folder} is no bundle: {error}") from error
    position = Position(task.stage_index, spec.num_stages)
    fault = log_fault(proof.commitments, proof.request, proof.log, position, spec)
    if fault is not None:
        return Confirmation(False, f"the log is not the committed one: {fault}")
    if (mismatch := _foreign_body(task) or _foreign_error(task, errors)) is not None:
        return Confirmation(False, mismatch)
    result = replay(
        task,
        state,
        spec=spec,
        tokens=tokens,
        device=torch.device("cpu"),
        compute_dtype=torch.float32,
        uploaded=uploaded,
        ahead_N=ahead_N,
        errors=errors,
    )
    return Confirmation(result.failure is not None, result.failure or "the replay passes")


class _KeptTokens:
    """Token ids that a bundle carries."""

    def __init__(self, ids: dict[str, torch.Tensor]) -> None:
        self._ids = ids

    def microbatch(self, run_seed: int, data_id: int) -> npt.NDArray[np.int64]:
        ids_BU: npt.NDArray[np.int64] = self._ids[str(data_id)].numpy()
        return ids_BU


def _write(
    folder: Path,
    task: ReplayTask,
    *,
    state: OuterState,
    uploaded: list[bytearray | None],
    ahead_N: torch.Tensor | None,
    result: ReplayResult,
    spec: RunSpec,
    tokens: TokenSource | None,
) -> None:
    proof = task.proof
    assert proof is not None, "a replay without the log's proof"
    record = {
        "run_digest": spec.digest,
        "spec": spec.model_dump(mode="json"),
        "miner": task.miner,
        "stage_index": task.stage_index,
        "outer_step": task.outer_step,
        "anchor_digest": state_digest(state),
        "commitments": [each.model_dump(mode="json") for each in proof.commitments],
        "request": proof.request.model_dump(mode="json"),
        "log": proof.log.model_dump(mode="json"),
        "num_operations": len(task.operations),
        "contribution": None if task.contribution is None else task.contribution.model_dump(mode="json"),
        "uploaded": [body is not None for body in uploaded],
        "was_late": task.was_late,
        "finding": result.failure,
    }
    bodies = {
        f"{number}/{side}/{name}": tensor.contiguous()
        for number, each in enumerate(task.operations)
        for side, body in (("input", each.input), ("output", each.output))
        if body is not None
        for name, tensor in body.items()
    }
    save_file(bodies, folder / "bodies.safetensors")
    anchor = {"anchor": state.anchor_N.contiguous(), "momentum": state.momentum_N.contiguous()}
    if ahead_N is not None:
        anchor["ahead"] = ahead_N.contiguous()
    save_file(anchor, folder / "anchor.safetensors")
    data_ids = {each.entry.data_id for each in task.operations if each.entry.data_id is not None}
    if task.stage_index == 0 and tokens is not None:
        ids = {str(data_id): torch.from_numpy(tokens.microbatch(spec.seed, data_id)) for data_id in sorted(data_ids)}
        save_file(ids, folder / "tokens.safetensors")
    for index, body in enumerate(uploaded):
        if body is not None:
            (folder / f"uploaded-{index}.safetensors").write_bytes(body)
    (folder / _RECORD).write_text(json.dumps(record, indent=1))


def _read(
    folder: Path, record: dict[str, object], proof: LogProof
) -> tuple[ReplayTask, OuterState, torch.Tensor | None, list[bytearray | None], TokenSource | None]:
    bodies: dict[tuple[int, str], dict[str, torch.Tensor]] = {}
    for key, tensor in load_file(folder / "bodies.safetensors").items():
        number, side, name = key.split("/")
        bodies.setdefault((int(number), side), {})[name] = tensor
    anchor = load_file(folder / "anchor.safetensors")
    outer_step, stage_index = record["outer_step"], record["stage_index"]
    num_operations, there, contribution = record["num_operations"], record["uploaded"], record["contribution"]
    if not isinstance(outer_step, int) or not isinstance(stage_index, int) or not isinstance(num_operations, int):
        raise ValueError("the record names no outer step, stage or number of operations")
    if not isinstance(there, list):
        raise ValueError("the record does not say what was uploaded")
    entries = proof.log.entries[:num_operations]
    task = ReplayTask(
        miner=Hotkey(str(record["miner"])),
        stage_index=stage_index,
        outer_step=outer_step,
        checkpoint=None,
        operations=tuple(
            ReplayOperation(entry, bodies.get((number, "input")), bodies.get((number, "output")))
            for number, entry in enumerate(entries)
        ),
        contribution=None if contribution is None else Contribution.model_validate_json(json.dumps(contribution)),
        was_late=record.get("was_late") is True,
        proof=proof,
    )
    uploaded = [
        bytearray((folder / f"uploaded-{index}.safetensors").read_bytes()) if is_there else None
        for index, is_there in enumerate(there)
    ]
    tokens_file = folder / "tokens.safetensors"
    tokens = _KeptTokens(load_file(tokens_file)) if tokens_file.exists() else None
    state = OuterState(anchor["anchor"], anchor["momentum"], outer_step)
    return task, state, anchor.get("ahead"), uploaded, tokens


def _foreign_body(task: ReplayTask) -> str | None:
    """Which body is not the one that the log names."""
    for number, each in enumerate(task.operations):
        if each.entry.operation in (Operation.FORWARD, Operation.BACKWARD):
            for side, body, digest in (
                ("input", each.input, each.entry.input_digest),
                ("output", each.output, each.entry.output_digest),
            ):
                if _digest(body) != digest:
                    return f"{side} of operation {number} is not what the log names"
    return None


def _read_errors(folder: Path) -> ErrorStates | None:
    if not (folder / _ERRORS).exists():
        return None
    named = load_file(folder / _ERRORS)
    return ErrorStates(named.get("before"), named["after"])


def _foreign_error(task: ReplayTask, errors: ErrorStates | None) -> str | None:
    """Whether the error state is another than was told with the upload. That of the outer step before is shown by the
    public record of its merge, as the contribution is."""
    told = None if task.contribution is None else task.contribution.error_digest
    if errors is not None and encode({"error": errors.after_N}).digest != told:
        return "the error state is not what was told with the upload"
    return None


def _digest(body: TensorBody | None) -> Digest | None:
    return None if body is None else encode(body).digest
