"""An orchestrator as a process of its own: takes a folder, tells its URL on the error stream."""

import asyncio
import sys
from pathlib import Path

from orchestrator_http import make_chain, make_config, orchestrator
from orchestrator_world import make_spec


async def main() -> None:
    spec = make_spec(num_stages=1, replicas=1)
    async with orchestrator(make_config(Path(sys.argv[1])), spec, make_chain()) as url:
        sys.stderr.write(f"{url}\n")
        sys.stderr.flush()
        await asyncio.Event().wait()


if __name__ == "__main__":
    asyncio.run(main())
