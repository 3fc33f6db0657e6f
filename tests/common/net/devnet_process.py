"""A development chain as a process of its own, which can be killed and started again."""

import asyncio
import sys
from asyncio.subprocess import PIPE
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

START_S = 60.0


@asynccontextmanager
async def devnet_process(state: Path, port: int) -> AsyncIterator[str]:
    """Its URL; it is killed, without a chance to tidy up, when the block is left."""
    arguments = ["devnet", "--port", str(port), "--block-seconds", "0.05", "--state", str(state)]
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "orion.cli.main", *arguments, stdout=PIPE, stdin=PIPE
    )
    assert process.stdout is not None
    try:
        async with asyncio.timeout(START_S):
            while not (line := (await process.stdout.readline()).decode()).startswith("ws://"):
                assert line, "the chain ended before it served"
        yield line.strip()
    finally:
        process.kill()
        await process.communicate()
