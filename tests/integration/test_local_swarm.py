"""Whole swarms of real processes over real HTTP: what a user runs, and what must not stop it."""

import asyncio
import contextlib
import json
import signal
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import IO

import psutil
import pytest
from swarm_kit import WAIT_S, running_swarm, small_run, status_when

from orion.cli.chain_access import open_chain
from orion.cli.local_subnet import register_more, weights_by_hotkey
from orion.cli.local_swarm import WALLET_HOTKEY, LocalSwarm
from orion.common.ids import Hotkey, MemberState, Phase
from orion.common.net.orchestrator_client import OrchestratorClient
from orion.common.net.rpc import RpcClient
from orion.common.protocol.records import (
    Ledger,
    RunStatus,
    WorkRecord,
)
from orion.common.protocol.signing import create_wallet, hotkey_of
from orion.miner.config import MinerConfig

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300), pytest.mark.xdist_group("processes")]

RUN_FILE = """
run_id = "small"
seed = 1
num_stages = 2
replicas = 2
outer_steps = 4
inner_steps = 5
microbatches_per_step = 2
model = { preset = "nano" }
data = { source = "kjv", tokenizer = "bpe:512", sequence_length = 32, sequences_per_microbatch = 4 }
"""


@pytest.fixture(scope="session")
def data_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("data")


def process_named(swarm: LocalSwarm, name: str) -> psutil.Process:
    """The newest of that name."""
    *_, child = (child for child in swarm.children if child.name == name)
    return psutil.Process(child.process.pid)


async def ledger_of(swarm: LocalSwarm) -> Ledger:
    async with RpcClient(swarm.keys.owner, swarm.spec.digest) as rpc:
        return await OrchestratorClient(rpc, swarm.url, hotkey_of(swarm.keys.orchestrator)).ledger(0)


async def work_since(swarm: LocalSwarm, hotkey: Hotkey, outer_step: int) -> WorkRecord:
    """Waits for the first credited work of a miner in that outer step or later: an outer step of so few microbatches
    may end before a newcomer, which neighbours try with care, got one."""
    async with asyncio.timeout(WAIT_S):
        while True:
            for record in (await ledger_of(swarm)).work:
                if record.hotkey == hotkey and record.outer_step >= outer_step:
                    return record
            await asyncio.sleep(0.5)


def up_command(folder: Path, *options: str, more: str = "") -> list[str]:
    """`more` is added to the run file."""
    run_file = folder / "small.toml"
    run_file.write_text(RUN_FILE + more)
    own = [str(run_file), "--folder", str(folder / "orion"), "--json"]
    return [sys.executable, "-m", "orion.cli.main", "up", *own, *options]


def processes_of(folder: Path) -> list[psutil.Process]:
    """Those whose command line names the folder."""
    return [p for p in psutil.process_iter(["cmdline"]) if str(folder) in " ".join(p.info["cmdline"] or [])]


def test_up_trains_checks_itself_and_leaves_no_process_behind(tmp_path: Path) -> None:
    command = up_command(tmp_path, "--compare")
    result = subprocess.run(command, capture_output=True, text=True, timeout=WAIT_S, check=False)
    assert result.returncode == 0, result.stderr
    (line,) = result.stdout.splitlines()
    outcome = json.loads(line)
    assert outcome["anchors_equal"]
    assert outcome["outer_steps"] == 4
    assert outcome["microbatches_applied"] == outcome["microbatches_started"] == 4 * 5 * 2 * 2
    assert outcome["tokens"] == outcome["microbatches_applied"] * 32 * 4
    assert outcome["loss_last"] < outcome["loss_first"]
    assert outcome["heldout_loss"] < outcome["heldout_loss_untrained"]
    assert outcome["heldout_loss_single_process"] < outcome["heldout_loss_untrained"]
    assert outcome["checks"] > 0
    assert outcome["verdicts_failed"] == 0
    assert sum(outcome["chain_weights"].values()) == pytest.approx(1.0)
    assert outcome["incentives"] == pytest.approx(outcome["chain_weights"], abs=1e-3), "one validator, one opinion"
    assert Path(outcome["plot"]).read_bytes().startswith(b"\x89PNG")
    assert (Path(outcome["checkpoint"]) / "model.safetensors").is_file()
    assert processes_of(tmp_path) == []


def test_an_overlapped_swarm_trains_beside_its_merges_and_passes_its_checks(tmp_path: Path) -> None:
    more = 'sync = "overlapped"\nvalidation = { checks_per_outer_step = 2, whole_share = 1.0, answer_s = 5.0 }\n'
    result = subprocess.run(
        up_command(tmp_path, more=more), capture_output=True, text=True, timeout=WAIT_S, check=False
    )
    assert result.returncode == 0, result.stderr
    outcome = json.loads(result.stdout.splitlines()[-1])
    assert outcome["anchors_equal"]
    assert outcome["outer_steps"] == 4
    assert outcome["microbatches_applied"] >= 4 * 5 * 2 * 2
    assert outcome["heldout_loss"] < outcome["heldout_loss_untrained"]
    assert outcome["checks"] > 0
    assert outcome["verdicts_failed"] == 0
    # Every miner went on training while outer steps 0, 1 and 2 were merged, and took the merges in.
    logs = [path.read_text() for path in tmp_path.glob("orion/runs/*/logs/miner-*")]
    assert len(logs) == 4
    assert all(log.count("merged_taken") >= 2 for log in logs)


def until_serving(errors: IO[str]) -> Iterator[str]:
    """Its lines up to the one that says where it serves."""
    for line in errors:
        yield line
        if "still serving at " in line:
            return
    raise AssertionError("it ended before it served")


def test_a_swarm_that_is_kept_reports_first_and_serves_until_it_is_told_to_stop(tmp_path: Path) -> None:
    command = up_command(tmp_path, "--keep", "--steps", "2")
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            assert process.stderr is not None
            outcome = json.loads(process.stdout.readline())
            lines = list(until_serving(process.stderr))
            url = lines[-1].split("still serving at ")[1].split()[0]
            with urllib.request.urlopen(f"{url}/healthz", timeout=WAIT_S) as answer:
                status = answer.status
            process.send_signal(signal.SIGINT)
            process.communicate(timeout=WAIT_S)
        finally:
            process.kill()
    assert outcome["outer_steps"] == 2
    assert "all is well" in "".join(lines)
    assert status == 200
    assert process.returncode == 0
    assert processes_of(tmp_path) == []


def test_comparing_and_keeping_at_once_is_refused_before_anything_starts(tmp_path: Path) -> None:
    command = up_command(tmp_path, "--keep", "--compare")
    result = subprocess.run(command, capture_output=True, text=True, timeout=WAIT_S, check=False)
    assert result.returncode == 1
    assert "choose one of them" in result.stderr
    assert not (tmp_path / "orion").exists()


async def test_a_killed_miner_stops_nobody(tmp_path: Path, data_root: Path) -> None:
    async with running_swarm(tmp_path, data_root, small_run()) as swarm:
        await status_when(swarm, lambda status: status.microbatches_applied >= 4)
        process_named(swarm, "miner-1").send_signal(signal.SIGKILL)
        notices: list[str] = []
        status = await status_when(swarm, lambda status: status.finished, on_notice=notices.append)
    assert any("miner-1 was killed by signal 9" in notice for notice in notices)
    victim = hotkey_of(swarm.keys.miners["miner-1"])
    # Nobody waits for a broken connection, so the run may end before the silence is long enough for GONE.
    words = ("is not waited for", "is gone")
    assert any(victim in notice and any(word in notice for word in words) for notice in status.notices)
    assert status.outer_step == 3
    assert status.anchors_equal
    assert status.microbatches_started == status.microbatches_applied + status.microbatches_cancelled


@pytest.mark.parametrize("phase", [Phase.TRAIN, Phase.MERGE])
async def test_a_killed_orchestrator_goes_on_where_it_was(tmp_path: Path, data_root: Path, phase: Phase) -> None:
    async with running_swarm(tmp_path, data_root, small_run()) as swarm:
        before = await status_when(
            swarm, lambda status: status.outer_step == 1 and any(stage.phase is phase for stage in status.stages)
        )
        process_named(swarm, "orchestrator").send_signal(signal.SIGKILL)
        notices: list[str] = []
        status = await status_when(swarm, lambda status: status.finished, on_notice=notices.append)
    assert "the orchestrator was started again" in notices
    assert status.outer_step == 3
    assert status.started_s == before.started_s
    assert status.microbatches_applied >= before.microbatches_applied
    assert status.anchors_equal


async def test_a_newcomer_is_useful_after_the_next_outer_step(tmp_path: Path, data_root: Path) -> None:
    """A miner is killed and started again: the same hotkey joins anew, fetches the anchor and works."""
    async with running_swarm(tmp_path, data_root, small_run(outer_steps=1000)) as swarm:
        victim = hotkey_of(swarm.keys.miners["miner-0"])

        async def status_when_it_is(state: MemberState) -> RunStatus:
            return await status_when(
                swarm, lambda status: any(m.hotkey == victim and m.state is state for m in status.miners)
            )

        await status_when(swarm, lambda status: status.microbatches_applied >= 4)
        process_named(swarm, "miner-0").send_signal(signal.SIGKILL)
        gone = await status_when_it_is(MemberState.GONE)
        swarm.restart_miner("miner-0")
        active = await status_when_it_is(MemberState.ACTIVE)
        assert active.outer_step > gone.outer_step
        later = await status_when(swarm, lambda status: status.outer_step > active.outer_step)
        work = await work_since(swarm, victim, active.outer_step)
    assert work.num_microbatches > 0
    assert later.anchors_equal


async def test_a_miner_that_is_killed_and_started_again_answers_for_what_it_committed_to(
    tmp_path: Path, data_root: Path
) -> None:
    """It is its stage's only one, so that the run waits for it, and it goes on with its log."""
    rules = {"checks_per_outer_step": 2, "commit_s": 0.1, "replay_ops_max": 200, "answer_s": 100.0}
    limits = {"member_s": 6.0, "transfer_grace_s": 10.0, "train_s": 140.0, "microbatch_s": 20.0}
    spec = small_run(replicas=1, outer_steps=3, inner_steps=16, validation=rules, time_limits=limits)
    share = spec.inner_steps * spec.microbatches_per_step
    async with running_swarm(tmp_path, data_root, spec) as swarm:
        victim = hotkey_of(swarm.keys.miners["miner-1"])
        await status_when(swarm, lambda status: share + 4 <= status.microbatches_applied)
        process = process_named(swarm, "miner-1")
        process.send_signal(signal.SIGKILL)
        killed = await status_when(swarm, lambda status: status.outer_step == 1)
        await asyncio.to_thread(process.wait)
        swarm.restart_miner("miner-1")
        status = await status_when(swarm, lambda status: status.finished)
        assert await swarm.validator_ended(60.0)
        ledger = await ledger_of(swarm)
        log = (tmp_path / "run" / "logs" / "miner-1.log").read_text()
        archive = b"".join(path.read_bytes() for path in (tmp_path / "run" / "state").glob(f"miners/{victim}/*/*1.log"))
    assert killed.microbatches_applied < 2 * share, "it was killed when the outer step was over"
    assert "event=log_found outer_step=1" in log
    assert b'"operation":"begin_anew"' in archive
    assert status.num_verdicts_failed == 0, status.notices
    on_victim = {record.verdict.outer_step for record in ledger.verdicts if record.verdict.miner == victim}
    assert 1 in on_victim, "it was not checked on the outer step in which it was killed"


async def test_a_miner_that_sends_noise_is_caught_and_gets_no_weight(tmp_path: Path, data_root: Path) -> None:
    spec = small_run(outer_steps=5, validation={"checks_per_outer_step": 4, "replay_ops_max": 8})
    async with running_swarm(tmp_path, data_root, spec, num_miners=3) as swarm:
        wallets = tmp_path / "run" / "wallets"
        cheat = create_wallet(wallets, "cheat", WALLET_HOTKEY)
        await register_more(swarm.subnet, swarm.keys.owner_coldkey, cheat)
        config = MinerConfig(
            orchestrator_url=swarm.url,
            data_folder=data_root / spec.data.folder_name(),
            state_folder=tmp_path / "run" / "state" / "cheat",
        )
        script = Path(__file__).with_name("noisy_miner.py")
        process = await asyncio.create_subprocess_exec(
            sys.executable, str(script), config.model_dump_json(), str(wallets), "cheat", WALLET_HOTKEY
        )
        try:
            await status_when(swarm, lambda status: status.finished)
            assert await swarm.validator_ended(60.0)
            ledger = await ledger_of(swarm)
            async with open_chain(swarm.subnet) as chain:
                weights = await weights_by_hotkey(chain, hotkey_of(swarm.keys.validator))
        finally:
            with contextlib.suppress(ProcessLookupError):  # the run is over: it may have left by itself
                process.kill()
            await process.wait()
    failed = {record.verdict.miner for record in ledger.verdicts if not record.verdict.passed}
    assert failed == {cheat}
    assert Hotkey(cheat) not in weights
    assert set(weights) <= {hotkey_of(key) for key in swarm.keys.miners.values()}
    assert len(weights) >= 1
