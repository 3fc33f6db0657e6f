"""The SDK keeps metadata in a folder of its own for each test session, and a chain that serves."""

from collections.abc import Iterator

import pytest

from orion.devnet.config import DevnetConfig
from orion.devnet.threaded import devnet_in_thread

BLOCK_MS = 50
"""Short, so that tests wait little; long enough for a block of a busy machine."""


@pytest.fixture(scope="session", autouse=True)
def _runtime_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("BITTENSOR_RUNTIME_CACHE_DIR", str(tmp_path_factory.mktemp("runtime-cache")))
        yield


@pytest.fixture
def devnet_url() -> Iterator[str]:
    """A new chain over a real websocket; a subnet's epoch is 4 blocks long."""
    with devnet_in_thread(DevnetConfig(block_ms=BLOCK_MS, tempo=4, weights_rate_limit=4)) as url:
        yield url
