"""What tests of the validator share."""

import pytest
from validator_core_kit import SPEC
from working_miner import WorkingMiner, trained


@pytest.fixture(scope="module")
def honest() -> list[WorkingMiner]:
    """Miners that have done an outer step's work, one in each stage."""
    return trained(SPEC)
