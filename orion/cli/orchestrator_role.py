"""Runs the orchestrator in this process: its run's data prepared, its chain at hand."""

import asyncio
from pathlib import Path

from orion.cli.chain_access import Subnet, open_chain
from orion.cli.resolve import resolve
from orion.cli.resume_source import find_checkpoint
from orion.common.config import RunSpec
from orion.common.net.checkpoint_folder import fetched
from orion.common.protocol.signing import Keypair
from orion.common.protocol.start import continued
from orion.common.train.data import prepare
from orion.orchestrator.config import OrchestratorConfig
from orion.orchestrator.service import serve

_FETCHED = "start"
"""Of the state folder: the checkpoint that the run goes on from, where it had to be fetched from a bucket."""


async def run_orchestrator(
    run_file: Path, config: OrchestratorConfig, keypair: Keypair, subnet: Subnet, source: Path | None = None
) -> None:
    """Prepares the run's data where that has not been done, and serves until cancelled.

    `source`: the checkpoint that the run goes on from.
    """
    assert config.data_folder is not None, "the command line always names one"
    spec = RunSpec.load(run_file)
    if spec.data_digest is None:
        spec = resolve(spec, await asyncio.to_thread(prepare, spec.data, config.data_folder))
    if source is not None:
        outer_step = None if spec.start is None else spec.start.outer_step
        found = await asyncio.to_thread(find_checkpoint, source, outer_step)
        if spec.start is None:
            spec = continued(spec, found.spec, found.checkpoint)
        found = await asyncio.to_thread(fetched, found, config.state_folder / _FETCHED)
        config = config.model_copy(update={"start_paths": found.paths})
    async with open_chain(subnet) as chain:
        await serve(config, spec, keypair, chain)
