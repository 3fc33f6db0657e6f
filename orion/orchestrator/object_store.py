"""Opens the run's object store: a directory that this process serves itself, or S3."""

import asyncio

from orion.common.clock import Clock
from orion.common.net.directory_store import DirectoryStore
from orion.common.net.object_routes import ObjectRoutes
from orion.common.net.s3_access import open_bucket
from orion.common.net.s3_address import parse_s3_address
from orion.common.net.s3_store import S3Store
from orion.common.net.store import ObjectStore
from orion.common.net.url_signer import UrlSigner
from orion.orchestrator.config import OrchestratorConfig

STORE_NOTE = "store-address"
"""Of a state folder whose objects lie in a bucket: where. An address holds no credentials."""


async def open_store(
    config: OrchestratorConfig, signer: UrlSigner, clock: Clock, owner: str
) -> tuple[ObjectStore, ObjectRoutes | None]:
    """The store, and what serves its objects where that is this process' business. `owner` is this state
    folder's name among all. Raises ConfigError when the bucket cannot be used."""
    if config.store is not None:
        access = await asyncio.to_thread(open_bucket, parse_s3_address(config.store), owner)
        (config.state_folder / STORE_NOTE).write_text(config.store)
        return S3Store(access, clock), None
    (config.state_folder / STORE_NOTE).unlink(missing_ok=True)
    directory = await asyncio.to_thread(DirectoryStore, config.state_folder / "store", signer)
    return directory, ObjectRoutes(directory, signer, clock)
