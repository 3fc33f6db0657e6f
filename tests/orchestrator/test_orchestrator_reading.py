"""Contributions are announced before they can be read, and read before all of them have arrived; one of two equal means
is written."""

import pytest
from orchestrator_world import START_S, World, digest_of, hotkey_of, make_spec

from orion.common.ids import Hotkey, Phase
from orion.common.protocol.keys import pseudo_gradient_key, reduced_key
from orion.common.protocol.messages import (
    GrantRequest,
    Leave,
    ManifestQuery,
    MergedPartition,
    MergePlan,
    ObjectRef,
    Reduced,
    RefusalCode,
    Uploaded,
)
from orion.common.protocol.records import MergeQuery
from orion.common.protocol.refusals import RefusedError
from orion.orchestrator.figures import stage_figures

A0, A1, A2 = (hotkey_of(0, replica) for replica in range(3))


def trained(replicas: int) -> World:
    world = World(make_spec(num_stages=1, replicas=replicas))
    world.start()
    for hotkey, num_applied in world.train().items():
        world.commit(hotkey, num_applied)
    return world


def announce(world: World, hotkey: Hotkey, content: object = "") -> Uploaded:
    uploaded = world.contribution(hotkey, 4, content).model_copy(update={"is_stored": False})
    world.accept(hotkey, uploaded)
    return uploaded


def arrive(world: World, uploaded: Uploaded) -> None:
    world.put(*uploaded.contribution.objects)
    world.accept(uploaded.contribution.hotkey, uploaded.model_copy(update={"is_stored": True}))


def may_read(world: World, key: str) -> bool:
    try:
        world.core.check_grant(A0, GrantRequest(keys=(key,)))
    except RefusedError as error:
        assert error.code is RefusalCode.WRONG_PHASE
        return False
    return True


def plan_of(world: World) -> MergePlan:
    plan = world.plan(0)
    assert plan is not None
    return plan


def partitions_of(world: World) -> tuple[MergedPartition, ...]:
    (manifest,) = world.core.manifests(ManifestQuery(stage_index=0, from_outer_step=0)).manifests
    return manifest.partitions


class TestReading:
    def test_nothing_can_be_read_before_all_have_announced_and_everything_from_then_on(self) -> None:
        world = trained(3)
        key = pseudo_gradient_key(0, 0, A0, 0)
        announced = [announce(world, A0), announce(world, A1)]
        arrive(world, announced[0])
        assert world.plan(0) is None and not may_read(world, key)
        announced.append(announce(world, A2))
        plan = plan_of(world)
        assert not plan.is_final and may_read(world, key)
        assert world.phases == [(Phase.UPLOAD, 0)]
        assert plan.contributions == tuple(uploaded.contribution for uploaded in announced)
        for uploaded in announced:
            arrive(world, uploaded)
        assert world.phases == [(Phase.MERGE, 0)]
        final = plan_of(world)
        assert final.is_final
        assert [item.reducers for item in final.partitions] == [item.reducers for item in plan.partitions]

    def test_what_was_announced_cannot_be_changed_once_it_can_be_read(self) -> None:
        world = trained(2)
        announce(world, A0)
        announce(world, A0, "better")
        announce(world, A1)
        assert world.refusal(A0, world.contribution(A0, 4, "copied")) is RefusalCode.CONFLICT
        assert plan_of(world).contributions[0] == world.contribution(A0, 4, "better").contribution

    def test_nobody_announces_after_others_could_read(self) -> None:
        world = trained(3)
        announced = [announce(world, A0), announce(world, A1)]
        world.accept(A2, Leave(reason="x"))
        assert not plan_of(world).is_final
        world.join(A2)
        assert world.refusal(A2, world.contribution(A2, 4)) is RefusalCode.CONFLICT
        for uploaded in announced:
            arrive(world, uploaded)
        assert world.phases == [(Phase.MERGE, 0)]

    def test_who_is_gone_before_its_contribution_arrived_is_not_waited_for(self) -> None:
        world = trained(3)
        announced = [announce(world, hotkey) for hotkey in (A0, A1, A2)]
        for uploaded in announced[:2]:
            arrive(world, uploaded)
        assert world.phases == [(Phase.UPLOAD, 0)]
        world.accept(A2, Leave(reason="x"))
        assert world.phases == [(Phase.MERGE, 0)] and world.now_s < START_S + 10.0
        assert [item.hotkey for item in plan_of(world).contributions] == [A0, A1]


LIMITS = {"transfer_grace_s": 10.0, "train_s": 100.0, "microbatch_s": 30.0, "member_s": 10.0}


class TestOwnDeadlines:
    """The grace is 10 s; over the slowest link an upload may take 90 s more."""

    def uploading(self, rates_bytes_per_s: dict[Hotkey, float], **changes: object) -> World:
        floor = stage_figures(make_spec(num_stages=1))[0].num_params * 4 / 90.0
        limits = LIMITS | {"bandwidth_floor_bytes_per_s": floor}
        spec = make_spec(num_stages=1, replicas=3, time_limits=limits, **changes)
        world = World(spec)
        world.start()
        for hotkey, rate in rates_bytes_per_s.items():
            world.beat(hotkey, rate_bytes_per_s=rate)
        for hotkey, num_applied in world.train().items():
            world.commit(hotkey, num_applied)
        assert 99.0 < world.stage(0).deadline_s - world.now_s < 101.0
        return world

    def test_who_has_always_been_fast_is_waited_for_as_long_as_that_takes_and_the_grace(self) -> None:
        world = self.uploading(dict.fromkeys((A0, A1, A2), 1e9))
        announced = [announce(world, hotkey) for hotkey in (A0, A1, A2)]
        for uploaded in announced[:2]:
            arrive(world, uploaded)
        world.wait(9.0, A0, A1, A2)
        assert world.phases == [(Phase.UPLOAD, 0)]
        world.wait(2.0, A0, A1, A2)
        assert world.phases == [(Phase.MERGE, 0)]
        assert world.notices(f"upload cut short, without {A2}")

    def test_whose_link_is_slow_or_not_known_is_waited_for_as_long_as_the_usual_peer(self) -> None:
        world = self.uploading(dict.fromkeys((A0, A1), 1e9))
        announced = [announce(world, hotkey) for hotkey in (A0, A1, A2)]
        for uploaded in announced[:2]:
            arrive(world, uploaded)
        world.wait(9.0, A0, A1, A2)
        assert world.phases == [(Phase.UPLOAD, 0)]
        world.wait(2.0, A0, A1, A2)
        assert [item.hotkey for item in plan_of(world).contributions] == [A0, A1]

    def test_what_has_no_merge_after_it_is_waited_for_as_long_as_its_link_needs(self) -> None:
        world = self.uploading(dict.fromkeys((A0, A1), 1e9), outer_steps=1)
        announced = [announce(world, hotkey) for hotkey in (A0, A1, A2)]
        for uploaded in announced[:2]:
            arrive(world, uploaded)
        world.wait(30.0, A0, A1, A2)
        assert world.phases == [(Phase.UPLOAD, 0)]
        arrive(world, announced[2])
        assert [item.hotkey for item in plan_of(world).contributions] == [A0, A1, A2]

    def test_without_a_quorum_nothing_is_cut_short_before_the_slowest_link_s_deadline(self) -> None:
        world = self.uploading(dict.fromkeys((A0, A1, A2), 1e9))
        announced = [announce(world, hotkey) for hotkey in (A0, A1, A2)]
        arrive(world, announced[0])
        world.wait(30.0, A0, A1, A2)
        assert world.phases == [(Phase.UPLOAD, 0)]
        arrive(world, announced[1])
        assert world.phases == [(Phase.MERGE, 0)]

    def test_a_reducer_s_time_follows_from_its_own_link(self) -> None:
        world = self.uploading(dict.fromkeys((A0, A1, A2), 1e9))
        for uploaded in [announce(world, hotkey) for hotkey in (A0, A1, A2)]:
            arrive(world, uploaded)
        world.wait(11.0, A0, A1, A2)
        assert all(len(partition.reducers) > 2 for partition in plan_of(world).partitions), "late ones are replaced"


def told(world: World, hotkey: Hotkey, index: int, content: object = "", *, is_stored: bool = False) -> Reduced:
    """A reducer says what a mean is, and has written it or not."""
    ref = ObjectRef(
        key=reduced_key(0, 0, hotkey, index), digest=digest_of("mean", 0, 0, index, content), size_bytes=100
    )
    if is_stored:
        world.put(ref)
    reduced = Reduced(outer_step=0, partition_index=index, object=ref, is_stored=is_stored)
    world.accept(hotkey, reduced)
    return reduced


class TestWriting:
    @pytest.fixture
    def world(self) -> World:
        world = trained(3)
        for uploaded in [announce(world, hotkey) for hotkey in (A0, A1, A2)]:
            arrive(world, uploaded)
        assert world.phases == [(Phase.MERGE, 0)]
        return world

    def test_one_of_two_equal_means_is_written_and_both_are_on_record(self, world: World) -> None:
        for partition in plan_of(world).partitions:
            writer, other = partition.reducers
            assert partition.writers == (writer,)
            index = partition.partition_index
            key = reduced_key(0, 0, writer, index)
            told(world, other, index)
            assert plan_of(world).partitions[index].settled is None and not may_read(world, key)
            told(world, writer, index, is_stored=True)
            assert may_read(world, key)
        assert all(
            set(merged.reducers) <= {A0, A1, A2} and len(merged.reducers) == 2 for merged in partitions_of(world)
        )
        record = world.core.merge(MergeQuery(stage_index=0, outer_step=0))
        assert [len(partition.copies) for partition in record.partitions] == [2, 2]

    def test_a_mean_is_shown_as_soon_as_it_stands(self, world: World) -> None:
        writer, other = plan_of(world).partitions[0].reducers
        reduced = told(world, writer, 0, is_stored=True)
        told(world, other, 0)
        assert plan_of(world).partitions[0].settled == reduced.object

    def test_when_the_writer_goes_the_other_one_writes(self, world: World) -> None:
        writer, other = plan_of(world).partitions[0].reducers
        told(world, writer, 0)
        told(world, other, 0)
        assert plan_of(world).partitions[0].writers == (writer,)
        world.accept(writer, Leave(reason="x"))
        assert plan_of(world).partitions[0].writers == (writer, other)
        reduced = told(world, other, 0, is_stored=True)
        assert plan_of(world).partitions[0].settled == reduced.object

    def test_a_writer_that_is_late_is_helped(self, world: World) -> None:
        writer, other = plan_of(world).partitions[0].reducers
        told(world, writer, 0)
        told(world, other, 0)
        world.wait(13.0, A0, A1, A2)
        assert plan_of(world).partitions[0].writers == (writer, other)

    def test_where_means_differ_the_third_reducer_writes_and_the_liar_is_named(self, world: World) -> None:
        liar, honest = plan_of(world).partitions[0].reducers
        told(world, liar, 0, "lie", is_stored=True)
        told(world, honest, 0)
        (third,) = {A0, A1, A2} - {liar, honest}
        assert plan_of(world).partitions[0].writers == (liar, third)
        reduced = told(world, third, 0, is_stored=True)
        assert plan_of(world).partitions[0].settled == reduced.object
        assert world.notices(f"partition 0: other bytes from {liar}")

    def test_what_was_told_and_never_written_does_not_stand(self, world: World) -> None:
        for hotkey in plan_of(world).partitions[0].reducers:
            told(world, hotkey, 0)
        while world.phases == [(Phase.MERGE, 0)] and world.plan(0) is not None:
            world.wait(1.0, A0, A1, A2)
        assert partitions_of(world)[0].object is None
        assert world.notices("partition 0: what the mean is was told, but not stored, at the deadline")
