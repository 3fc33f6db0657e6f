"""A miner as a process: connects, listens, and runs the loop. Builds everything; decides nothing."""

import asyncio
import contextlib
import gc
import os
import random
import secrets
from collections.abc import AsyncIterator, Callable, Coroutine
from functools import partial

import structlog
import torch

from orion.common.clock import Clock, SystemClock
from orion.common.config import RunSpec
from orion.common.errors import ConfigError, TransportError
from orion.common.ids import Hotkey
from orion.common.net.aiohttp_server import serve as serve_app
from orion.common.net.anchor_loader import AnchorLoader
from orion.common.net.chain import Chain
from orion.common.net.data_client import open_data
from orion.common.net.gate import Gate
from orion.common.net.http import HttpClient
from orion.common.net.object_client import TRANSFERS_MAX, ObjectClient
from orion.common.net.orchestrator_client import OrchestratorClient
from orion.common.net.retry import RetryPolicy, retrying
from orion.common.net.rpc import RpcClient
from orion.common.net.state_fetcher import RpcStatePeers
from orion.common.offload import OwnThread
from orion.common.protocol.codec import activation_spec, body_size
from orion.common.protocol.messages import Join
from orion.common.protocol.refusals import RefusedError
from orion.common.protocol.signing import Keypair, Verifier, hotkey_of
from orion.common.train.data import TokenDataset
from orion.common.train.device import compute_dtype, device_named, device_text
from orion.miner.archive import OUTER_STEPS_KEPT
from orion.miner.axon import publish_axon
from orion.miner.boundary_monitor import BoundaryMonitor
from orion.miner.cache import TensorCache, cached_max
from orion.miner.config import MinerConfig
from orion.miner.core import MinerCore
from orion.miner.desk import Desk
from orion.miner.disk_archive import DiskArchive
from orion.miner.hands import Hands
from orion.miner.held_objects import HeldObjects
from orion.miner.loop import MinerLoop
from orion.miner.peer_client import PeerClient
from orion.miner.peer_server import PeerServer
from orion.miner.state_parts import StateParts
from orion.miner.worker import DeviceWorker

_START = RetryPolicy(attempts_max=1000, pause_s_max=5.0, total_s_max=600.0)
"""A miner may be started before its orchestrator."""
_WRITES_MAX = 3
"""Objects or parts written at a time: the first should be there for others while the last are still to be sent, and
the link must not idle whenever this process is busy with something else for a moment."""
_LEAVE_S = 3.0
"""What saying goodbye may take."""
_ANY_ADDRESS = frozenset({"0.0.0.0", "::", ""})

_log = structlog.get_logger("orion.miner")


async def serve(
    config: MinerConfig,
    keypair: Keypair,
    clock: Clock | None = None,
    *,
    chain: Chain | None = None,
    on_listening: Callable[[str], None] | None = None,
    make_worker: Callable[..., DeviceWorker] = DeviceWorker,
) -> None:
    """Takes part in one run until it is over, then leaves; cancelling it leaves too.

    Where this miner can be reached is published on `chain`, which must be able to sign for the keypair's hotkey.
    `make_worker` makes what computes, as the constructor of `DeviceWorker` does.
    `on_listening` is called with this miner's URL once peers are served. Sets torch's threads, and takes what is loaded
    by then out of the garbage collector's sight. Raises ConfigError, DataError, TransportError, RefusedError.
    """
    clock = clock if clock is not None else SystemClock()
    if config.public_url is None and config.host in _ANY_ADDRESS:
        raise ConfigError(f"others cannot reach {config.host}: say with public_url how they do")
    device = device_named(config.device)
    torch.set_num_threads(config.num_threads)
    rng = random.Random(secrets.randbits(128))
    async with HttpClient() as http:
        spec, orchestrator_hotkey = await _run_spec(http, config, rng, clock)
    hotkey = hotkey_of(keypair)
    archive = _open_archive(spec, config, hotkey)
    core = MinerCore(spec, hotkey, rng, archive.kept())
    desk = Desk()
    cache = TensorCache(cached_max(spec.flow.in_flight_max))
    monitor = BoundaryMonitor(rng.getrandbits(63))
    # The same hotkey may have had a process until a moment ago. Nobody asks before this one has joined.
    gate = Gate(Verifier(hotkey, succeeds_at_s=clock.now_s()), spec.digest, clock)
    async with contextlib.AsyncExitStack() as stack:
        rpc = await stack.enter_async_context(RpcClient(keypair, spec.digest, clock))
        stack.callback(archive.close)
        device_thread = OwnThread("device")
        stack.callback(device_thread.close)
        worker = make_worker(
            spec,
            hotkey,
            cache=cache,
            evidence=archive,
            device=device,
            compute_dtype=compute_dtype(device),
            device_memory_bytes=config.device_memory_bytes or _memory_bytes(device),
        )
        server = PeerServer(
            spec, gate, core=core, desk=desk, cache=cache, archive=archive, monitor=monitor, parts=StateParts(worker)
        )
        try:
            port = await stack.enter_async_context(serve_app(server.app, config.host, config.port))
        except OSError as error:
            raise ConfigError(f"cannot listen on {config.host}:{config.port}: {error.strerror}") from error
        url = config.public_url or f"http://{config.host}:{port}"
        orchestrator = OrchestratorClient(rpc, config.orchestrator_url, orchestrator_hotkey)
        # What is large and half there when this process ends is gone on with by the next one.
        downloads = config.state_folder / hotkey / "downloads"
        reading, writing = (
            ObjectClient(orchestrator, transfers_max=transfers_max, folder=downloads, clock=clock)
            for transfers_max in (TRANSFERS_MAX, _WRITES_MAX)
        )
        objects = HeldObjects(reading, writing)
        hands = Hands(
            spec,
            hotkey,
            join=Join(
                url=url,
                device=device_text(device),
                memory_bytes=_memory_bytes(device),
                stage_index=config.stage_index,
            ),
            orchestrator=orchestrator,
            objects=objects,
            anchors=AnchorLoader(orchestrator, objects, spec),
            worker=worker,
            archive=archive,
            open_tokens=partial(_open_data, orchestrator, spec, config, rng, clock),
            on_device=device_thread,
            state_peers=RpcStatePeers(rpc, spec.time_limits.bandwidth_floor_bytes_per_s),
        )
        loop = MinerLoop(
            spec,
            config,
            clock,
            core=core,
            desk=desk,
            hands=hands,
            peers=PeerClient(spec, rpc, cache, clock),
            orchestrator=orchestrator,
            upload_meter=writing.upload_meter,
            download_meter=reading.download_meter,
            worker=worker,
            cache=cache,
            monitor=monitor,
            on_device=device_thread,
        )
        _log.info("miner_started", hotkey=hotkey, url=url, run_id=spec.run_id, device=str(device))
        if on_listening is not None:
            on_listening(url)
        if chain is not None:
            await stack.enter_async_context(_in_background(publish_axon(chain, url)))
        # Modules and parts live as long as the process: walking over them costs pauses, and seconds at the end.
        gc.freeze()
        try:
            await loop.run()
            if core.run_is_over:
                # The peer server stays up: validators ask about the last outer step now.
                await asyncio.sleep(spec.validation.answer_s)
                archive.discard()
        finally:
            if core.view is not None and not core.run_is_over:
                await _leave(orchestrator)
        _log.info("miner_ended", num_applied=core.num_applied)


def _open_archive(spec: RunSpec, config: MinerConfig, hotkey: Hotkey) -> DiskArchive:
    """This miner's logs of the run. Raises ConfigError when the budget does not even hold what every check needs."""
    body_bytes = body_size(activation_spec(spec, 1)) if spec.num_stages > 1 else 0
    needed_bytes = OUTER_STEPS_KEPT * spec.evidence_operations_min * 2 * body_bytes
    if config.evidence_bytes_max < needed_bytes:
        raise ConfigError(
            f"evidence_bytes_max {config.evidence_bytes_max} holds too little to pass a check of this run; "
            f"give at least {needed_bytes}, and {needed_bytes // spec.evidence_operations_min} more for every "
            "operation of an outer step beyond"
        )
    archive = DiskArchive(config.state_folder / hotkey / f"{spec.run_id}-{spec.digest[:16]}", config.evidence_bytes_max)
    for log in archive.kept():
        _log.info("log_found", outer_step=log.commitment.outer_step, num_entries=log.commitment.num_entries)
    return archive


@contextlib.asynccontextmanager
async def _in_background(work: Coroutine[None, None, None]) -> AsyncIterator[None]:
    """Work that goes on while the block runs, at most."""
    task = asyncio.create_task(work)
    try:
        yield
    finally:
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task


async def _run_spec(http: HttpClient, config: MinerConfig, rng: random.Random, clock: Clock) -> tuple[RunSpec, Hotkey]:
    async def attempt() -> tuple[RunSpec, Hotkey]:
        return await OrchestratorClient.run_spec(http, config.orchestrator_url)

    return await retrying(attempt, rng=rng, clock=clock, policy=_START)


async def _open_data(
    orchestrator: OrchestratorClient, spec: RunSpec, config: MinerConfig, rng: random.Random, clock: Clock
) -> TokenDataset:
    async def attempt() -> TokenDataset:
        return await open_data(orchestrator, spec, config.data_folder)

    return await retrying(attempt, rng=rng, clock=clock, policy=_START)


async def _leave(orchestrator: OrchestratorClient) -> None:
    """Says goodbye, so that nobody waits for the silence to be noticed."""
    try:
        async with asyncio.timeout(_LEAVE_S):
            await orchestrator.leave("stopped")
    except (TransportError, RefusedError, TimeoutError) as error:
        _log.warning("leave_not_heard", error=str(error))


def _memory_bytes(device: torch.device) -> int:
    """Memory that the stage is computed in."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
