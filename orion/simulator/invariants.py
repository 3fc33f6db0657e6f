"""What must hold in every simulated run after every event, seen from outside the cores.

It owns a record of what really happened (every gradient that entered an accumulator, every tensor that was admitted and
freed, every anchor that was reached) and holds what the cores say against it. It changes nothing. What a core can see
by itself is in its own `check_invariants`, which is called here after each of its events. Claims are numbered as in the
design's list.
"""

import math
from collections import Counter, defaultdict, deque
from collections.abc import Sequence
from dataclasses import dataclass, field

from orion.common.ids import Digest, Hotkey, MicrobatchId, Outcome, Phase
from orion.common.model.params import stage_num_params
from orion.common.protocol.codec import Body
from orion.common.protocol.messages import (
    Contribution,
    Manifest,
    ManifestQuery,
    MergePlan,
    Report,
    StageState,
)
from orion.common.protocol.records import LedgerQuery, MergeQuery
from orion.common.protocol.reduction import Slice, reduce_partition
from orion.common.train.partition import partition_bounds
from orion.common.train.slice_codec import slice_codec
from orion.miner import effects as miner_effects
from orion.miner import events as miner_events
from orion.orchestrator.events import Announce, RequestArrived
from orion.simulator.host import Host
from orion.simulator.injector import PHASE_ORDER
from orion.simulator.miner_host import MinerHost
from orion.simulator.orchestrator_host import COMMIT_S, TICK_S, OrchestratorHost
from orion.simulator.swarm import Swarm
from orion.simulator.validator_host import ValidatorHost

FREE_SLACK_S = 0.5
"""How long after its deadline a microbatch may be held that nothing is being read or computed for."""


@dataclass(slots=True)
class Truth:
    """What really happened, whatever anybody says."""

    applied: dict[tuple[Hotkey, MicrobatchId], tuple[int, int]] = field(default_factory=dict)
    """Gradients that entered a miner's accumulators: stage and outer step."""
    num_applied: Counter[tuple[Hotkey, int, int]] = field(default_factory=Counter)
    """By miner, stage and outer step."""
    anchors: dict[tuple[int, int], Digest] = field(default_factory=dict)
    """By stage and outer step: what the first replica that got there holds."""
    merged: dict[tuple[Hotkey, int, int], int] = field(default_factory=dict)
    """By miner, stage and outer step of what was uploaded: the outer step whose merge it is part of."""


class Invariants:
    """Watches one swarm. Every failed claim is an AssertionError that names it."""

    def __init__(self, swarm: Swarm) -> None:
        self._swarm = swarm
        self._clock = swarm.world.clock
        self.truth = Truth()
        self._standing: dict[MinerHost, tuple[int, int]] = {}
        """The stage and outer step whose anchor each process holds."""
        self._merged: dict[MinerHost, tuple[int, Digest]] = {}
        """What each process has fetched of a merge and not taken in yet."""
        self._deadlines_s: dict[MicrobatchId, float] = {}
        """Of leased microbatches."""
        self._held: dict[tuple[MinerHost, MicrobatchId], float] = {}
        """What each process holds, and until when it may."""
        self._next_deadline_s = math.inf
        """No later than the earliest of them."""
        self._with_device: defaultdict[MinerHost, deque[MicrobatchId | None]] = defaultdict(deque)
        """What each device was given and has not ended, in order; None for jobs of no microbatch."""
        self._freed: set[tuple[MinerHost, MicrobatchId]] = set()
        self._orchestrator: OrchestratorHost | None = None
        """The process that was heard of last."""
        self._stages: tuple[StageState, ...] = ()
        """As that process showed them last; empty when it has shown nothing yet."""
        self._places: dict[int, tuple[int, int]] = {}
        """The furthest outer step and phase of each stage."""
        self._manifests: dict[int, list[Manifest]] = {}
        self._late: dict[int, tuple[Contribution, ...]] = {}
        """What each stage's newest merge names as late."""
        self._late_there: dict[int, set[Hotkey]] = {}
        """Whose late contribution was whole in the store when each stage's newest upload phase began."""
        self._plans: dict[int, MergePlan] = {}
        """The newest that each stage's reducers were given."""

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
        assert status.anchors_equal, "3: replicas reported different anchors"
        if not swarm.scenario.cheats:
            failed = [notice for notice in status.notices if "failed a check" in notice]
            assert status.num_verdicts_failed == 0, f"8: an honest miner was found guilty: {failed}"
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
                has_gone_on = before == outer_step + 1 and self._swarm.scenario.spec.sync == "overlapped"
                assert before == outer_step or has_gone_on, f"3: {host.address} applied {outer_step} to {before}"
                self._stands(host, stage_index, outer_step + 1, digest)
            case miner_events.MergedFetched(outer_step, digest):
                self._merged[host] = (outer_step, digest)
            case miner_events.LeaseGranted(lease):
                for granted in lease.microbatches:
                    self._deadlines_s[granted.microbatch_id] = lease.deadline_s
            case miner_events.ComputeEnded(result):
                self._with_device[host].popleft()
                self._computed(host, result)
        for effect in effects:
            match effect:
                case miner_effects.ReadBody() if isinstance(event, miner_events.ForwardOffered):
                    self._begins_to_hold(host, event.transfer.microbatch_id, event.transfer.deadline_s)
                case miner_effects.Compute(job):
                    self._gets_job(host, job)
                case miner_effects.FreeTensors(microbatch_id):
                    self._frees(host, microbatch_id)

    def _computed(self, host: MinerHost, result: miner_events.JobResult) -> None:
        match result:
            case miner_events.ForwardDone(microbatch_id, _, loss) if loss is not None:
                self._applied(host, microbatch_id)
            case miner_events.BackwardDone(microbatch_id, _):
                self._applied(host, microbatch_id)
            case miner_events.PseudoGradientEncoded(outer_step, goes_on=True):
                self._goes_on(host, outer_step)
            case miner_events.MergedTaken(outer_step):
                self._takes_merged(host, outer_step)

    def _gets_job(self, host: MinerHost, job: miner_events.Job) -> None:
        match job:
            case miner_events.Forward(microbatch_id) | miner_events.Backward(microbatch_id):
                self._with_device[host].append(microbatch_id)
                if microbatch_id in self._deadlines_s:
                    self._begins_to_hold(host, microbatch_id, self._deadlines_s[microbatch_id])
            case _:
                self._with_device[host].append(None)

    def _stands(self, host: MinerHost, stage_index: int, outer_step: int, digest: Digest) -> None:
        """3: all replicas of a stage hold byte-identical anchors."""
        self._standing[host] = (stage_index, outer_step)
        agreed = self.truth.anchors.setdefault((stage_index, outer_step), digest)
        assert digest == agreed, f"3: {host.address} has another anchor of stage {stage_index}, outer step {outer_step}"

    def _goes_on(self, host: MinerHost, outer_step: int) -> None:
        """Work counts for the next outer step from here on, although the anchor is still that of this one."""
        stage_index, standing = self._standing[host]
        assert standing == outer_step, f"3: {host.address} goes on from {outer_step}, it stands at {standing}"
        self._standing[host] = (stage_index, outer_step + 1)

    def _takes_merged(self, host: MinerHost, outer_step: int) -> None:
        """3: what is added is the anchor that all replicas of the stage agree on."""
        stage_index, standing = self._standing[host]
        assert standing == outer_step + 1, f"3: {host.address} takes in {outer_step}, it stands at {standing}"
        fetched, digest = self._merged.pop(host)
        assert fetched == outer_step, f"3: {host.address} takes in {fetched} for {outer_step}"
        self._stands(host, stage_index, outer_step + 1, digest)

    def _applied(self, host: MinerHost, microbatch_id: MicrobatchId) -> None:
        """1: a microbatch is applied at most once on any miner."""
        key = (host.hotkey, microbatch_id)
        assert key not in self.truth.applied, f"1: {host.address} applied microbatch {microbatch_id} twice"
        stage_index, outer_step = self._standing[host]
        self.truth.applied[key] = (stage_index, outer_step)
        self.truth.num_applied[(host.hotkey, stage_index, outer_step)] += 1

    def _begins_to_hold(self, host: MinerHost, microbatch_id: MicrobatchId, deadline_s: float) -> None:
        key = (host, microbatch_id)
        assert key not in self._freed, f"1: {host.address} took microbatch {microbatch_id} again after it had ended"
        self._held.setdefault(key, deadline_s)
        self._next_deadline_s = min(self._next_deadline_s, deadline_s)

    def _frees(self, host: MinerHost, microbatch_id: MicrobatchId) -> None:
        """1: a microbatch ends exactly once on each miner."""
        key = (host, microbatch_id)
        assert key not in self._freed, f"1: {host.address} ended microbatch {microbatch_id} twice"
        self._freed.add(key)
        self._held.pop(key, None)

    def _check_freed_in_time(self) -> None:
        """2: whatever a microbatch held is freed within its deadline. What a dead process held went with it."""
        due_s = self._clock.now_s() - FREE_SLACK_S
        if due_s <= self._next_deadline_s:
            return
        for (host, microbatch_id), deadline_s in tuple(self._held.items()):
            if not host.is_alive:
                del self._held[(host, microbatch_id)]
            elif due_s > deadline_s and not host.is_stopped:
                assert microbatch_id in self._with_device[host], f"2: {host.address} still holds {microbatch_id}"
        self._next_deadline_s = min(self._held.values(), default=math.inf)

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
            self._note_plans(host)
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
            if before < place and stage.phase is Phase.UPLOAD:
                self._note_late(stage)
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
        """4: a manifest covers each partition once and names only durable objects; they hold the honest means."""
        for stage_index in range(self._swarm.scenario.spec.num_stages):
            known = self._manifests.setdefault(stage_index, [])
            query = ManifestQuery(
                stage_index=stage_index, from_outer_step=self._swarm.scenario.spec.first_outer_step + len(known)
            )
            for manifest in host.core.manifests(query).manifests:
                self._check_manifest(manifest)
                self._check_uploads(host, manifest)
                known.append(manifest)

    def _check_manifest(self, manifest: Manifest) -> None:
        where = f"4: manifest of stage {manifest.stage_index}, outer step {manifest.outer_step}"
        covered = [merged.partition_index for merged in manifest.partitions]
        assert covered == list(range(self._swarm.scenario.spec.num_partitions)), f"{where} covers {covered}"
        assert len(set(manifest.contributors)) == len(manifest.contributors), f"{where}: a contributor counts twice"
        for merged in manifest.partitions:
            if merged.object is not None:
                assert self._swarm.world.store.is_durable(merged.object), f"{where} names {merged.object}, not durable"
                mean = self._honest_mean(manifest, merged.partition_index)
                is_honest = mean is not None and mean.digest == merged.object.digest
                assert is_honest, f"{where}: partition {merged.partition_index} is not the mean of its contributions"

    def _check_uploads(self, host: OrchestratorHost, manifest: Manifest) -> None:
        """What a miner uploaded is merged once at most, in its outer step or the next one; and what was late is, if it
        was whole in the store when the next upload phase began. (With faults nobody may have been there to see it.)"""
        where = f"5: merge of stage {manifest.stage_index}, outer step {manifest.outer_step}"
        record = host.core.merge(MergeQuery(stage_index=manifest.stage_index, outer_step=manifest.outer_step))
        for contribution in record.contributions:
            upload = (contribution.hotkey, manifest.stage_index, manifest.outer_step - contribution.age)
            assert upload not in self.truth.merged, f"{where}: {upload} was in that of {self.truth.merged[upload]}"
            self.truth.merged[upload] = manifest.outer_step
        late = self._late.pop(manifest.stage_index, ())
        self._late[manifest.stage_index] = record.late
        if self._swarm.scenario.faults or not record.contributions:
            return
        there = self._late_there.pop(manifest.stage_index, set())
        for contribution in late:
            is_there = contribution.hotkey in there
            is_in = (contribution.hotkey, 1) in {each.voice for each in record.contributions}
            assert is_in or not is_there, f"{where}: the late upload of {contribution.hotkey} is thrown away"

    def _note_late(self, stage: StageState) -> None:
        """What is late and whole in the store now."""
        store = self._swarm.world.store
        self._late_there[stage.stage_index] = {
            contribution.hotkey
            for contribution in self._late.get(stage.stage_index, ())
            if all(store.is_durable(ref) for ref in contribution.objects)
        }

    def _honest_mean(self, manifest: Manifest, partition_index: int) -> Body | None:
        """What an honest reducer makes of the contributions, weighed as the plan says."""
        spec, store = self._swarm.scenario.spec, self._swarm.world.store
        plan = self._plans[manifest.stage_index]
        assert plan.outer_step == manifest.outer_step, "4: a manifest without a plan"
        slices = []
        for contribution in plan.contributions:
            body = store.get(contribution.objects[partition_index].key)
            assert body is not None, f"4: the plan names an object of {contribution.hotkey} that is not in the store"
            slices.append(Slice(contribution.hotkey, contribution.num_microbatches, bytearray(body), contribution.age))
        num_params = stage_num_params(spec.model, spec.layouts[manifest.stage_index])
        partition = partition_bounds(num_params, spec.num_partitions)[partition_index]
        codec = slice_codec(spec, manifest.stage_index, partition)
        return reduce_partition(codec, partition.num_params, slices, spec.mean).mean

    def _note_plans(self, host: OrchestratorHost) -> None:
        """Only members of a stage are shown its plan."""
        replicas = self._swarm.scenario.spec.replicas
        for stage in self._stages:
            if stage.phase is Phase.MERGE:
                for hotkey in self._swarm.hotkeys[stage.stage_index * replicas :]:
                    plan = host.core.feed(hotkey, self._clock.now_s()).merge_plan
                    if plan is not None and plan.stage_index == stage.stage_index:
                        self._check_plan(plan)
                        self._plans[stage.stage_index] = plan
                        break

    def _check_plan(self, plan: MergePlan) -> None:
        """4: a plan covers each partition once, with different reducers, and names only durable objects."""
        where = f"4: plan of stage {plan.stage_index}, outer step {plan.outer_step}"
        covered = [partition.partition_index for partition in plan.partitions]
        assert covered == list(range(self._swarm.scenario.spec.num_partitions)), f"{where} covers {covered}"
        for partition in plan.partitions:
            assert len(set(partition.reducers)) == len(partition.reducers), f"{where}: a reducer is asked twice"
        for contribution in plan.contributions:
            for ref in contribution.objects:
                assert self._swarm.world.store.is_durable(ref), f"{where} names {ref}, not durable"

    def _check_credit(self, host: OrchestratorHost) -> None:
        """8: nobody is credited for more than it really applied."""
        for record in host.core.ledger(LedgerQuery()).work:
            really = self.truth.num_applied[(record.hotkey, record.stage_index, record.outer_step)]
            assert record.num_microbatches <= really, f"8: {record} is credited, {really} were applied"

    def _check_replay(self, ended: OrchestratorHost) -> None:
        """9: a new process that begins from the journal stands where the one that ended stood."""
        journal = self._swarm.journal
        fresh = OrchestratorHost(self._swarm.world, journal, self._swarm.ledger)
        first_sequence = 0
        if (snapshot := next(journal.snapshots(), None)) is not None:
            fresh.core.restore(snapshot.state)
            first_sequence = snapshot.sequence
        for record in journal.read(first_sequence):
            if record.sequence == ended.next_sequence:
                break
            fresh.core.handle(record.event, record.now_s)
        assert fresh.core.digest() == ended.core.digest(), "9: the journal leads to another state"
