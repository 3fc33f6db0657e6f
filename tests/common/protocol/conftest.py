"""A small run."""

import pytest

from orion.common.config import RunSpec


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
