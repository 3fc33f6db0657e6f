"""Miners that are killed and started again at any moment: they answer for what they committed to, or fail for it."""

from random import Random

import pytest

from orion.common.ids import Operation, Phase
from orion.common.protocol.records import CommitmentQuery, LedgerQuery, VerdictRecord
from orion.miner.memory_archive import MemoryArchive, MemoryDisk
from orion.simulator.faults import PHASE_SPAN_S, Fault, FaultKind
from orion.simulator.miner_host import EVIDENCE_BYTES_MAX, MinerHost
from orion.simulator.scenarios import calm
from orion.simulator.simulation import watched
from orion.simulator.swarm import Swarm

SEEDS = range(6)
NUM_STAGES, REPLICAS = 3, 2


def restarts(seed: int) -> list[Fault]:
    """One to four restarts at drawn moments, some of them within the same outer step of one miner."""
    rng = Random(f"restarts {seed}")
    faults = []
    for _ in range(1 + seed % 4):
        stage_index = rng.randrange(NUM_STAGES)
        (phase,) = rng.choices([Phase.TRAIN, Phase.UPLOAD, Phase.MERGE], weights=[3, 1, 1])
        faults.append(
            Fault(
                FaultKind.RESTART,
                stage_index,
                rng.randrange(2),
                phase,
                after_s=rng.random() * PHASE_SPAN_S[phase],
                duration_s=rng.choice([0.0, 0.05, 0.2, 1.0, 4.0]),
                miner=REPLICAS * stage_index + rng.randrange(REPLICAS),
            )
        )
    return faults


def swarm_with(faults: list[Fault], seed: int, **fields: object) -> Swarm:
    """A swarm in which every miner is checked in every outer step."""
    scenario = calm(
        num_stages=NUM_STAGES,
        replicas=REPLICAS,
        inner_steps=4,
        checks_per_outer_step=NUM_STAGES * REPLICAS,
        faults=faults,
        **fields,  # type: ignore[arg-type]
    )
    return Swarm(scenario, seed)


def verdicts_on(swarm: Swarm, miner: int) -> list[VerdictRecord]:
    records = swarm.orchestrator.core.ledger(LedgerQuery()).verdicts
    return [record for record in records if record.verdict.miner == swarm.hotkeys[miner]]


@pytest.mark.parametrize("seed", SEEDS)
def test_an_honest_miner_answers_for_what_it_committed_to_whenever_it_is_killed(seed: int) -> None:
    # That no honest miner fails a check is an invariant.
    swarm = swarm_with(restarts(seed), seed)
    result = watched(swarm, seed)
    assert all(record.has_fired for record in result.faults)
    for record in result.faults:
        assert verdicts_on(swarm, record.fault.miner), "who was started again is checked too"
    num_earlier = 0
    for outer_step in range(swarm.scenario.spec.outer_steps):
        for committed in swarm.orchestrator.core.commitments(CommitmentQuery(outer_step=outer_step)).records:
            sizes = [commitment.num_entries for commitment in (*committed.earlier, committed.commitment)]
            assert sizes == sorted(sizes)
            num_earlier += len(committed.earlier)
    assert num_earlier > 0, "they commit while they work"
    assert not any("ignored" in notice for notice in result.status.notices), "nobody contradicted itself"


@pytest.mark.parametrize("stage_index", [0, 2])
def test_the_only_miner_of_a_stage_goes_on_with_its_log(stage_index: int) -> None:
    fault = Fault(
        FaultKind.RESTART, stage_index, 1, Phase.TRAIN, after_s=2.2, duration_s=0.3, miner=stage_index, other_stage=0
    )
    scenario = calm(
        num_stages=NUM_STAGES,
        replicas=1,
        outer_steps=3,
        inner_steps=6,
        checks_per_outer_step=NUM_STAGES,
        faults=[fault],
    )
    swarm = Swarm(scenario, 1)
    result = watched(swarm, 1)
    assert all(record.has_fired for record in result.faults)
    entries = swarm.world.disks[swarm.hotkeys[stage_index]].steps[1].entries
    operations = [entry.operation for entry in entries]
    place = operations.index(Operation.BEGIN_ANEW)
    assert 0 < place < len(operations) - 1, "there is work before and after"
    assert {record.verdict.outer_step for record in verdicts_on(swarm, stage_index)} >= {1}
    (record,) = [
        record
        for record in swarm.orchestrator.core.commitments(CommitmentQuery(outer_step=1)).records
        if record.hotkey == swarm.hotkeys[stage_index]
    ]
    newest = record.commitment
    assert newest.is_final
    assert newest.num_contributed < newest.num_applied, "what was done before enters no pseudo-gradient"


class DiskLess(MinerHost):
    """Begins every process with an empty disk."""

    def make_archive(self) -> MemoryArchive:
        return MemoryArchive(MemoryDisk(), EVIDENCE_BYTES_MAX)


def test_who_loses_its_disk_fails_for_it() -> None:
    victim = 2
    fault = Fault(FaultKind.RESTART, 1, 1, Phase.UPLOAD, after_s=0.05, duration_s=0.1, miner=victim)
    swarm = swarm_with([fault], 1, cheats={victim: DiskLess})
    result = watched(swarm, 1)
    assert all(record.has_fired for record in result.faults)
    failed = [record.verdict for record in verdicts_on(swarm, victim) if not record.verdict.passed]
    assert failed
    assert all("withheld" in verdict.reason for verdict in failed)
    assert result.status.num_verdicts_failed == len(failed), "nobody else is blamed"
