"""A run in which nothing goes wrong, and what the core shows of it."""

import random

from orchestrator_world import START_S, STRANGER, VALIDATOR, World, hotkey_of, make_spec

from orion.common.ids import MemberState, Phase
from orion.common.protocol.messages import (
    Joined,
    ManifestQuery,
    RefusalCode,
)
from orion.common.protocol.records import (
    CommitmentQuery,
    LedgerQuery,
    LossQuery,
    Verdict,
)
from orion.orchestrator.core import OrchestratorCore


def test_a_run_ends_after_its_outer_steps() -> None:
    world = World()
    world.run()
    status = world.status
    assert status.finished and status.finish_reason == "all outer steps are done"
    assert world.phases == [(Phase.DONE, 3), (Phase.DONE, 3)]
    assert (status.microbatches_started, status.microbatches_applied, status.microbatches_cancelled) == (24, 24, 0)
    assert status.tokens == 24 * 2 * 16
    assert status.anchors_equal
    for stage in status.stages:
        assert stage.checkpoint is not None and stage.checkpoint.outer_step == 3
    assert [notice for notice in status.notices if "gone" in notice or "cut short" in notice] == []


def test_data_ids_go_on_from_one_outer_step_to_the_next() -> None:
    world = World()
    world.run()
    points = world.core.losses(LossQuery()).points
    assert [point.loss for point in points] == [3.0 - 0.01 * data_id for data_id in range(24)]
    assert [point.outer_step for point in points] == [0] * 8 + [1] * 8 + [2] * 8
    assert world.core.losses(LossQuery(offset=20)).points == points[20:]


def test_manifests_name_the_means_and_who_made_them() -> None:
    world = World()
    world.start()
    world.outer_step()
    (manifest,) = world.core.manifests(ManifestQuery(stage_index=1, from_outer_step=0)).manifests
    assert manifest.contributors == (hotkey_of(1, 0), hotkey_of(1, 1))
    assert manifest.total_microbatches == 8
    for partition in manifest.partitions:
        assert partition.object is not None and partition.object.key in world.store
        assert sorted(partition.reducers) == [hotkey_of(1, 0), hotkey_of(1, 1)]
    assert world.feed(hotkey_of(1, 0)).manifest == manifest
    assert world.core.manifests(ManifestQuery(stage_index=1, from_outer_step=1)).manifests == ()
    assert world.core.manifests(ManifestQuery(stage_index=9, from_outer_step=0)).manifests == ()


def test_the_ledger_pays_each_stage_of_each_trip_once() -> None:
    world = World()
    world.run()
    work = world.core.ledger(LedgerQuery()).work
    assert sum(record.num_microbatches for record in work) == 24 * 2
    assert {(record.hotkey, record.outer_step): record.num_microbatches for record in work} == {
        (hotkey_of(stage, replica), outer_step): 4 for stage in (0, 1) for replica in (0, 1) for outer_step in (0, 1, 2)
    }
    assert all(record.flops > 0 for record in work)
    assert world.core.ledger(LedgerQuery(from_outer_step=2)).work == tuple(r for r in work if r.outer_step == 2)
    assert [miner.num_microbatches for miner in world.status.miners] == [12, 12, 12, 12]


def test_commitments_are_published() -> None:
    world = World()
    world.start()
    world.upload_all(world.train())
    records = world.core.commitments(CommitmentQuery(outer_step=0)).records
    assert [record.hotkey for record in records] == sorted(hotkey_of(s, r) for s in (0, 1) for r in (0, 1))
    assert all(record.commitment.num_applied == 4 for record in records)
    assert world.core.commitments(CommitmentQuery(outer_step=7)).records == ()


def test_the_feed_grows_with_each_change_and_only_then() -> None:
    world = World()
    world.start()
    before = world.core.version
    world.tick()
    world.beat(hotkey_of(0, 0))
    world.lease(hotkey_of(0, 0))
    assert world.core.version == before
    world.join(hotkey_of(0, 2))
    assert world.core.version == before + 1
    assert world.announced == sorted(set(world.announced))
    feed = world.feed(hotkey_of(0, 2))
    assert feed.version == world.core.version
    assert feed.assignment == Joined(stage_index=0, state=MemberState.JOINING)
    assert {peer.hotkey for peer in feed.peers} == {*world.members(0), *world.members(1)}
    onlooker = world.feed(VALIDATOR)
    assert onlooker.assignment is None and onlooker.merge_plan is None and onlooker.manifest is None


def test_old_objects_are_deleted_once_no_anchor_needs_them() -> None:
    world = World(make_spec(outer_steps=6, keep_outer_steps=2))
    world.run()
    assert world.deleted == [f"outer/{outer_step}/" for outer_step in range(len(world.deleted))]
    assert len(world.deleted) == 4
    newest = world.stage(0).checkpoint
    assert newest is not None and newest.object.key in world.store
    assert world.core.manifests(ManifestQuery(stage_index=0, from_outer_step=0)).manifests == ()
    kept = world.core.manifests(ManifestQuery(stage_index=0, from_outer_step=4)).manifests
    assert [manifest.outer_step for manifest in kept] == [4, 5]


def test_rare_checkpoints_keep_what_follows_them() -> None:
    world = World(make_spec(outer_steps=7, keep_outer_steps=4, checkpoint_every=3))
    world.run()
    assert [stage.checkpoint.outer_step for stage in world.status.stages if stage.checkpoint] == [7, 7]
    assert world.deleted == ["outer/0/", "outer/1/", "outer/2/"]


def test_verdicts_are_public_and_counted_once() -> None:
    world = World()
    world.start()
    world.outer_step()
    verdict = Verdict(miner=hotkey_of(0, 0), outer_step=0, passed=False, num_operations=3, reason="other gradient")
    world.accept(VALIDATOR, verdict)
    world.accept(VALIDATOR, verdict)
    assert world.refusal(VALIDATOR, verdict.model_copy(update={"passed": True})) is RefusalCode.CONFLICT
    assert world.refusal(hotkey_of(0, 1), verdict) is RefusalCode.FORBIDDEN
    assert world.refusal(STRANGER, verdict) is RefusalCode.FORBIDDEN
    assert world.refusal(VALIDATOR, verdict.model_copy(update={"outer_step": 9})) is RefusalCode.NOT_FOUND
    (record,) = world.core.ledger(LedgerQuery()).verdicts
    assert (record.validator, record.verdict) == (VALIDATOR, verdict)
    assert (world.status.num_checks, world.status.num_verdicts_failed) == (1, 1)
    assert world.notices("other gradient")


def test_the_time_limit_ends_the_run_after_the_outer_step_in_which_it_passes() -> None:
    world = World(make_spec(time_limits={"run_s": 50.0, "member_s": 1000.0}))
    world.start()
    num_applied = world.train(num_left=1)
    world.now_s = START_S + 60.0
    (leased,) = world.lease(world.active(0)[0])
    path = (world.active(0)[0], world.active(1)[0])
    world.travel(leased.microbatch_id, path)
    world.upload_all(num_applied)
    for stage_index in (0, 1):
        world.merge(stage_index)
    assert world.status.finished and world.status.finish_reason == "the time limit has passed"
    assert world.phases == [(Phase.DONE, 1), (Phase.DONE, 1)]


def test_the_time_limit_may_pass_while_the_stages_merge() -> None:
    world = World(make_spec(time_limits={"run_s": 50.0, "member_s": 1000.0}))
    world.start()
    world.upload_all(world.train())
    world.merge(0)
    assert world.phases[0] == (Phase.TRAIN, 1)
    world.now_s = START_S + 60.0
    world.merge(1)
    assert world.status.finished
    assert world.phases == [(Phase.DONE, 1), (Phase.DONE, 1)]


def test_a_single_stage_is_credited_for_the_trips_it_ends() -> None:
    world = World(make_spec(num_stages=1))
    world.run()
    assert [miner.num_microbatches for miner in world.status.miners] == [12, 12]


def test_the_same_events_give_the_same_state_and_another_seed_another() -> None:
    world = World()
    world.run()
    twin = OrchestratorCore(world.spec, random.Random(7))
    other = OrchestratorCore(world.spec, random.Random(8))
    for now_s, event in world.events:
        twin.handle(event, now_s)
        other.handle(event, now_s)
    assert twin.digest() == world.core.digest()
    assert other.digest() != world.core.digest()
