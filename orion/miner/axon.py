"""Publishing on the chain where this miner can be reached. Owns the waiting for it; the miner works meanwhile."""

import asyncio

import structlog

from orion.common.errors import TransportError
from orion.common.net.chain import Chain, ChainError

RETRY_S = 30.0
"""After the chain was not reached."""

_log = structlog.get_logger("orion.miner")


async def publish_axon(chain: Chain, url: str) -> None:
    """Returns once the chain says `url`, or says that it never will: a miner works without it, as its peers know its
    address from the orchestrator. Rate limits are waited out."""
    while True:
        wait_s = await _attempt(chain, url)
        if wait_s is None:
            return
        await asyncio.sleep(wait_s)


async def _attempt(chain: Chain, url: str) -> float | None:
    """Seconds until the next attempt; None = there need be none."""
    try:
        block_s = (await chain.hyperparameters()).block_s
        await chain.serve_axon(url)
    except ChainError as error:
        if error.retry_after_blocks is None:
            _log.error("axon_not_served", url=url, error=str(error))
            return None
        wait_s = error.retry_after_blocks * block_s
        _log.info("axon_postponed", url=url, error=str(error), wait_s=wait_s)
        return wait_s
    except TransportError as error:
        _log.warning("axon_not_served", url=url, error=str(error), retry_s=RETRY_S)
        return RETRY_S
    _log.info("axon_served", url=url)
    return None
