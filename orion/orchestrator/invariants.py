"""What must hold after every event, whatever happened. Each claim is numbered as in the design's list.

Reads the state, never changes it. Costs a walk over everything, so it is called by tests and the simulator.
"""

from collections import Counter

from orion.common.ids import Direction, MemberState, Outcome
from orion.orchestrator.leases import DATA_TRIPS_MAX, REPORT_SLACK_S
from orion.orchestrator.stages import MERGING, NEVER_S, Applying, Ended, Finishing, StageProgress, Training, Uploading
from orion.orchestrator.state import NOTICES_MAX, RunState


def check_invariants(state: RunState) -> None:
    """Raises AssertionError that says which claim does not hold."""
    _check_trips(state)
    _check_members(state)
    for stage in state.memory.stages:
        _check_outer_steps(state, stage)
        _check_manifests(state, stage)
        _check_phase(state, stage)
    _check_credit(state)
    assert len(state.memory.notices) <= NOTICES_MAX
    assert not state.outbox


def _check_trips(state: RunState) -> None:
    """1: a trip ends once, applied or cancelled with a reason; a data id is on one trip at a time and applied once."""
    leases = state.memory.leases
    assert leases.num_started == leases.num_applied + leases.num_cancelled + len(leases.live), "1: trips are lost"
    for microbatch_id, trip in leases.live.items():
        assert trip.outcome is None and trip.microbatch_id == microbatch_id, f"1: {trip} is live and ended"
        assert state.memory.membership.get(trip.lessee) is not None, f"2: {trip} is held by somebody who is gone"
        assert trip.deadline_s + REPORT_SLACK_S > state.memory.ticked_s, f"2: {trip} has outlived its deadline"
    assert Counter(trip.lessee for trip in leases.live.values()) == leases.num_live_of, "1: leases are miscounted"
    for outer_step, trips in leases.trips.items():
        per_data_id = Counter(trip.data_id for trip in trips.values())
        assert max(per_data_id.values(), default=0) <= DATA_TRIPS_MAX, f"1: outer step {outer_step}: too many trips"
        for trip in trips.values():
            assert trip.outer_step == outer_step
            assert (trip.outcome is None) == (trip.microbatch_id in leases.live), f"1: {trip} is neither live nor ended"
            assert trip.outcome is not Outcome.CANCELLED or trip.reason, f"1: {trip} ended without a reason"
        unended = Counter(trip.data_id for trip in trips.values() if trip.outcome is not Outcome.CANCELLED)
        assert max(unended.values(), default=0) <= 1, f"1: outer step {outer_step}: data trained twice"


def _check_members(state: RunState) -> None:
    membership = state.memory.membership
    for hotkey, member in membership.members.items():
        assert member.hotkey == hotkey
        homes = [index for index, stage in enumerate(membership.stages) if hotkey in stage]
        assert homes == ([member.stage_index] if member.is_present else []), f"{hotkey} is in the stages {homes}"
        assert not member.is_suspect or member.lost_s is not None, f"{hotkey} is suspected though nothing was lost"
        is_silent = member.last_seen_s <= state.memory.ticked_s - state.spec.time_limits.member_s
        assert not (member.is_present and is_silent) or state.is_finished, f"6: {hotkey} is silent and waited for"


def _check_outer_steps(state: RunState, stage: StageProgress) -> None:
    """3: a stage is at the run's outer step or at the one before; its manifests have no gap."""
    where = f"stage {stage.stage_index}, outer step {stage.outer_step}"
    train = state.memory.train
    assert train.outer_step - 1 <= stage.outer_step <= train.outer_step, f"3: {where}: the run is at {train.outer_step}"
    if train.is_open and not (state.spec.sync == "overlapped" and isinstance(stage.activity, MERGING)):
        assert isinstance(stage.activity, Training) and stage.outer_step == train.outer_step, f"3: {where}: left behind"
    if stage.manifests:
        newest = stage.outer_step if isinstance(stage.activity, Applying) else stage.outer_step - 1
        assert sorted(stage.manifests) == list(range(min(stage.manifests), newest + 1)), f"3: {where}: manifest missing"
    is_last = isinstance(stage.activity, Finishing | Ended)
    assert is_last == (stage.outer_step == state.memory.final_outer_step), f"3: {where}: ends at the wrong outer step"


def _check_manifests(state: RunState, stage: StageProgress) -> None:
    """4: a manifest covers every partition once and names only durable objects; so does a checkpoint."""
    objects = state.memory.objects
    for manifest in stage.manifests.values():
        where = f"4: stage {stage.stage_index}, manifest of outer step {manifest.outer_step}"
        indices = [partition.partition_index for partition in manifest.partitions]
        assert indices == list(range(state.spec.num_partitions)), f"{where} covers {indices}"
        record = stage.merges[manifest.outer_step]
        assert record.manifest == manifest, f"{where} came about otherwise"
        named = {copy.object for partition in record.partitions for copy in partition.copies}
        assert all(partition.object is None or partition.object in named for partition in manifest.partitions), where
        for partition in manifest.partitions:
            assert partition.object is None or objects.is_durable(partition.object), f"{where}: {partition.object}"
            assert (partition.object is None) == (not partition.reducers), f"{where}: nobody's mean"
    for checkpoint in stage.checkpoints:
        assert objects.is_durable(checkpoint.object), f"4: {checkpoint} is not durable"
        assert checkpoint.outer_step <= stage.outer_step
    oldest_needed = stage.rebuildable_from(stage.outer_step)
    assert all(step in stage.manifests for step in range(oldest_needed, stage.outer_step)), (
        "3: anchor is not rebuildable"
    )


def _check_phase(state: RunState, stage: StageProgress) -> None:
    """5, 6: a phase with a deadline is left at it; nobody who is gone is waited for."""
    train = state.memory.train
    if isinstance(stage.activity, Training):
        assert train.is_open == (stage.deadline_s == train.deadline_s < NEVER_S), (
            "6: an open train phase has a deadline"
        )
    if not isinstance(stage.activity, Ended):
        assert stage.deadline_s > state.memory.advanced_s, f"6: stage {stage.stage_index} is past its deadline"
    if isinstance(stage.activity, Uploading | Applying):
        assert len(set(stage.activity.awaited)) == len(stage.activity.awaited)
    if stage.task is not None:
        member = state.memory.membership.get(stage.task.hotkey)
        assert stage.task.upload is not None or (member is not None and member.state is not MemberState.JOINING), (
            f"5: stage {stage.stage_index}: the checkpoint is left to somebody who is gone"
        )


def _check_credit(state: RunState) -> None:
    """8: every credit is backed by a transfer that both ends report alike, or by the only stage's applied trip."""
    memory = state.memory
    for outer_step, trips in memory.leases.trips.items():
        step = memory.ledger.steps[outer_step]
        assert step.trips.keys() == trips.keys(), f"8: outer step {outer_step}: other trips than were leased"
        counted: Counter[tuple[str, int]] = Counter()
        for microbatch_id, evidence in step.trips.items():
            trip = trips[microbatch_id]
            assert (evidence.lessee, evidence.outcome) == (trip.lessee, trip.outcome), f"8: the ledger differs: {trip}"
            returned_to = {
                hop.to_stage
                for hop, claims in evidence.hops.items()
                if hop.direction is Direction.GRADIENT and claims.agree
            }
            for stage_index, hotkey in evidence.credited.items():
                counted[(hotkey, stage_index)] += 1
                if stage_index == 0:
                    assert trip.lessee == hotkey and trip.outcome is Outcome.APPLIED, (
                        f"8: {hotkey} did not apply {trip}"
                    )
                if memory.num_stages > 1:
                    assert max(0, stage_index - 1) in returned_to, (
                        f"8: nobody accepted what {hotkey} is credited for in {trip}"
                    )
        assert counted == Counter(step.num_credited), f"8: outer step {outer_step}: credit is miscounted"
