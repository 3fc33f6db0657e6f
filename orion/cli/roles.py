"""Runs one role in this process: builds what its service needs from what the command line said."""

import asyncio
import logging
from pathlib import Path

import structlog

from orion.cli.resolve import resolve
from orion.common.clock import SystemClock
from orion.common.config import RunSpec
from orion.common.errors import ConfigError
from orion.common.ids import Hotkey
from orion.common.net.chain_server import HttpChain, serve_chain
from orion.common.net.memory_chain import ChainLedger
from orion.common.net.rpc import RpcClient
from orion.common.protocol.signing import Keypair
from orion.common.train.data import prepare
from orion.orchestrator.config import OrchestratorConfig
from orion.orchestrator.service import serve as serve_orchestrator
from orion.validator.config import ValidatorConfig
from orion.validator.service import serve as serve_validator


def log_lines() -> None:
    """One line per log event on standard output, in key=value form."""
    structlog.configure(
        processors=[
            structlog.contextvars.merge_contextvars,
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            structlog.processors.format_exc_info,
            structlog.processors.LogfmtRenderer(key_order=["timestamp", "level", "event"]),
        ],
        wrapper_class=structlog.make_filtering_bound_logger(logging.INFO),
        cache_logger_on_first_use=True,
    )


async def run_chain_stand_in(host: str, port: int, owner: str, stakes: list[str]) -> None:
    """Serves until cancelled. Raises ConfigError for a stake that is not HOTKEY=AMOUNT."""
    ledger = ChainLedger(owner=Hotkey(owner), stakes=dict(_stake(text) for text in stakes))
    async with serve_chain(host, port, ledger, SystemClock()):
        await asyncio.Event().wait()


async def run_orchestrator(run_file: Path, config: OrchestratorConfig, keypair: Keypair, chain_url: str) -> None:
    """Prepares the run's data where that has not been done, and serves until cancelled."""
    assert config.data_folder is not None, "the command line always names one"
    spec = RunSpec.load(run_file)
    if spec.data_digest is None:
        spec = resolve(spec, await asyncio.to_thread(prepare, spec.data, config.data_folder))
    async with RpcClient(keypair, None) as rpc:
        await serve_orchestrator(config, spec, keypair, HttpChain(rpc, chain_url))


async def run_validator(config: ValidatorConfig, keypair: Keypair, chain_url: str) -> None:
    async with RpcClient(keypair, None) as rpc:
        await serve_validator(config, keypair, HttpChain(rpc, chain_url))


def _stake(text: str) -> tuple[Hotkey, float]:
    hotkey, _, amount = text.partition("=")
    try:
        return Hotkey(hotkey), float(amount)
    except ValueError:
        raise ConfigError(f"--stake {text}: say HOTKEY=AMOUNT") from None
