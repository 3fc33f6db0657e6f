"""A run without one of its safeguards breaks: otherwise the safeguard or the invariant would be decoration."""

from collections.abc import Sequence

import pytest
from dishonest_miners import ForgetfulMiner, LyingReducer

from orion.common.ids import Phase
from orion.miner.flow import Flow
from orion.miner.table import MicrobatchTable
from orion.orchestrator import merge
from orion.orchestrator.events import Ticked
from orion.orchestrator.journal import MemoryJournal, Record
from orion.orchestrator.objects import ObjectBook
from orion.simulator.faults import Fault, FaultKind
from orion.simulator.scenarios import calm
from orion.simulator.simulation import SimulationFailedError, run_scenario
from orion.simulator.swarm import Scenario

SEED = 1
LIAR_SEEDS = range(1, 7)
"""Where the first copy of a partition counts, a liar decides it only where its copy is the first to come."""


def fault(kind: FaultKind, *, strength: float = 0.0, duration_s: float = 3.0) -> Fault:
    """Befalls a miner of stage 1 early in its second train phase."""
    return Fault(kind, 1, 1, Phase.TRAIN, after_s=0.2, duration_s=duration_s, miner=2, other_stage=2, strength=strength)


def test_without_memory_of_what_has_ended_a_late_double_is_taken_again(monkeypatch: pytest.MonkeyPatch) -> None:
    faults = [fault(FaultKind.DUPLICATE, strength=1.0), fault(FaultKind.DELAY, strength=0.8)]
    scenario = calm(inner_steps=4, faults=faults)
    run_scenario(scenario, SEED)
    monkeypatch.setattr(MicrobatchTable, "ended", lambda self, microbatch_id: None)
    with pytest.raises(SimulationFailedError, match="has ended already"):
        run_scenario(scenario, SEED)


def test_without_deadlines_a_microbatch_is_held_too_long(monkeypatch: pytest.MonkeyPatch) -> None:
    scenario = calm(faults=[fault(FaultKind.TWO_WAY_PARTITION, duration_s=40.0)])
    run_scenario(scenario, SEED)
    monkeypatch.setattr(Flow, "_doom", lambda self, moment, item: None)
    with pytest.raises(SimulationFailedError, match=r"2: .* still holds"):
        run_scenario(scenario, SEED)


def test_without_a_look_at_the_store_a_plan_names_what_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    scenario = calm(outer_steps=2, cheats={2: ForgetfulMiner})
    run_scenario(scenario, SEED)
    monkeypatch.setattr(ObjectBook, "is_durable", lambda self, ref: True)
    with pytest.raises(SimulationFailedError, match=r"4: plan .* not durable"):
        run_scenario(scenario, SEED)


def test_without_a_second_equal_copy_a_liar_decides_the_anchor(monkeypatch: pytest.MonkeyPatch) -> None:
    scenario = calm(num_stages=2, replicas=3, outer_steps=1, cheats={4: LyingReducer})
    for seed in LIAR_SEEDS:
        run_scenario(scenario, seed)
    monkeypatch.setattr(merge, "COPIES_TO_SETTLE", 1)
    assert any(_liar_decides(scenario, seed) for seed in LIAR_SEEDS)


def _liar_decides(scenario: Scenario, seed: int) -> bool:
    try:
        run_scenario(scenario, seed)
    except SimulationFailedError as error:
        assert "is not the mean of its contributions" in str(error)
        return True
    return False


def test_without_every_event_in_the_journal_a_restart_leads_elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    scenario = calm(faults=[fault(FaultKind.ORCHESTRATOR_RESTART)])
    run_scenario(scenario, SEED)
    append = MemoryJournal.append

    def forgetful(self: MemoryJournal, records: Sequence[Record]) -> None:
        kept = [record for record in records if not isinstance(record.event, Ticked)]
        append(self, [Record(len(self._rows) + place, record.now_s, record.event) for place, record in enumerate(kept)])

    monkeypatch.setattr(MemoryJournal, "append", forgetful)
    with pytest.raises(SimulationFailedError, match="9: the journal leads to another state"):
        run_scenario(scenario, SEED)
