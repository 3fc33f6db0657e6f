"""Clients and what servers check with."""

from collections.abc import AsyncIterator

import pytest
from net_loopback import CLIENT_KEY, RUN, SERVER

from orion.common.clock import SystemClock
from orion.common.config import RunSpec
from orion.common.net.gate import Gate
from orion.common.net.rpc import RpcClient
from orion.common.protocol.signing import Verifier


@pytest.fixture
def gate() -> Gate:
    return Gate(Verifier(SERVER), RUN, SystemClock())


@pytest.fixture
async def rpc() -> AsyncIterator[RpcClient]:
    async with RpcClient(CLIENT_KEY, RUN) as client:
        yield client


@pytest.fixture
def spec() -> RunSpec:
    return RunSpec.parse(
        {
            "run_id": "test",
            "seed": 7,
            "model": {"preset": "nano"},
            "data": {"sequence_length": 16, "sequences_per_microbatch": 2},
            "num_stages": 2,
            "replicas": 2,
            "outer_steps": 3,
            "inner_steps": 2,
            "microbatches_per_step": 2,
        },
        "test",
    )
