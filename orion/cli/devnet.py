"""`orion devnet`: serves the development chain in this process."""

from pathlib import Path

from orion.common.clock import SystemClock
from orion.devnet.config import DevnetConfig
from orion.devnet.server import serve_devnet


async def run_devnet(host: str, port: int, block_seconds: float, state_file: Path | None) -> None:
    """Serves until cancelled; prints the chain's URL when it can be used. Raises ConfigError and DataError."""
    config = DevnetConfig(block_ms=round(block_seconds * 1000))
    async with serve_devnet(host, port, config, SystemClock(), state_file=state_file) as running:
        print(running.url, flush=True)
        await running.beat
