"""A failed replay's evidence stands for itself: it is confirmed elsewhere, and whoever alters it confirms nothing."""

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_validator_replay import task_of
from working_miner import CPU, Cheat, Tokens, WorkingMiner, answer_to, make_spec, trained

from orion.common.errors import DataError
from orion.common.train.anchor import initial_anchor
from orion.validator.bundle import BundleShelf, confirm
from orion.validator.events import LogProof
from orion.validator.log_check import request_of
from orion.validator.replay import replay

SPEC = make_spec()
BYTES_MAX = 1 << 30


@pytest.fixture(scope="module")
def poisoner() -> list[WorkingMiner]:
    return trained(SPEC, {0: Cheat(pseudo_gradient=lambda x: -x), 1: Cheat(gradient=lambda x: -x)})


def keep(miner: WorkingMiner, folder: Path, bytes_max: int = BYTES_MAX) -> Path | None:
    commitments = miner.commitments()
    request = request_of(commitments, len(miner.entries))
    proof = LogProof(commitments, request, answer_to(request, miner.entries))
    task = dataclasses.replace(task_of(miner), proof=proof, contribution=miner.contribution())
    state = initial_anchor(SPEC, miner.stage_index)
    uploaded: list[bytearray | None] = [*miner.pseudo_gradient_bodies()]
    result = replay(task, state, spec=SPEC, tokens=Tokens(), device=CPU, compute_dtype=torch.float32, uploaded=uploaded)
    shelf = BundleShelf(folder, bytes_max)
    return shelf.keep(task, state=state, uploaded=uploaded, result=result, spec=SPEC, tokens=Tokens())


@pytest.mark.parametrize(("stage_index", "finding"), [(0, "pseudo-gradient"), (1, "backward")])
def test_a_failed_replay_is_confirmed_elsewhere(
    poisoner: list[WorkingMiner], tmp_path: Path, stage_index: int, finding: str
) -> None:
    bundle = keep(poisoner[stage_index], tmp_path)
    assert bundle is not None
    found = confirm(bundle)
    assert found.confirms and finding in found.finding
    assert found.finding == json.loads((bundle / "bundle.json").read_text())["finding"]


def test_an_honest_miner_cannot_be_accused_with_its_own_log(poisoner: list[WorkingMiner], tmp_path: Path) -> None:
    bundle = keep(poisoner[2], tmp_path)
    assert bundle is not None
    assert not confirm(bundle).confirms


def test_a_body_that_the_log_does_not_name_confirms_nothing(poisoner: list[WorkingMiner], tmp_path: Path) -> None:
    bundle = keep(poisoner[1], tmp_path)
    assert bundle is not None
    bodies = load_file(bundle / "bodies.safetensors")
    name = next(name for name in bodies if name.endswith("/g"))
    save_file({**bodies, name: bodies[name] + 1}, bundle / "bodies.safetensors")
    found = confirm(bundle)
    assert not found.confirms and "not what the log names" in found.finding


def test_another_log_than_the_committed_one_confirms_nothing(poisoner: list[WorkingMiner], tmp_path: Path) -> None:
    bundle = keep(poisoner[1], tmp_path)
    assert bundle is not None
    record = json.loads((bundle / "bundle.json").read_text())
    record["log"]["entries"][0]["data_id"] += 1
    (bundle / "bundle.json").write_text(json.dumps(record))
    found = confirm(bundle)
    assert not found.confirms and "committed" in found.finding


def test_what_is_no_bundle_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no bundle"):
        confirm(tmp_path)


def test_the_oldest_make_room(poisoner: list[WorkingMiner], tmp_path: Path) -> None:
    first = keep(poisoner[0], tmp_path)
    assert first is not None
    size_bytes = sum(path.stat().st_size for path in first.iterdir())
    assert keep(poisoner[1], tmp_path, bytes_max=size_bytes // 4) is None
    assert not any(tmp_path.iterdir()), "nothing fits"
