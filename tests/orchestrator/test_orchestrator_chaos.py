"""Random days (`bad_days`): after every event the invariants hold; once people behave again the run ends; and the
journal tells it all again. A failure names its seed."""

import random

import pytest
from bad_days import Day

from orion.orchestrator.core import OrchestratorCore
from orion.orchestrator.events import event_from_json, event_to_json

SEEDS = range(6)


@pytest.mark.parametrize("seed", SEEDS)
def test_a_bad_day_breaks_no_invariant_and_the_run_ends(seed: int) -> None:
    day = Day(seed)
    day.pass_by()
    twin = OrchestratorCore(day.world.spec, random.Random(7))
    for now_s, event in day.world.events:
        twin.handle(event_from_json(event_to_json(event)), now_s)
    assert twin.digest() == day.world.core.digest()
