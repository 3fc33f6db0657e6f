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


def orion(*arguments: object) -> dict[str, object]:
    """What a command says on its last line."""
    command = [sys.executable, "-m", "orion.cli.main", *map(str, arguments), "--json"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    result = subprocess.run(command, capture_output=True, text=True, timeout=WAIT_S, check=False, env=environment)
    assert result.stdout, result.stderr
    answer: dict[str, object] = json.loads(result.stdout.splitlines()[-1])
    return answer


@pytest.fixture(scope="module")
def data_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("data")


async def test_a_run_goes_on_with_fresh_processes_bit_for_bit(tmp_path: Path, data_root: Path) -> None:
    """One microbatch is in flight at a time, so that the order of work follows from the run."""
    spec = small_run(replicas=1, inner_steps=3, flow={"in_flight_max": 1}, validation={"answer_s": 2.0})
    async with running_swarm(tmp_path, data_root, spec) as swarm:
        whole = (await status_when(swarm, lambda status: status.finished)).checkpoint
    assert whole is not None and whole.outer_step == spec.outer_steps == 3

    left = tmp_path / "left"
    arguments = ("--checkpoint", tmp_path / "run", "--out", left, "--outer-step", 1, "--resumable")
    exported = await asyncio.to_thread(orion, "export", *arguments)
    assert exported["layout"] == "resumable"
    gone_on = await asyncio.to_thread(orion, "up", "--from", left, "--folder", tmp_path / "elsewhere")

    assert (gone_on["first_outer_step"], gone_on["outer_steps"]) == (1, 3)
    assert gone_on["microbatches_applied"] == 2 * 3 * 2
    assert gone_on["verdicts_failed"] == 0
    again = read_checkpoint(Path(str(gone_on["checkpoint"]))).checkpoint
    assert whole.outer_step == again.outer_step
    assert whole.next_data_id == again.next_data_id == 3 * 3 * 2, "the data went on where it had stopped"
    assert [ref.state_digest for ref in whole.stages] == [ref.state_digest for ref in again.stages]


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
