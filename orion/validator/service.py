"""A validator as a process: connects, fetches what it needs, and runs the loop. Builds everything; decides nothing."""

import os
import random
import secrets

import structlog
import torch

from orion.common.clock import Clock, SystemClock
from orion.common.config import RunSpec
from orion.common.ids import Hotkey
from orion.common.net.anchor_loader import AnchorLoader
from orion.common.net.chain import Chain
from orion.common.net.data_client import open_data
from orion.common.net.http import HttpClient
from orion.common.net.ledger_reader import LedgerReader
from orion.common.net.object_client import ObjectClient
from orion.common.net.orchestrator_client import OrchestratorClient
from orion.common.net.retry import RetryPolicy, retrying
from orion.common.net.rpc import RpcClient
from orion.common.offload import OwnThread
from orion.common.protocol.signing import Keypair
from orion.common.train.data import TokenDataset
from orion.common.train.device import compute_dtype, device_named
from orion.validator.bundle import BundleShelf
from orion.validator.config import ValidatorConfig
from orion.validator.core import ValidatorCore
from orion.validator.hands import Hands
from orion.validator.loop import ValidatorLoop

_START = RetryPolicy(attempts_max=1000, pause_s_max=10.0, total_s_max=600.0)
"""A validator may be started before its orchestrator, and before its hotkey is known there."""

_log = structlog.get_logger("orion.validator")


async def serve(config: ValidatorConfig, keypair: Keypair, chain: Chain, clock: Clock | None = None) -> None:
    """Validates one run until it is finished and the last weights are set; with `follow`, until cancelled.

    `chain` must be able to sign for the keypair's hotkey. Sets the process's niceness and torch's threads. Raises
    ConfigError, DataError, TransportError, RefusedError.
    """
    clock = clock if clock is not None else SystemClock()
    rng = random.Random(secrets.randbits(128))  # nobody must be able to foresee what is checked
    device = device_named(config.device)
    if config.niceness:
        os.nice(config.niceness)
    torch.set_num_threads(config.num_threads)
    async with HttpClient() as http:
        spec, orchestrator_hotkey = await _run_spec(http, config, rng, clock)
    async with RpcClient(keypair, spec.digest, clock) as rpc:
        orchestrator = OrchestratorClient(rpc, config.orchestrator_url, orchestrator_hotkey)
        tokens = await _open_data(orchestrator, spec, config, rng, clock)
        objects = ObjectClient(orchestrator)
        anchors = AnchorLoader(orchestrator, objects, spec)
        device_thread = OwnThread("replay")
        hands = Hands(
            spec,
            orchestrator,
            rpc,
            anchors,
            chain,
            ledger=LedgerReader(orchestrator, spec, orchestrator_hotkey),
            objects=objects,
            tokens=tokens,
            device=device,
            compute_dtype=compute_dtype(device),
            shelf=None if config.bundle_folder is None else BundleShelf(config.bundle_folder, config.bundle_bytes_max),
            clock=clock,
            on_device=device_thread,
        )
        core = ValidatorCore(spec, rpc.hotkey, rng, config.budget)
        _log.info("validator_started", hotkey=rpc.hotkey, run_id=spec.run_id, device=str(device))
        try:
            await ValidatorLoop(core, hands, orchestrator, clock, config).run()
        finally:
            device_thread.close()
        _log.info("validator_ended", num_checks=core.num_checks, num_failed=core.num_failed)


async def _run_spec(
    http: HttpClient, config: ValidatorConfig, rng: random.Random, clock: Clock
) -> tuple[RunSpec, Hotkey]:
    async def attempt() -> tuple[RunSpec, Hotkey]:
        return await OrchestratorClient.run_spec(http, config.orchestrator_url)

    return await retrying(attempt, rng=rng, clock=clock, policy=_START)


async def _open_data(
    orchestrator: OrchestratorClient, spec: RunSpec, config: ValidatorConfig, rng: random.Random, clock: Clock
) -> TokenDataset:
    async def attempt() -> TokenDataset:
        return await open_data(orchestrator, spec, config.data_folder)

    return await retrying(attempt, rng=rng, clock=clock, policy=_START)
