"""Real swarms that are left and gone on with: from a checkpoint with nothing but it, and in their own folders after
everything was killed."""

import asyncio
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
from swarm_kit import WAIT_S, running_swarm, small_run, status_when

from orion.common.net.checkpoint_folder import read_checkpoint

pytestmark = [pytest.mark.slow, pytest.mark.timeout(400), pytest.mark.xdist_group("processes")]

RUN_FILE = """
run_id = "one-at-a-time"
seed = 1
num_stages = 2
replicas = 1
outer_steps = 3
inner_steps = 3
microbatches_per_step = 2
model = { preset = "nano" }
data = { source = "kjv", tokenizer = "bpe:512", sequence_length = 32, sequences_per_microbatch = 4 }
flow = { in_flight_max = 1 }
"""


def orion(*arguments: object) -> dict[str, object]:
    """What a command says on its last line."""
    command = [sys.executable, "-m", "orion.cli.main", *map(str, arguments), "--json"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    result = subprocess.run(command, capture_output=True, text=True, timeout=WAIT_S, check=False, env=environment)
    assert result.stdout, result.stderr
    answer: dict[str, object] = json.loads(result.stdout.splitlines()[-1])
    return answer


def test_a_run_goes_on_with_fresh_processes_bit_for_bit(tmp_path: Path) -> None:
    """One microbatch is in flight at a time, so that the order of work follows from the run."""
    run_file, home = tmp_path / "run.toml", tmp_path / "orion"
    run_file.write_text(RUN_FILE)
    whole = orion("up", run_file, "--folder", home)
    assert whole["outer_steps"] == 3

    (state,) = (home / "runs").iterdir()
    left = tmp_path / "left"
    exported = orion("export", "--checkpoint", state, "--out", left, "--outer-step", 1, "--resumable")
    assert exported["layout"] == "resumable"
    gone_on = orion("up", "--from", left, "--folder", tmp_path / "elsewhere")

    assert (gone_on["first_outer_step"], gone_on["outer_steps"]) == (1, 3)
    assert gone_on["microbatches_applied"] == 2 * 3 * 2
    before, after = (read_checkpoint(Path(str(outcome["checkpoint"]))).checkpoint for outcome in (whole, gone_on))
    assert before.outer_step == after.outer_step == 3
    assert before.next_data_id == after.next_data_id == 3 * 3 * 2, "the data went on where it had stopped"
    assert [ref.state_digest for ref in before.stages] == [ref.state_digest for ref in after.stages]
    assert gone_on["verdicts_failed"] == 0
    assert gone_on["heldout_loss"] == whole["heldout_loss"]


@pytest.fixture(scope="module")
def data_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("data")


async def test_a_swarm_of_which_everything_was_killed_resumes_from_its_last_outer_step(
    tmp_path: Path, data_root: Path
) -> None:
    spec = small_run(inner_steps=3)
    share = spec.inner_steps * spec.microbatches_per_step * spec.replicas
    async with running_swarm(tmp_path, data_root, spec) as swarm:
        before = await status_when(swarm, lambda status: status.microbatches_applied >= share + 2)
        killed = [child for child in swarm.children if child.name != "chain" and child.process.poll() is None]
        for child in killed:
            psutil.Process(child.process.pid).send_signal(signal.SIGKILL)
        for child in killed:
            await asyncio.to_thread(child.process.wait)
        for name in swarm.keys.miners:
            swarm.restart_miner(name)
        notices: list[str] = []
        status = await status_when(swarm, lambda status: status.finished, on_notice=notices.append)
    assert len(killed) == 1 + 4 + 1
    assert "the orchestrator was started again" in notices
    assert before.outer_step == 1
    assert before.checkpoint is not None and before.checkpoint.outer_step == 1
    assert status.outer_step == spec.outer_steps
    assert status.started_s == before.started_s, "the same run"
    assert status.microbatches_applied <= spec.outer_steps * share, "what was merged before is not trained again"
    assert status.anchors_equal
