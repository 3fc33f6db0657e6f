"""Runs that are left and gone on with, in virtual time: what the tests of that share."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from orion.common.config import RunSpec
from orion.common.ids import DataId, Digest
from orion.common.protocol.entries import CheckpointKept, entry_from_json
from orion.common.protocol.messages import RunCheckpoint
from orion.common.protocol.start import continued, start_checkpoint
from orion.miner import events
from orion.simulator.miner_host import MinerHost
from orion.simulator.scenarios import calm
from orion.simulator.simulation import Result, watched
from orion.simulator.swarm import Scenario, Swarm


@dataclass(slots=True)
class Witness:
    """Sees which anchors were reached and which data was leased."""

    anchors: dict[tuple[int, int], Digest] = field(default_factory=dict)
    """By stage and outer step."""
    leased: dict[int, list[DataId]] = field(default_factory=dict)
    """By outer step, in order."""

    def handled(self, host: object, event: object, effects: Sequence[object]) -> None:
        if not isinstance(host, MinerHost):
            return
        match event:
            case events.AnchorLoaded(stage_index, outer_step, digest):
                self.anchors[stage_index, outer_step] = digest
            case events.ApplyEnded(outer_step, digest):
                assert host.core.view is not None
                self.anchors[host.core.view.stage_index, outer_step + 1] = digest
            case events.LeaseGranted(lease):
                data_ids = [granted.data_id for granted in lease.microbatches]
                self.leased.setdefault(lease.outer_step, []).extend(data_ids)


def one_at_a_time(outer_steps: int, num_stages: int = 3) -> Scenario:
    """One replica a stage and one microbatch in flight: the order of all work follows from the run alone, whatever the
    network does."""
    scenario = calm(num_stages=num_stages, replicas=1, outer_steps=outer_steps)
    return replace(scenario, spec=scenario.spec.with_values({"flow.in_flight_max": 1}))


def run(scenario: Scenario, seed: int, stored: dict[str, bytes] | None = None) -> tuple[Swarm, Witness, Result]:
    """A run to its end."""
    swarm, witness = Swarm(scenario, seed, stored or {}), Witness()
    swarm.world.observers.append(witness)
    return swarm, witness, watched(swarm, seed)


def left_behind(scenario: Scenario, seed: int, outer_step: int) -> tuple[Swarm, Witness]:
    """A run of which everything ends, without a word, some time after that outer step has begun."""
    swarm, witness = Swarm(scenario, seed), Witness()
    swarm.world.observers.append(witness)
    swarm.start()
    while newest(swarm) != outer_step or outer_step not in witness.leased:
        assert swarm.world.clock.step()
    return swarm, witness


def kept(swarm: Swarm) -> dict[int, RunCheckpoint]:
    """The checkpoints of the whole model that the public ledger names, by outer step."""
    ledger, found = swarm.orchestrator.ledger, {}
    sequence = 0
    while sequence < ledger.num_entries:
        page = ledger.page(sequence)
        for data in page.entries:
            fact = entry_from_json(data).fact
            if isinstance(fact, CheckpointKept):
                found[fact.checkpoint.outer_step] = fact.checkpoint
        sequence += len(page.entries)
    return found


def newest(swarm: Swarm) -> int | None:
    checkpoint = swarm.status().checkpoint
    return None if checkpoint is None else checkpoint.outer_step


def gone_on(swarm: Swarm, outer_step: int, **changes: object) -> tuple[Scenario, dict[str, bytes]]:
    """The scenario of a run that goes on from that checkpoint, and what lies in its store: nothing else is taken over
    from the old one."""
    left: RunSpec = swarm.scenario.spec
    spec = continued(left.with_values({**changes, "start": None}), left, kept(swarm)[outer_step])
    assert spec.start is not None
    stored = {}
    for ref in kept(swarm)[outer_step].stages:
        body = swarm.world.store.get(ref.object.key)
        assert body is not None, "a checkpoint that the ledger names is in the store"
        stored[start_checkpoint(spec.start, ref.stage_index).object.key] = body
    return replace(swarm.scenario, spec=spec), stored
