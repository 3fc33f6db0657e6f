"""What must hold in every simulated run after every event, seen from outside the cores.

It owns a record of what really happened (every gradient that entered an accumulator, every tensor that was admitted and
freed, every anchor that was reached) and holds what the cores say against it. It changes nothing. What a core can see
by itself is in its own `check_invariants`, which is called here after each of its events. Claims are numbered as in the
design's list.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

from orion.common.ids import Digest, Hotkey, MicrobatchId, Phase
from orion.common.protocol.messages import LedgerQuery, Manifest, ManifestQuery, Outcome, Report, StageState
from orion.miner import effects as miner_effects
from orion.miner import events as miner_events
from orion.orchestrator.events import Announce, RequestArrived
from orion.simulator.host import Host
from orion.simulator.injector import PHASE_ORDER
from orion.simulator.miner_host import MinerHost
from orion.simulator.orchestrator_host import COMMIT_S, TICK_S, OrchestratorHost
from orion.simulator.swarm import Swarm
from orion.simulator.validator_host import ValidatorHost

OPERATION_S_MAX = 8.0
"""The longest that a job on a slowed device or the reading of a body holds a microbatch beyond its deadline."""


@dataclass(slots=True)
class Truth:
    """What really happened, whatever anybody says."""

    applied: dict[tuple[Hotkey, MicrobatchId], tuple[int, int]] = field(default_factory=dict)
    """Gradients that entered a miner's accumulators: stage and outer step."""
    num_applied: Counter[tuple[Hotkey, int, int]] = field(default_factory=Counter)
    """By miner, stage and outer step."""
    anchors: dict[tuple[int, int], Digest] = field(default_factory=dict)
    """By stage and outer step: what the first replica that got there holds."""


class Invariants:
    """Watches one swarm. Every failed claim is an AssertionError that names it."""

    def __init__(self, swarm: Swarm) -> None:
        self._swarm = swarm
        self._clock = swarm.world.clock
        self.truth = Truth()
        self._standing: dict[MinerHost, tuple[int, int]] = {}
        """The stage and outer step whose anchor each process holds."""
        self._held: dict[tuple[MinerHost, MicrobatchId], float] = {}
        """What each process holds, by since when; the oldest first."""
        self._freed: set[tuple[MinerHost, MicrobatchId]] = set()
        self._orchestrator: OrchestratorHost | None = None
        """The process that was heard of last."""
        self._stages: tuple[StageState, ...] = ()
        """As that process showed them last; empty when it has shown nothing yet."""
        self._places: dict[int, tuple[int, int]] = {}
        """The furthest outer step and phase of each stage."""
        self._manifests: dict[int, list[Manifest]] = {}

    def handled(self, host: Host, event: object, effects: Sequence[object]) -> None:
        """Checks everything that this event can have changed."""
        match host:
            case MinerHost():
                host.core.check_invariants()
                self._miner_handled(host, event, effects)
            case OrchestratorHost():
                host.core.check_invariants()
                self._orchestrator_handled(host, event, effects)
            case ValidatorHost():
                host.core.check_invariants()
        self._check_freed_in_time()
        self._check_deadlines()

    def check_end(self) -> None:
        """What must hold once a run has finished."""
        swarm = self._swarm
        status = swarm.status()
        assert status.finished, "5: the run has not finished"
        ended = status.microbatches_applied + status.microbatches_cancelled
        assert status.microbatches_started == ended, "1: a trip has not ended"
        assert len(swarm.losses()) == status.microbatches_applied, "1: a loss is missing or counted twice"
        for index, miner in swarm.miners.items():
            if miner.is_alive:
                assert miner.worker.num_held == 0, f"2: the engine of miner {index} still holds microbatches"
                assert miner.cache.num_microbatches == 0, f"2: miner {index} still holds tensors"
        self._check_credit(swarm.orchestrator)

    # --- miners -------------------------------------------------------------------------------------------------------

    def _miner_handled(self, host: MinerHost, event: object, effects: Sequence[object]) -> None:
        match event:
            case miner_events.AnchorLoaded(stage_index, outer_step, digest):
                self._stands(host, stage_index, outer_step, digest)
            case miner_events.ApplyEnded(outer_step, digest):
                stage_index, before = self._standing[host]
                assert before == outer_step, f"3: {host.address} applied {outer_step} to the anchor of {before}"
                self._stands(host, stage_index, outer_step + 1, digest)
            case miner_events.ComputeEnded(miner_events.ForwardDone(microbatch_id, _, loss)) if loss is not None:
                self._applied(host, microbatch_id)
            case miner_events.ComputeEnded(miner_events.BackwardDone(microbatch_id, _)):
                self._applied(host, microbatch_id)
        for effect in effects:
            match effect:
                case miner_effects.ReadBody() if isinstance(event, miner_events.ForwardOffered):
                    self._begins_to_hold(host, event.transfer.microbatch_id)
                case miner_effects.Compute(miner_events.Forward(microbatch_id, _)):
                    self._begins_to_hold(host, microbatch_id)
                case miner_effects.FreeTensors(microbatch_id):
                    self._frees(host, microbatch_id)

    def _stands(self, host: MinerHost, stage_index: int, outer_step: int, digest: Digest) -> None:
        """3: all replicas of a stage hold byte-identical anchors."""
        self._standing[host] = (stage_index, outer_step)
        agreed = self.truth.anchors.setdefault((stage_index, outer_step), digest)
        assert digest == agreed, f"3: {host.address} has another anchor of stage {stage_index}, outer step {outer_step}"

    def _applied(self, host: MinerHost, microbatch_id: MicrobatchId) -> None:
        """1: a microbatch is applied at most once on any miner."""
        key = (host.hotkey, microbatch_id)
        assert key not in self.truth.applied, f"1: {host.address} applied microbatch {microbatch_id} twice"
        stage_index, outer_step = self._standing[host]
        self.truth.applied[key] = (stage_index, outer_step)
        self.truth.num_applied[(host.hotkey, stage_index, outer_step)] += 1

    def _begins_to_hold(self, host: MinerHost, microbatch_id: MicrobatchId) -> None:
        key = (host, microbatch_id)
        assert key not in self._freed, f"1: {host.address} took microbatch {microbatch_id} again after it had ended"
        self._held.setdefault(key, self._clock.now_s())

    def _frees(self, host: MinerHost, microbatch_id: MicrobatchId) -> None:
        """1: a microbatch ends exactly once on each miner."""
        key = (host, microbatch_id)
        assert key not in self._freed, f"1: {host.address} ended microbatch {microbatch_id} twice"
        self._freed.add(key)
        self._held.pop(key, None)

    def _check_freed_in_time(self) -> None:
        """2: whatever a microbatch held is freed within its deadline. What a dead process held went with it."""
        limit_s = self._clock.now_s() - self._swarm.scenario.spec.time_limits.microbatch_s - OPERATION_S_MAX
        while self._held:
            (host, microbatch_id), since_s = next(iter(self._held.items()))
            if since_s >= limit_s:
                return
            assert not host.is_alive, f"2: {host.address} still holds microbatch {microbatch_id}"
            del self._held[(host, microbatch_id)]

    # --- the orchestrator ---------------------------------------------------------------------------------------------

    def _orchestrator_handled(self, host: OrchestratorHost, event: object, effects: Sequence[object]) -> None:
        if host is not self._orchestrator:
            if self._orchestrator is not None:
                self._check_replay(self._orchestrator)
            self._orchestrator, self._stages = host, ()
        if isinstance(event, RequestArrived) and isinstance(event.message, Report):
            self._check_ends(event.message)
        if any(isinstance(effect, Announce) for effect in effects):
            self._check_phases(host.stage_states())
            self._check_manifests(host)
            self._check_credit(host)

    def _check_ends(self, report: Report) -> None:
        """1: what is reported as applied was applied on every miner of its path, each in the stage of its place."""
        for end in report.ends:
            if end.outcome is Outcome.APPLIED:
                for stage_index, hotkey in enumerate(end.path):
                    where = self.truth.applied.get((hotkey, end.microbatch_id))
                    assert where is not None and where[0] == stage_index, (
                        f"1: {hotkey} did not apply microbatch {end.microbatch_id} in stage {stage_index}"
                    )

    def _check_phases(self, stages: tuple[StageState, ...]) -> None:
        """3: outer steps and phases only go forward."""
        self._stages = stages
        for stage in stages:
            place = (stage.outer_step, PHASE_ORDER[stage.phase])
            before = self._places.get(stage.stage_index, place)
            assert before <= place, f"3: stage {stage.stage_index} went back from {before} to {place}"
            self._places[stage.stage_index] = place

    def _check_deadlines(self) -> None:
        """6: no phase outlasts its deadline. Nothing is due while nobody is there to see to it."""
        orchestrator = self._swarm.orchestrator
        if not orchestrator.is_alive or orchestrator is not self._orchestrator:
            return
        for stage in self._stages:
            late_s = self._clock.now_s() - stage.deadline_s
            assert late_s <= TICK_S + 2 * COMMIT_S or stage.phase is Phase.DONE, (
                f"6: stage {stage.stage_index} is {late_s:.2f} s past the deadline of {stage.phase}"
            )

    def _check_manifests(self, host: OrchestratorHost) -> None:
        """4: a manifest covers each partition once, names only durable objects, and never changes."""
        for stage_index in range(self._swarm.scenario.spec.num_stages):
            known = self._manifests.setdefault(stage_index, [])
            query = ManifestQuery(stage_index=stage_index, from_outer_step=len(known))
            for manifest in host.core.manifests(query).manifests:
                self._check_manifest(manifest)
                known.append(manifest)

    def _check_manifest(self, manifest: Manifest) -> None:
        where = f"4: manifest of stage {manifest.stage_index}, outer step {manifest.outer_step}"
        covered = [merged.partition_index for merged in manifest.partitions]
        assert covered == list(range(self._swarm.scenario.spec.num_partitions)), f"{where} covers {covered}"
        assert len(set(manifest.contributors)) == len(manifest.contributors), f"{where}: a contributor counts twice"
        for merged in manifest.partitions:
            assert merged.object is None or self._swarm.world.store.is_durable(merged.object), (
                f"{where} names {merged.object}, which is not durable"
            )

    def _check_credit(self, host: OrchestratorHost) -> None:
        """8: nobody is credited for more than it really applied."""
        for record in host.core.ledger(LedgerQuery()).work:
            really = self.truth.num_applied[(record.hotkey, record.stage_index, record.outer_step)]
            assert record.num_microbatches <= really, f"8: {record} is credited, {really} were applied"

    def _check_replay(self, ended: OrchestratorHost) -> None:
        """9: a new process that replays the journal stands where the one that ended stood."""
        fresh = OrchestratorHost(self._swarm.world, self._swarm.journal)
        for record in self._swarm.journal.read():
            if record.sequence == ended.next_sequence:
                break
            fresh.core.handle(record.event, record.now_s)
        assert fresh.core.digest() == ended.core.digest(), "9: the journal leads to another state"
