"""Runs the orchestrator in this process: its run's data prepared, its chain at hand."""

import asyncio
from pathlib import Path

from orion.cli.chain_access import Subnet, open_chain
from orion.cli.resolve import resolve
from orion.common.config import RunSpec
from orion.common.protocol.signing import Keypair
from orion.common.train.data import prepare
from orion.orchestrator.config import OrchestratorConfig
from orion.orchestrator.service import serve


async def run_orchestrator(run_file: Path, config: OrchestratorConfig, keypair: Keypair, subnet: Subnet) -> None:
    """Prepares the run's data where that has not been done, and serves until cancelled."""
    assert config.data_folder is not None, "the command line always names one"
    spec = RunSpec.load(run_file)
    if spec.data_digest is None:
        spec = resolve(spec, await asyncio.to_thread(prepare, spec.data, config.data_folder))
    async with open_chain(subnet) as chain:
        await serve(config, spec, keypair, chain)
