"""Contributions that come too late for their merge go into the next one: once, discounted, or not at all."""

import random

import pytest
from orchestrator_world import World, hotkey_of, make_spec

from orion.common.ids import Hotkey, Phase
from orion.common.ledger.scoring import merge_factor
from orion.common.protocol.messages import (
    Contribution,
    Exclusion,
    GrantRequest,
    Join,
    Leave,
    RefusalCode,
    Uploaded,
    UploadRequest,
)
from orion.common.protocol.records import LedgerQuery, MergeQuery, MergeRecord
from orion.common.protocol.refusals import RefusedError
from orion.orchestrator.core import OrchestratorCore
from orion.orchestrator.events import Resumed

A0, A1, A2 = (hotkey_of(0, replica) for replica in range(3))
MEMBERS = (A0, A1, A2)


def closing(late: Hotkey = A2, **changes: object) -> tuple[World, Uploaded]:
    """Outer step 0 is merged without one contribution that was announced; nobody has applied it yet."""
    world = World(make_spec(num_stages=1, replicas=3, **changes))
    world.start()
    for hotkey in MEMBERS:
        world.beat(hotkey, rate_bytes_per_s=1e9)
    uploaded = close_upload(world, late)
    assert world.phases == [(Phase.MERGE, 0)]
    return world, uploaded


def close_upload(world: World, *late: Hotkey) -> Uploaded:
    """All train, commit and announce; all but the late ones upload, and the phase closes."""
    said: dict[Hotkey, Uploaded] = {}
    for hotkey, num_applied in world.train().items():
        world.commit(hotkey, num_applied)
        said[hotkey] = world.contribution(hotkey, num_applied)
        world.accept(hotkey, said[hotkey].model_copy(update={"is_stored": False}))
    for hotkey, uploaded in said.items():
        if hotkey not in late:
            arrive(world, hotkey, uploaded)
    world.wait(11.0, *MEMBERS)
    return said[late[0] if late else A0]


def arrive(world: World, hotkey: Hotkey, uploaded: Uploaded) -> None:
    world.put(*uploaded.contribution.objects)
    world.accept(hotkey, uploaded)


def record_of(world: World, outer_step: int) -> MergeRecord:
    return world.core.merge(MergeQuery(stage_index=0, outer_step=outer_step))


def planned(world: World) -> list[tuple[Hotkey, int]]:
    plan = world.plan(0)
    assert plan is not None and plan.is_final
    return voices(plan.contributions)


def reducers(world: World) -> set[Hotkey]:
    plan = world.plan(0)
    assert plan is not None and plan.is_final
    return {hotkey for each in plan.partitions for hotkey in each.reducers}


def voices(contributions: tuple[Contribution, ...]) -> list[tuple[Hotkey, int]]:
    return [each.voice for each in contributions]


def test_what_is_late_is_named_and_goes_into_the_next_merge_before_all_others() -> None:
    world, uploaded = closing()
    world.merge(0)
    first = record_of(world, 0)
    assert voices(first.contributions) == [(A0, 0), (A1, 0)]
    assert first.late == (uploaded.contribution,)
    assert first.manifest.late == (A2,) and first.manifest.takes(A2)
    arrive(world, A2, uploaded)
    close_upload(world)
    plan = world.plan(0)
    assert plan is not None and plan.is_final
    assert voices(plan.contributions) == [(A2, 1), (A0, 0), (A1, 0), (A2, 0)]
    assert plan.contributions[0].objects == uploaded.contribution.objects
    assert plan.contributions[0].num_microbatches == uploaded.contribution.num_microbatches
    world.merge(0)
    second = record_of(world, 1)
    assert second.late == () and second.manifest.contributors == MEMBERS
    close_upload(world)
    plan = world.plan(0)
    assert plan is not None and voices(plan.contributions) == [(A0, 0), (A1, 0), (A2, 0)], "merged once"


def test_who_is_late_reduces_nothing_while_two_others_can() -> None:
    world, uploaded = closing(quorum=0.3)
    assert reducers(world) == {A0, A1}
    world.merge(0)
    arrive(world, A2, uploaded)
    close_upload(world, A2)
    assert reducers(world) == {A0, A1}
    world.merge(0)
    close_upload(world, A1, A2)
    assert reducers(world) & {A1, A2}, "nobody reduces alone"


def test_it_may_arrive_while_its_own_merge_is_under_way_and_waits_for_the_next() -> None:
    world, uploaded = closing()
    arrive(world, A2, uploaded)
    assert planned(world) == [(A0, 0), (A1, 0)]
    world.merge(0)
    close_upload(world, A2)
    assert planned(world) == [(A2, 1), (A0, 0), (A1, 0)]


def test_after_a_whole_outer_step_it_is_too_old() -> None:
    world, uploaded = closing()
    world.merge(0)
    close_upload(world, A2)
    assert planned(world) == [(A0, 0), (A1, 0)]
    assert world.notices("too old for outer step 1")
    assert world.refusal(A2, uploaded) is RefusalCode.WRONG_PHASE
    world.merge(0)
    assert [each.objects for each in record_of(world, 1).late] != [uploaded.contribution.objects]


def test_what_a_miner_wrote_that_left_before_it_could_say_so_is_found() -> None:
    world, uploaded = closing()
    world.put(*uploaded.contribution.objects)
    world.reduce_all(0)
    world.accept(A2, Leave(reason="x"))
    world.apply_all(0)
    close_upload(world)
    assert planned(world) == [(A2, 1), (A0, 0), (A1, 0)]


def test_only_what_was_announced_may_be_written_and_said_late() -> None:
    world, uploaded = closing()
    world.merge(0)
    refs = uploaded.contribution.objects
    world.core.check_grant(A2, UploadRequest(objects=refs))
    other = refs[0].model_copy(update={"digest": "0" * 64})
    with pytest.raises(RefusedError, match="not to be written now"):
        world.core.check_grant(A2, UploadRequest(objects=(other,)))
    with pytest.raises(RefusedError, match="another miner's"):
        world.core.check_grant(A0, UploadRequest(objects=refs))
    changed = uploaded.contribution.model_copy(update={"num_microbatches": 1})
    assert world.refusal(A2, uploaded.model_copy(update={"contribution": changed})) is RefusalCode.WRONG_PHASE
    world.core.check_grant(A0, GrantRequest(keys=tuple(ref.key for ref in refs)))


def test_nobody_says_of_its_own_that_it_is_late() -> None:
    world = World(make_spec(num_stages=1, replicas=3))
    world.start()
    num_applied = world.train()[A0]
    world.commit(A0, num_applied)
    said = world.contribution(A0, num_applied)
    aged = said.contribution.model_copy(update={"age": 1})
    assert world.refusal(A0, said.model_copy(update={"contribution": aged})) is RefusalCode.MALFORMED


def test_without_a_quorum_what_is_there_goes_into_the_next_merge() -> None:
    world = World(make_spec(num_stages=1, replicas=3, quorum=1.0))
    world.start()
    close_upload(world, A1, A2)
    while world.phases == [(Phase.UPLOAD, 0)]:
        world.wait(1.0, *MEMBERS)
    manifest = world.feed(A0).manifest
    assert manifest is not None and manifest.contributors == () and manifest.late == MEMBERS
    world.apply_all(0)
    close_upload(world)
    assert planned(world) == [(A0, 1), (A0, 0), (A1, 0), (A2, 0)]


def test_work_is_paid_as_much_as_it_weighs_where_it_was_merged() -> None:
    world, uploaded = closing()
    world.merge(0)
    arrive(world, A2, uploaded)

    def factor(outer_step: int) -> float:
        (work,) = [
            each for each in world.core.ledger(LedgerQuery()).work if (each.hotkey, each.outer_step) == (A2, outer_step)
        ]
        assert work.merge is not None
        return merge_factor(work.merge)

    assert factor(0) == 0.5
    close_upload(world)
    world.merge(0)
    assert factor(0) == 0.75
    assert factor(1) == 1.0


def test_one_of_a_miner_s_two_contributions_may_be_left_out() -> None:
    world, uploaded = closing()
    world.merge(0)
    arrive(world, A2, uploaded)
    close_upload(world)
    excluded = (Exclusion(hotkey=A2, age=1, reason="x"),)
    plan = world.plan(0)
    assert plan is not None
    for partition in plan.partitions:
        for hotkey in partition.reducers:
            world.reduce(hotkey, partition.partition_index, excluded=excluded)
    world.apply_all(0)
    copies = [copy for partition in record_of(world, 1).partitions for copy in partition.copies]
    assert copies and all(copy.excluded == () and copy.excluded_late == (A2,) for copy in copies)


def test_objects_stay_as_long_as_a_merge_that_they_are_part_of() -> None:
    world, uploaded = closing(outer_steps=12, keep_outer_steps=2, checkpoint_every=1)
    world.merge(0)
    arrive(world, A2, uploaded)
    close_upload(world)
    for _ in range(6):
        world.merge(0)
        kept = [step for step in range(8) if step in world_records(world)]
        if 1 in kept:
            assert all(ref.key in world.store for ref in uploaded.contribution.objects)
        close_upload(world)
    assert 1 not in world_records(world) and "outer/0/" in world.deleted


def world_records(world: World) -> set[int]:
    found = set()
    for outer_step in range(12):
        try:
            found.add(record_of(world, outer_step).outer_step)
        except RefusedError:
            continue
    return found


def test_a_restart_from_the_journal_knows_what_is_late() -> None:
    world, uploaded = closing()
    world.merge(0)
    again = OrchestratorCore(world.spec, random.Random(7))
    for now_s, event in world.events:
        again.handle(event, now_s)
    assert again.digest() == world.core.digest()
    world.core = again
    world.handle(Resumed())
    arrive(world, A2, uploaded)
    close_upload(world)
    assert planned(world)[0] == (A2, 1)


class TestOverlapped:
    def merged(self) -> tuple[World, Uploaded]:
        world, uploaded = closing(sync="overlapped")
        world.reduce_all(0)
        world.apply_all(0)
        assert world.phases == [(Phase.TRAIN, 1)]
        return world, uploaded

    def test_what_follows_from_a_late_upload_counts_once_that_is_there(self) -> None:
        world, _ = self.merged()
        close_upload(world)
        assert planned(world) == [(A0, 0), (A1, 0)]
        world.reduce_all(0)
        manifest = world.feed(A0).manifest
        assert manifest is not None and not manifest.takes(A2), "it began where nobody can follow"

    def test_in_order_it_counts(self) -> None:
        world, uploaded = self.merged()
        arrive(world, A2, uploaded)
        close_upload(world)
        assert planned(world) == [(A2, 1), (A0, 0), (A1, 0), (A2, 0)]

    def test_whose_process_began_anew_follows_from_nothing_late(self) -> None:
        world, _ = self.merged()
        world.accept(A2, Join(url="http://10.0.0.1:8000", device="cpu", memory_bytes=1 << 30))
        close_upload(world)
        assert planned(world) == [(A0, 0), (A1, 0), (A2, 0)]
