"""Checkpoints in folders and in an orchestrator's state: found when whole, refused by name when not."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from typer.testing import CliRunner

from orion.cli.main import app
from orion.cli.resume_source import find_checkpoint
from orion.common.config import RunSpec
from orion.common.errors import ConfigError, DataError
from orion.common.ids import DataId, Digest, Hotkey
from orion.common.net.checkpoint_folder import store_start, write_checkpoint
from orion.common.net.directory_store import DirectoryStore
from orion.common.protocol.codec import encode
from orion.common.protocol.entries import (
    CheckpointKept,
    LedgerEntry,
    OuterStepOpened,
    chained,
    entry_to_json,
    first_digest,
)
from orion.common.protocol.keys import checkpoint_key
from orion.common.protocol.messages import CheckpointRef, ObjectRef, RunCheckpoint, RunInfo
from orion.common.protocol.start import continued, whole_start
from orion.common.train.anchor import apply_means, checkpoint_tensors, initial_anchor
from orion.common.train.outer import OuterState, state_digest
from orion.orchestrator.events import Recorded
from orion.orchestrator.ledger_store import LEDGER_FILE, SqliteLedger

HOTKEY = Hotkey("5Miner".ljust(48, "z"))
runner = CliRunner()


@pytest.fixture(scope="module")
def spec() -> RunSpec:
    tree = {
        "run_id": "test",
        "seed": 1,
        "model": {"preset": "nano"},
        "data": {"sequence_length": 16},
        "num_stages": 2,
        "replicas": 1,
        "outer_steps": 4,
        "inner_steps": 1,
        "microbatches_per_step": 1,
    }
    return RunSpec.parse(tree, "test")


def states_at(spec: RunSpec, outer_step: int) -> list[OuterState]:
    states = [initial_anchor(spec, stage_index) for stage_index in range(spec.num_stages)]
    for _ in range(outer_step):
        states = [apply_means(state, [state.anchor_N * 0.01], spec.outer) for state in states]
    return states


def checkpoint_at(spec: RunSpec, outer_step: int) -> tuple[RunCheckpoint, list[bytes]]:
    states = states_at(spec, outer_step)
    bodies = [encode(checkpoint_tensors(state)) for state in states]
    refs = tuple(
        CheckpointRef(
            stage_index=stage_index,
            outer_step=outer_step,
            object=ObjectRef(
                key=checkpoint_key(outer_step, stage_index, HOTKEY), digest=body.digest, size_bytes=body.size_bytes
            ),
            state_digest=state_digest(state),
        )
        for stage_index, (state, body) in enumerate(zip(states, bodies, strict=True))
    )
    checkpoint = RunCheckpoint(outer_step=outer_step, next_data_id=DataId(7 * outer_step), stages=refs)
    return checkpoint, [body.tobytes() for body in bodies]


@pytest.fixture(scope="module")
def folder(spec: RunSpec, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of outer step 2."""
    folder = tmp_path_factory.mktemp("checkpoint")
    write_checkpoint(folder, spec, *checkpoint_at(spec, 2))
    return folder


@pytest.fixture(scope="module")
def state(spec: RunSpec, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What an orchestrator leaves that was killed in outer step 3."""
    state = tmp_path_factory.mktemp("run") / "state"
    run_info = RunInfo(orchestrator=HOTKEY, spec=spec.model_dump(mode="json"))
    facts: list[OuterStepOpened | CheckpointKept] = [OuterStepOpened(outer_step=0)]
    for outer_step in (1, 2, 3):
        checkpoint, bodies = checkpoint_at(spec, outer_step)
        facts += [OuterStepOpened(outer_step=outer_step), CheckpointKept(checkpoint=checkpoint)]
        for ref, body in zip(checkpoint.stages, bodies, strict=True):
            path = state / "store" / "objects" / ref.object.key
            path.parent.mkdir(parents=True)
            path.write_bytes(body)
    path.unlink()  # of outer step 3 one stage is not there
    ledger = SqliteLedger(state / LEDGER_FILE, run_info, spec.digest)
    digest: Digest = first_digest(spec.digest)
    for sequence, fact in enumerate(facts):
        entry = entry_to_json(LedgerEntry(sequence=sequence, time_s=1.0, fact=fact))
        digest = chained(digest, entry)
        ledger.append([Recorded(sequence, entry, digest)])
    ledger.close()
    return state


def test_a_checkpoint_folder_gives_back_what_was_written(spec: RunSpec, folder: Path) -> None:
    found = find_checkpoint(folder)
    assert found.spec == spec
    assert found.checkpoint == checkpoint_at(spec, 2)[0]
    assert [path.read_bytes() for path in found.paths] == checkpoint_at(spec, 2)[1]


@pytest.mark.parametrize("place", [lambda state: state, lambda state: state.parent], ids=["state", "run"])
def test_the_state_of_a_killed_orchestrator_is_a_checkpoint_too(
    spec: RunSpec, state: Path, place: Callable[[Path], Path]
) -> None:
    found = find_checkpoint(place(state), 2)
    assert found.checkpoint == checkpoint_at(spec, 2)[0]
    assert [path.read_bytes() for path in found.paths] == checkpoint_at(spec, 2)[1]


def test_what_cannot_be_gone_on_from_is_refused_by_name(state: Path, folder: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no longer in"):
        find_checkpoint(state)
    with pytest.raises(DataError, match="no checkpoint of outer step 9; it has those of 1, 2, 3"):
        find_checkpoint(state, 9)
    with pytest.raises(DataError, match="of outer step 2, not 1"):
        find_checkpoint(folder, 1)
    with pytest.raises(DataError, match="is no checkpoint that a run can go on from"):
        find_checkpoint(tmp_path)
    with pytest.raises(DataError, match="there is no folder"):
        find_checkpoint(tmp_path / "nowhere")


async def test_a_checkpoint_enters_the_store_only_as_the_run_pins_it(
    spec: RunSpec, folder: Path, tmp_path: Path
) -> None:
    found = find_checkpoint(folder)
    going_on = continued(spec, found.spec, found.checkpoint)
    assert going_on.start is not None
    store = DirectoryStore(tmp_path / "store")
    with pytest.raises(ConfigError, match="--from"):
        await store_start(store, going_on, ())
    with pytest.raises(DataError, match="damaged"):
        await store_start(store, going_on, found.paths[::-1])
    await store_start(store, going_on, found.paths)
    for ref in whole_start(going_on.start).stages:
        stored = await store.stat(ref.object.key)
        assert stored is not None and stored.digest == ref.object.digest
    await store_start(store, going_on, ())  # it is there: nothing is needed


def test_export_makes_a_run_s_state_resumable_elsewhere(spec: RunSpec, state: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    arguments = ["export", "--checkpoint", str(state), "--out", str(out), "--outer-step", "2", "--resumable", "--json"]
    result = runner.invoke(app, arguments)
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["layout"] == "resumable"
    assert find_checkpoint(out).checkpoint == checkpoint_at(spec, 2)[0]
    assert (out / "model.safetensors").is_file()
