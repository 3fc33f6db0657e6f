"""Settings every test needs: one compute thread, so that tests beside each other do not starve, and a folder of its own
for the chain metadata that the Bittensor SDK keeps."""

import signal
from collections.abc import Iterator

import pytest
import torch

torch.set_num_threads(1)

# A shell's background jobs ignore Ctrl-C, and so would every process that a test starts there and interrupts.
signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session", autouse=True)
def _chain_metadata(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("BITTENSOR_RUNTIME_CACHE_DIR", str(tmp_path_factory.mktemp("chain-metadata")))
        yield
