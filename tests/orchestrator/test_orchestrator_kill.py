"""A real process, killed in the middle of a run and started again."""

import asyncio
import random
import sys
from asyncio.subprocess import DEVNULL, PIPE
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

from orchestrator_http import MINER_KEYS, client, make_config
from orchestrator_miner import HttpMiner
from orchestrator_world import make_spec

from orion.common.protocol.records import LossQuery
from orion.orchestrator.core import OrchestratorCore
from orion.orchestrator.journal import SECRET_BYTES, Header
from orion.orchestrator.ledger_store import MemoryLedger
from orion.orchestrator.replay import replay
from orion.orchestrator.sql_journal import SqlJournal

SCRIPT = Path(__file__).with_name("orchestrator_process.py")
SPEC = make_spec(num_stages=1, replicas=1)


@asynccontextmanager
async def killed_in_the_end(folder: Path) -> AsyncIterator[HttpMiner]:
    """A miner of an orchestrator that gets no chance to tidy up."""
    process = await asyncio.create_subprocess_exec(sys.executable, SCRIPT, folder, stdout=DEVNULL, stderr=PIPE)
    try:
        assert process.stderr is not None
        async with asyncio.timeout(60.0):
            url = (await process.stderr.readline()).decode().strip()
        async with client(MINER_KEYS[0], url, SPEC) as api:
            yield HttpMiner(MINER_KEYS[0], SPEC, api)
    finally:
        process.kill()
        await process.wait()


def journaled_core(folder: Path) -> OrchestratorCore:
    address = make_config(folder).journal_address
    journal = SqlJournal(address, Header(SPEC.digest, b"x" * SECRET_BYTES))
    core = OrchestratorCore(SPEC, random.Random(journal.header.derived("draws")))
    replay(core, journal, MemoryLedger(SPEC.digest))
    journal.close()
    return core


async def test_what_was_answered_survives_a_kill_and_the_run_goes_on_to_its_end(tmp_path: Path) -> None:
    async with killed_in_the_end(tmp_path) as miner:
        await miner.join()
        await miner.until(lambda feed: feed.peers[0].state == "active")
        await miner.upload(await miner.train())
        sequence = miner.sequence
    core = journaled_core(tmp_path)
    core.check_invariants()
    assert core.losses(LossQuery()).total == 4
    assert core.phases() == ("merge(0)",) or core.phases() == ("upload(0)",)
    async with killed_in_the_end(tmp_path) as miner:
        miner.sequence = sequence
        await miner.reduce()
        await miner.apply()
        await miner.checkpoint()
        for _ in range(1, SPEC.outer_steps):
            await miner.outer_step()
        await miner.until(lambda feed: feed.finished)
    core = journaled_core(tmp_path)
    assert core.phases() == ("done(3)",)
    assert core.losses(LossQuery()).total == 12
