"""Puts the orchestrator's parts together and runs them: journal, core, loop, store, HTTP server, metagraph.

Owns start and stop. Whatever ends unasked ends all of it with its error; cancelling `serve` stops it cleanly: requests
that wait are refused, the last commit is finished, the journal is let go.
"""

import asyncio
import contextlib
import random
import secrets
import socket
from collections.abc import Callable, Hashable, Iterator
from functools import partial
from pathlib import Path

import structlog
import uvicorn
from fastapi import FastAPI
from prometheus_client import CollectorRegistry
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from orion.common.clock import Clock, SystemClock
from orion.common.config import RunSpec
from orion.common.errors import ConfigError, TransportError
from orion.common.ids import Hotkey
from orion.common.net.chain import Chain, ChainError
from orion.common.net.checkpoint_folder import store_start
from orion.common.net.gate import Gate
from orion.common.net.http import SERVER_KEEPALIVE_S
from orion.common.net.url_signer import UrlSigner
from orion.common.protocol.messages import RefusalCode, RunInfo
from orion.common.protocol.refusals import refused
from orion.common.protocol.signing import Keypair, Verifier, hotkey_of
from orion.common.train.data_index import INDEX_FILE, dataset_files, read_index
from orion.orchestrator.api import ApiParts, build_app
from orion.orchestrator.config import OrchestratorConfig
from orion.orchestrator.core import OrchestratorCore
from orion.orchestrator.dashboard.live import LivePage
from orion.orchestrator.dashboard.watch import RunWatch
from orion.orchestrator.events import MetagraphUpdated, Neuron
from orion.orchestrator.journal import SECRET_BYTES, Header
from orion.orchestrator.ledger_store import LEDGER_FILE, SqliteLedger
from orion.orchestrator.loop import OrchestratorLoop
from orion.orchestrator.metrics import LoopMetrics, RunCollector, WatchCollector
from orion.orchestrator.object_store import open_store
from orion.orchestrator.sql_journal import SqlJournal

_STOP_S = 3
"""What connections have left to end when the server stops; waiting feeds are answered at once."""
_BACKLOG = 4_096
_RETRY_REGISTRATION_S = 5.0
"""The metagraph is read this often or so."""

_log = structlog.get_logger(__name__)


async def serve(
    config: OrchestratorConfig,
    spec: RunSpec,
    keypair: Keypair,
    chain: Chain,
    *,
    clock: Clock | None = None,
    on_listening: Callable[[str], None] | None = None,
) -> None:
    """Runs the orchestrator until it is cancelled; goes on where its journal ends.

    `on_listening` is called with the base URL once requests are taken. Raises ConfigError when folder or journal belong
    to another run or version, the port is taken, journal or bucket cannot be used or a checkpoint is needed and not
    named, DataError when the prepared data, the checkpoint, journal or ledger is damaged, and whatever ends a part of
    it.
    """
    clock = clock if clock is not None else SystemClock()
    data_files = _data_files(config.data_folder, spec)
    with contextlib.ExitStack() as stack:
        listener = stack.enter_context(contextlib.closing(_listen(config)))
        config.state_folder.mkdir(parents=True, exist_ok=True)
        header = Header(spec.digest, secrets.token_bytes(SECRET_BYTES))
        journal = SqlJournal(config.journal_address, header)
        stack.callback(journal.close)
        run_info = RunInfo(orchestrator=hotkey_of(keypair), spec=spec.model_dump(mode="json"))
        ledger = SqliteLedger(config.state_folder / LEDGER_FILE, run_info, spec.digest)
        stack.callback(ledger.close)
        signer = UrlSigner(journal.header.derived("object urls"))
        owner = journal.header.derived("store owner").hex()
        store, served_objects = await open_store(config, signer, clock, owner)
        stack.callback(store.close)
        if spec.start is not None and journal.next_sequence == 0:
            await store_start(store, spec, config.start_paths)
        registry = CollectorRegistry()
        core = OrchestratorCore(spec, random.Random(journal.header.derived("draws")))
        watch = RunWatch(core)
        loop = OrchestratorLoop(
            core,
            journal,
            ledger,
            store,
            clock,
            metrics=LoopMetrics(registry),
            tick_s=config.tick_s,
            queue_max=config.queue_max,
            snapshot_events=config.snapshot_events,
            watcher=watch,
        )
        page = LivePage(watch, clock)
        stack.callback(page.close)
        connections: Connections = {}
        # Whoever wrote the journal has let go of it, so that it takes no requests any more.
        verifier = Verifier(
            hotkey_of(keypair),
            skew_s_max=config.clock_skew_s,
            succeeds_at_s=clock.now_s() if loop.is_resumed else None,
        )
        registry.register(RunCollector(lambda: loop.core.status(clock.now_s()), lambda: loop.num_queued))
        registry.register(WatchCollector(page))
        app = build_app(
            ApiParts(
                run_info=run_info,
                ledger=ledger,
                loop=loop,
                gate=Gate(verifier, spec.digest, clock, partial(_admit, loop.core)),
                store=store,
                served_objects=served_objects,
                clock=clock,
                grant_s=config.grant_s,
                data_files=data_files,
                registry=registry,
                page=page,
                drop_connection=partial(_drop, connections),
            )
        )
        url = f"http://{config.host}:{listener.getsockname()[1]}"
        _log.info("orchestrator_started", url=url, run_id=spec.run_id, run=spec.digest, phases=loop.core.phases())
        async with asyncio.TaskGroup() as group:
            group.create_task(loop.run())
            group.create_task(_poll_metagraph(loop, chain, config.chain_poll_s))
            group.create_task(
                _serve_http(
                    app,
                    loop=loop,
                    page=page,
                    connections=connections,
                    listener=listener,
                    url=url,
                    on_listening=on_listening,
                )
            )


async def _poll_metagraph(loop: OrchestratorLoop, chain: Chain, poll_s: float) -> None:
    """Tells the core who is registered, whenever that changes. Without the chain, what was known before stands."""
    told: tuple[Neuron, ...] | None = None
    while True:
        try:
            metagraph = await chain.metagraph()
        except (TransportError, ChainError) as error:
            _log.warning("metagraph_not_read", error=str(error))
        else:
            neurons = tuple(
                Neuron(hotkey=neuron.hotkey, validator_permit=neuron.validator_permit) for neuron in metagraph.neurons
            )
            if neurons != told:
                _log.info("metagraph_changed", neurons=len(neurons), block=metagraph.block)
                await loop.post(MetagraphUpdated(neurons=neurons))
                told = neurons
        await asyncio.sleep(poll_s)


def _admit(core: OrchestratorCore, hotkey: Hotkey) -> None:
    """Who is on the subnet may ask; what of it is granted is the core's business."""
    if not core.is_registered(hotkey):
        raise refused(RefusalCode.FORBIDDEN, "this hotkey is not registered on the subnet", _RETRY_REGISTRATION_S)


class _Server(uvicorn.Server):
    """uvicorn without its own handling of signals: stopping is the caller's business."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


Connections = dict[Hashable, asyncio.Transport]
"""Open ones, by the client's address."""


def _drop(connections: Connections, client: Hashable) -> None:
    """Ends a connection without sending what is left: its client does not read."""
    if (transport := connections.get(client)) is not None:
        _log.warning("connection_dropped", client=client)
        transport.abort()


def _watched_protocol(loop: OrchestratorLoop, connections: Connections) -> type[HttpToolsProtocol]:
    """uvicorn's protocol, which also tells when a connection begins and ends, named by its client's address."""

    class WatchedProtocol(HttpToolsProtocol):
        def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
            super().connection_made(transport)
            connections[self.client] = transport
            loop.connection_opened(self.client)

        def connection_lost(self, exc: Exception | None) -> None:
            super().connection_lost(exc)
            connections.pop(self.client, None)
            loop.connection_closed(self.client)

    return WatchedProtocol


async def _serve_http(
    app: FastAPI,
    *,
    loop: OrchestratorLoop,
    page: LivePage,
    connections: Connections,
    listener: socket.socket,
    url: str,
    on_listening: Callable[[str], None] | None,
) -> None:
    server = _Server(
        uvicorn.Config(
            app,
            http=_watched_protocol(loop, connections),
            ws="none",
            lifespan="off",
            log_config=None,
            access_log=False,
            backlog=_BACKLOG,
            timeout_keep_alive=int(SERVER_KEEPALIVE_S),
            timeout_graceful_shutdown=_STOP_S,
        )
    )
    serving = asyncio.create_task(server.serve([listener]))
    if on_listening is not None:
        on_listening(url)  # the socket listens already: whoever comes now is served as soon as the loop turns
    try:
        await asyncio.shield(serving)
    finally:
        page.close()  # whoever listens would hold up the end
        server.should_exit = True
        await serving
    raise RuntimeError("the HTTP server has stopped by itself")


def _listen(config: OrchestratorConfig) -> socket.socket:
    """A listening socket. Raises ConfigError when there can be none."""
    try:
        listener = socket.create_server((config.host, config.port), backlog=_BACKLOG)
        # An answer goes out in two writes; without this, the second would wait for the first one's acknowledgement.
        # asyncio sets it only on sockets that name their protocol; connections inherit it from the listener.
        listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        return listener
    except OSError as error:
        raise ConfigError(
            f"cannot listen on {config.host}:{config.port}: {error.strerror}; choose another port"
        ) from error


def _data_files(folder: Path | None, spec: RunSpec) -> dict[str, Path]:
    """The prepared data's files by name; none without a folder. Raises DataError, or ConfigError for other data."""
    if folder is None:
        return {}
    index = read_index(folder)
    if spec.data_digest is not None and index.digest != spec.data_digest:
        raise ConfigError(f"{folder} holds the data {index.digest}, the run is made for {spec.data_digest}")
    names = [INDEX_FILE, *(file.name for file in dataset_files(index))]
    return {name: folder / name for name in dict.fromkeys(names)}
