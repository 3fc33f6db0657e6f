"""Settings every test needs: one compute thread, so that tests beside each other do not starve, and a folder of its own
for the chain metadata that the Bittensor SDK keeps."""

import gc
import signal
import sys
from collections.abc import Generator, Iterator
from pathlib import Path

import hypothesis
import pytest
import torch
from postgres import PostgresServer, postgres_server
from seaweed import CREDENTIALS, S3Server, s3_server

torch.set_num_threads(1)

# How long an example takes says how busy the machine is, not whether the code is right.
hypothesis.settings.register_profile("untimed", deadline=None)
hypothesis.settings.load_profile("untimed")

# A shell's background jobs ignore Ctrl-C, and so would every process that a test starts there and interrupts.
signal.signal(signal.SIGINT, signal.default_int_handler)


REPETITIVE = ("adversaries", "bench", "numerics", "sim")
"""Folders of tests that run the same code over and over. Tracing them for coverage would double their time, and with it
nearly that of the whole, to count lines that unit tests count already."""


CONNECTED = ("bench", "cli", "common", "devnet", "integration", "miner", "orchestrator", "validator")
"""Folders of tests that open sockets and files, which are looked for after each of them."""


def _folder(item: pytest.Item) -> str:
    return item.path.relative_to(Path(__file__).parent).parts[0]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if _folder(item) in REPETITIVE:
            item.add_marker(pytest.mark.no_cover)


def pytest_collection_finish() -> None:
    gc.collect()
    gc.freeze()  # what has been imported stays; to look through it after each test would take minutes in all


@pytest.hookimpl(wrapper=True)
def pytest_runtest_teardown(item: pytest.Item) -> Generator[None, None, None]:
    """What a test leaves open is said to be its own, not that of a later one in whose middle it happens to be found."""
    yield
    if _folder(item) not in CONNECTED:
        return
    left: list[str] = []
    hook, sys.unraisablehook = sys.unraisablehook, lambda found: left.append(f"{found.exc_value!r} in {found.object!r}")
    try:
        gc.collect()
    finally:
        sys.unraisablehook = hook
    assert not left, f"left to the collector: {'; '.join(left)}"


@pytest.fixture(scope="session", autouse=True)
def _chain_metadata(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("BITTENSOR_RUNTIME_CACHE_DIR", str(tmp_path_factory.mktemp("chain-metadata")))
        yield


@pytest.fixture(scope="session")
def s3(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    """A real S3 server, started by the first test that needs it, and credentials for it in the environment."""
    with pytest.MonkeyPatch.context() as patch, s3_server(tmp_path_factory.mktemp("s3")) as server:
        for name, value in CREDENTIALS.items():
            patch.setenv(name, value)
        for name in ("AWS_PROFILE", "AWS_SESSION_TOKEN"):
            patch.delenv(name, raising=False)
        yield server


@pytest.fixture(scope="session")
def postgres() -> Iterator[PostgresServer]:
    """A real PostgreSQL server, started by the first test that needs it."""
    with postgres_server() as server:
        yield server
