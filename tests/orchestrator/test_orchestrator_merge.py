"""Upload, reduce, apply: with quorum, late and lying members, and what the manifest may name."""

import pytest
from orchestrator_world import World, digest_of, hotkey_of, make_spec

from orion.common.ids import Hotkey, Phase
from orion.common.protocol.messages import (
    Exclusion,
    Leave,
    Manifest,
    ManifestQuery,
    MergedPartition,
    ObjectRef,
    PartitionPlan,
    Reduced,
    Refusal,
    RefusalCode,
)
from orion.common.protocol.records import MergeQuery
from orion.common.protocol.refusals import RefusedError

A0, A1, A2 = (hotkey_of(0, replica) for replica in range(3))
B0, B1 = (hotkey_of(1, replica) for replica in range(2))


def one_stage(replicas: int, **changes: object) -> World:
    """A run of one stage that has just finished training its first outer step."""
    world = World(make_spec(num_stages=1, replicas=replicas, **changes))
    world.start()
    return world


def uploaded(replicas: int, **changes: object) -> World:
    """The same with every contribution there: reducers may begin."""
    world = one_stage(replicas, **changes)
    world.upload_all(world.train())
    assert world.phases == [(Phase.MERGE, 0)]
    return world


def manifest_of(world: World, stage_index: int = 0, outer_step: int = 0) -> Manifest | None:
    manifests = world.core.manifests(ManifestQuery(stage_index=stage_index, from_outer_step=outer_step)).manifests
    return manifests[0] if manifests else None


def partitions_of(world: World) -> tuple[MergedPartition, ...]:
    manifest = manifest_of(world)
    assert manifest is not None
    return manifest.partitions


def reducers_of(world: World, partition_index: int) -> tuple[Hotkey, ...]:
    plan = world.plan(0)
    assert plan is not None
    return plan.partitions[partition_index].reducers


def everyone(world: World) -> list[Hotkey]:
    return world.members(0, "active", "ready", "joining")


class TestUpload:
    def test_it_ends_when_all_contributions_are_durable_and_not_before(self) -> None:
        world = one_stage(2)
        num_applied = world.train()
        world.upload(A0, num_applied[A0])
        assert world.phases == [(Phase.UPLOAD, 0)]
        world.loses = lambda ref: ref.key.endswith("/1.safetensors")
        world.upload(A1, num_applied[A1])
        world.wait(3.0, A0, A1)
        assert world.phases == [(Phase.UPLOAD, 0)], "one object is still missing"
        world.loses = lambda ref: False
        world.wait(3.0, A0, A1)
        assert world.phases == [(Phase.MERGE, 0)]

    def test_contributions_are_planned_in_the_order_of_hotkeys_with_credited_weights(self) -> None:
        world = World()
        world.start()
        num_applied = world.train()
        for hotkey in (B1, B0):
            world.upload(hotkey, num_applied[hotkey])
        plan = world.plan(1)
        assert plan is not None
        assert [(item.hotkey, item.num_microbatches) for item in plan.contributions] == [(B0, 4), (B1, 4)]
        assert world.plan(0) is None, "each stage merges by itself"

    def test_nobody_weighs_more_than_it_was_credited_for(self) -> None:
        world = World()
        world.start()
        num_applied = world.train()
        world.commit(B0, 1000)
        contribution = world.contribution(B0, 1000)
        world.put(*contribution.contribution.objects)
        world.accept(B0, contribution)
        world.upload(B1, num_applied[B1])
        plan = world.plan(1)
        assert plan is not None
        assert [item.num_microbatches for item in plan.contributions] == [4, 4]

    def test_a_contribution_is_checked_before_it_counts(self) -> None:
        world = one_stage(2)
        world.train()
        good = world.contribution(A0, 4)
        assert world.refusal(A0, good) is RefusalCode.BUSY, "the commitment comes first"
        world.commit(A0, 4)
        assert world.refusal(A0, good.model_copy(update={"outer_step": 1})) is RefusalCode.WRONG_PHASE
        assert world.refusal(A1, good) is RefusalCode.MALFORMED
        assert world.refusal(A0, world.contribution(A0, 5)) is RefusalCode.CONFLICT
        reversed_objects = good.contribution.model_copy(update={"objects": good.contribution.objects[::-1]})
        assert world.refusal(A0, good.model_copy(update={"contribution": reversed_objects})) is RefusalCode.MALFORMED
        first, second = good.contribution.objects
        large = good.contribution.model_copy(
            update={"objects": (first.model_copy(update={"size_bytes": 1 << 40}), second)}
        )
        assert world.refusal(A0, good.model_copy(update={"contribution": large})) is RefusalCode.TOO_LARGE
        world.join(A2)
        world.commit(A2, 4)
        world.put(*good.contribution.objects)
        world.accept(A0, good)
        world.accept(A0, good)
        assert world.refusal(A0, world.contribution(A0, 4, "other")) is RefusalCode.CONFLICT
        assert world.refusal(A2, world.contribution(A2, 4)) is RefusalCode.WRONG_PHASE

    def test_what_is_not_durable_yet_may_be_replaced(self) -> None:
        world = one_stage(2)
        num_applied = world.train()
        world.commit(A0, 4)
        world.accept(A0, world.contribution(A0, 4, "lost"))
        again = world.contribution(A0, 4, "written")
        world.put(*again.contribution.objects)
        world.accept(A0, again)
        world.upload(A1, num_applied[A1])
        plan = world.plan(0)
        assert plan is not None and plan.contributions[0] == again.contribution

    def test_at_the_deadline_a_quorum_goes_on_without_the_rest(self) -> None:
        world = one_stage(3)
        num_applied = world.train()
        for hotkey in (A0, A1):
            world.upload(hotkey, num_applied[hotkey])
        world.wait(9.0, *everyone(world))
        assert world.phases == [(Phase.UPLOAD, 0)]
        world.wait(3.0, *everyone(world))
        assert world.phases == [(Phase.MERGE, 0)]
        assert world.notices(f"upload cut short, without {A2}")
        plan = world.plan(0)
        assert plan is not None and [item.hotkey for item in plan.contributions] == [A0, A1]
        assert world.refusal(A2, world.contribution(A2, num_applied[A2])) is RefusalCode.WRONG_PHASE

    def test_without_a_quorum_the_stage_keeps_its_anchor(self) -> None:
        world = one_stage(3)
        num_applied = world.train()
        world.upload(A0, num_applied[A0])
        world.wait(13.0, *everyone(world))
        assert world.notices("1 of 2 needed contributions are there; anchor kept")
        assert [partition.object for partition in partitions_of(world)] == [None, None]

    def test_who_has_done_nothing_is_not_waited_for(self) -> None:
        world = one_stage(3)
        for _ in range(3 * 4):
            (leased,) = world.lease(A0)
            world.travel(leased.microbatch_id, (A0,))
        world.upload(A0, 12)
        world.commit(A1, 0)
        world.wait(4.0, *everyone(world))
        assert world.phases == [(Phase.UPLOAD, 0)], "a report of the third may still be on its way"
        world.wait(2.0, *everyone(world))
        assert world.phases == [(Phase.MERGE, 0)]
        assert not world.notices("cut short")

    def test_who_has_gone_is_not_waited_for_but_what_it_left_counts(self) -> None:
        world = one_stage(3)
        num_applied = world.train()
        world.upload(A0, num_applied[A0])
        world.upload(A1, num_applied[A1])
        world.accept(A1, Leave(reason="x"))
        world.accept(A2, Leave(reason="x"))
        plan = world.plan(0)
        assert plan is not None and [item.hotkey for item in plan.contributions] == [A0, A1]
        assert {reducer for partition in plan.partitions for reducer in partition.reducers} == {A0}

    def test_nobody_contributes(self) -> None:
        world = one_stage(2)
        world.wait(101.0, A0, A1)
        assert world.phases == [(Phase.UPLOAD, 0)]
        world.wait(6.0, A0, A1)
        assert world.phases == [(Phase.MERGE, 0)]
        assert manifest_of(world) == Manifest(
            stage_index=0,
            outer_step=0,
            partitions=tuple(MergedPartition(partition_index=index, object=None, reducers=()) for index in (0, 1)),
            contributors=(),
            total_microbatches=0,
        )
        world.apply_all(0)
        assert world.phases == [(Phase.TRAIN, 1)]


class TestReduce:
    @pytest.mark.parametrize("replicas", [2, 3, 5])
    def test_every_partition_has_two_reducers(self, replicas: int) -> None:
        world = uploaded(replicas, num_partitions=5)
        plan = world.plan(0)
        assert plan is not None
        assert [partition.partition_index for partition in plan.partitions] == list(range(5))
        assert all(len(set(partition.reducers)) == 2 for partition in plan.partitions)

    def test_two_equal_copies_settle_a_partition(self) -> None:
        world = uploaded(3)
        for partition_index in (0, 1):
            for hotkey in reducers_of(world, partition_index):
                assert manifest_of(world) is None
                world.reduce(hotkey, partition_index)
        assert [sorted(partition.reducers) for partition in partitions_of(world)] != []
        assert not world.notices("reduces it too")

    def test_a_single_replica_reduces_alone(self) -> None:
        world = uploaded(1)
        world.reduce_all(0)
        assert [partition.reducers for partition in partitions_of(world)] == [(A0,), (A0,)]
        assert not world.notices("copy")

    def test_a_copy_counts_once_its_object_is_durable(self) -> None:
        world = uploaded(2)
        world.loses = lambda ref: "/reduced/" in ref.key
        world.reduce_all(0)
        assert manifest_of(world) is None
        world.loses = lambda ref: "/reduced/" in ref.key and A1 in ref.key
        world.wait(3.0, A0, A1)
        assert [len(partition.reducers) for partition in partitions_of(world)] == [2, 2]

    def test_two_different_copies_call_a_third_reducer_and_the_odd_one_out_is_named(self) -> None:
        world = uploaded(3)
        liar, honest = reducers_of(world, 0)
        world.reduce(liar, 0, "lie")
        world.reduce(honest, 0)
        (third,) = {A0, A1, A2} - {liar, honest}
        assert reducers_of(world, 0) == (liar, honest, third)
        assert world.notices(f"partition 0: reducers disagree; {third} reduces it too")
        world.reduce(third, 0)
        for hotkey in reducers_of(world, 1):
            world.reduce(hotkey, 1)
        assert partitions_of(world)[0].reducers == (honest, third)
        assert world.notices(f"partition 0: other bytes from {liar}")

    def test_where_two_disagree_and_nobody_can_decide_the_partition_keeps_its_anchor(self) -> None:
        world = uploaded(2)
        world.reduce(A0, 0, "lie")
        world.reduce(A1, 0)
        for hotkey in (A0, A1):
            world.reduce(hotkey, 1)
        first, second = partitions_of(world)
        assert first.object is None and second.object is not None
        assert world.notices("means differ and none prevails")

    def test_four_reducers_without_two_that_agree_ask_on_until_two_do(self) -> None:
        world = uploaded(5)
        for number in range(3):
            world.reduce(reducers_of(world, 0)[number], 0, f"lie {number}")
        fourth = reducers_of(world, 0)[3]
        world.reduce(fourth, 0)
        fifth = reducers_of(world, 0)[4]
        world.reduce(fifth, 0)
        for hotkey in reducers_of(world, 1):
            world.reduce(hotkey, 1)
        assert partitions_of(world)[0].reducers == (fourth, fifth)

    def test_a_late_reducer_is_replaced(self) -> None:
        world = uploaded(3)
        late, punctual = reducers_of(world, 0)
        world.reduce(punctual, 0)
        for hotkey in reducers_of(world, 1):
            world.reduce(hotkey, 1)
        world.wait(9.0, A0, A1, A2)
        assert len(reducers_of(world, 0)) == 2
        world.wait(3.0, A0, A1, A2)
        (substitute,) = {A0, A1, A2} - {late, punctual}
        assert reducers_of(world, 0) == (late, punctual, substitute)
        world.reduce(substitute, 0)
        assert partitions_of(world)[0].reducers == (punctual, substitute)

    def test_a_reducer_that_goes_is_replaced_at_once(self) -> None:
        world = uploaded(3)
        gone, other = reducers_of(world, 0)
        world.accept(gone, Leave(reason="x"))
        (substitute,) = {A0, A1, A2} - {gone, other}
        assert reducers_of(world, 0) == (gone, other, substitute)
        world.reduce(other, 0)
        world.reduce(substitute, 0)
        for hotkey in reducers_of(world, 1):
            if hotkey != gone:
                world.reduce(hotkey, 1)
        assert [partition.object is None for partition in partitions_of(world)] == [False, False]

    def test_at_the_deadline_a_single_copy_stands_and_none_keeps_the_anchor(self) -> None:
        world = uploaded(2)
        world.reduce(A0, 0)
        deadline_s = world.stage(0).deadline_s
        while world.now_s < deadline_s - 1.0:
            world.wait(1.0, A0, A1)
        assert manifest_of(world) is None
        world.wait(1.5, A0, A1)
        first, second = partitions_of(world)
        assert first.reducers == (A0,) and first.object is not None
        assert second.object is None
        assert world.notices("partition 0: a single copy, at the deadline")
        assert world.notices("partition 1: no mean, at the deadline")

    def test_when_all_reducers_go_the_anchor_is_kept(self) -> None:
        world = uploaded(2)
        for hotkey in (A0, A1):
            world.accept(hotkey, Leave(reason="x"))
        assert [partition.object for partition in partitions_of(world)] == [None, None]
        assert world.phases == [(Phase.TRAIN, 1)]

    def test_a_mean_is_checked_before_it_counts(self) -> None:
        world = uploaded(3)
        mine, yours = reducers_of(world, 0)
        (other,) = {A0, A1, A2} - {mine, yours}
        refusal = world.reduce(other, 0)
        assert isinstance(refusal, Refusal) and refusal.code is RefusalCode.FORBIDDEN
        excluded = tuple(Exclusion(hotkey=hotkey, reason="norm") for hotkey in (A0, A1, A2))
        refusal = world.reduce(mine, 0, excluded=excluded)
        assert isinstance(refusal, Refusal) and refusal.code is RefusalCode.MALFORMED
        ref = ObjectRef(key=f"outer/0/stage/0/reduced/{yours}/0.safetensors", digest=digest_of(1), size_bytes=1)
        reduced = Reduced(outer_step=0, partition_index=0, object=ref)
        assert world.refusal(mine, reduced) is RefusalCode.MALFORMED
        assert world.refusal(mine, reduced.model_copy(update={"partition_index": 2})) is RefusalCode.MALFORMED
        assert world.refusal(mine, reduced.model_copy(update={"outer_step": 1})) is RefusalCode.WRONG_PHASE
        world.reduce(mine, 0)
        world.reduce(mine, 0)
        refusal = world.reduce(mine, 0, "other")
        assert isinstance(refusal, Refusal) and refusal.code is RefusalCode.CONFLICT

    def test_reducers_that_leave_out_others_do_not_agree(self) -> None:
        world = uploaded(3)
        first, second = reducers_of(world, 0)
        world.reduce(first, 0, excluded=(Exclusion(hotkey=A0, reason="norm 1.001"),))
        world.reduce(second, 0)
        (third,) = {A0, A1, A2} - {first, second}
        world.reduce(third, 0, excluded=(Exclusion(hotkey=A0, reason="norm 1.002"),))
        for hotkey in reducers_of(world, 1):
            world.reduce(hotkey, 1)
        assert partitions_of(world)[0].reducers == (first, third)
        assert world.notices(f"{A0} left out: norm 1.001")

    def test_a_plan_is_shown_until_the_manifest(self) -> None:
        world = uploaded(2)
        assert isinstance(world.feed(A0).merge_plan, type(world.plan(0)))
        assert all(isinstance(partition, PartitionPlan) for partition in (world.plan(0) or pytest.fail()).partitions)
        world.reduce_all(0)
        assert world.plan(0) is None and world.feed(A0).manifest == manifest_of(world)


class TestRecord:
    def test_it_says_who_reduced_what_and_is_asked_for_again_while_it_is_open(self) -> None:
        world = uploaded(3)
        plan = world.plan(0)
        assert plan is not None
        with pytest.raises(RefusedError, match="not been settled") as refusal:
            world.core.merge(MergeQuery(stage_index=0, outer_step=0))
        assert refusal.value.code is RefusalCode.BUSY and refusal.value.retry_after_s
        world.reduce_all(0)
        record = world.core.merge(MergeQuery(stage_index=0, outer_step=0))
        assert record.contributions == plan.contributions
        assert record.manifest == manifest_of(world)
        for partition, planned in zip(record.partitions, plan.partitions, strict=True):
            assert partition.asked == tuple(copy.reducer for copy in partition.copies) == planned.reducers
            assert len({copy.object.digest for copy in partition.copies}) == 1

    def test_copies_that_lost_are_in_it(self) -> None:
        world = uploaded(3)
        liar, honest = reducers_of(world, 0)
        world.reduce(liar, 0, "lie")
        world.reduce(honest, 0)
        (third,) = set(everyone(world)) - {liar, honest}
        world.reduce(third, 0)
        world.reduce_all(0)
        record = world.core.merge(MergeQuery(stage_index=0, outer_step=0))
        assert [copy.reducer for copy in record.partitions[0].copies] == [liar, honest, third]
        assert partitions_of(world)[0].reducers == (honest, third)

    def test_where_nobody_contributed_it_is_empty(self) -> None:
        world = one_stage(2)
        world.train()
        world.wait(world.stage(0).deadline_s - world.status.now_s + 1, A0, A1)
        record = world.core.merge(MergeQuery(stage_index=0, outer_step=0))
        assert record.contributions == () and record.partitions == ()
        assert all(partition.object is None for partition in record.manifest.partitions)

    @pytest.mark.parametrize(("stage_index", "outer_step"), [(1, 0), (0, 10**6)])
    def test_what_is_not_kept_is_refused_for_good(self, stage_index: int, outer_step: int) -> None:
        with pytest.raises(RefusedError, match="not kept") as refusal:
            uploaded(2).core.merge(MergeQuery(stage_index=stage_index, outer_step=outer_step))
        assert refusal.value.code is RefusalCode.NOT_FOUND
