"""Means reduced again: who is looked at, what a wrong copy costs, and what the validator could not do."""

import random

import pytest
from validator_world import World
from working_miner import hotkey, make_spec

from orion.common.ids import Digest, Hotkey, Phase, Subject
from orion.common.protocol.messages import Contribution, Manifest, MergedPartition, ObjectRef
from orion.common.protocol.records import MergeRecord, PartitionRecord, ReducedCopy
from orion.validator.events import FetchMerge, Reduce, ReductionEnded, ReductionUnavailable
from orion.validator.reduction_check import TRIES, Draw, ReductionCheck, draw_partitions, is_vouched_for, wrong_copies

SPEC = make_spec(num_stages=1, validation={"checks_per_outer_step": 0, "reductions_per_outer_step": 2})
GOOD, BAD = Digest("a" * 64), Digest("b" * 64)
A, B, C = (hotkey(0, replica) for replica in range(3))


def ref(digest: Digest = GOOD) -> ObjectRef:
    return ObjectRef(key="outer/0/mean", digest=digest, size_bytes=10)


def copy_of(reducer: Hotkey, digest: Digest = GOOD, *excluded: Hotkey) -> ReducedCopy:
    return ReducedCopy(reducer=reducer, object=ref(digest), excluded=excluded)


def partition(index: int, *copies: ReducedCopy) -> PartitionRecord:
    return PartitionRecord(partition_index=index, asked=tuple(copy.reducer for copy in copies), copies=copies)


def record(*partitions: PartitionRecord) -> MergeRecord:
    manifest = Manifest(
        stage_index=0,
        outer_step=0,
        partitions=tuple(
            MergedPartition(partition_index=index, object=None, reducers=()) for index in range(len(partitions))
        ),
        contributors=(A,),
        total_microbatches=4,
    )
    contribution = Contribution(hotkey=A, num_microbatches=4, objects=(ref(),))
    return MergeRecord(
        stage_index=0, outer_step=0, contributions=(contribution,), partitions=partitions, manifest=manifest
    )


def honest(index: int, *excluded: Hotkey) -> ReductionEnded:
    return ReductionEnded(0, 0, index, GOOD, excluded, 0.0)


def test_partitions_that_nobody_vouched_for_twice_come_first() -> None:
    single, disputed = partition(4, copy_of(A)), partition(5, copy_of(A), copy_of(B, BAD))
    other = partition(6, copy_of(A), copy_of(B, GOOD, C))
    good = [partition(index, copy_of(A), copy_of(B)) for index in range(4)]
    assert [is_vouched_for(each) for each in (single, disputed, other, good[0])] == [False, False, False, True]
    drawn_fourth = set()
    for seed in range(100):
        drawn = draw_partitions([record(*good, single, disputed, other, partition(7))], 4, random.Random(seed))
        indices = [draw.partition.partition_index for draw in drawn]
        assert set(indices[:3]) == {4, 5, 6}
        drawn_fourth.add(indices[3])
    assert drawn_fourth == {0, 1, 2, 3}, "the rest is anybody's; what nobody reduced is not looked at"


def test_every_copy_is_compared_with_the_honest_one() -> None:
    copies = partition(3, copy_of(A), copy_of(B, BAD), copy_of(C, GOOD, A))
    found = wrong_copies(Draw(record(copies), copies), honest(3))
    assert found[A] is None
    assert "not that of the contributions" in str(found[B])
    assert "left out others" in str(found[C])
    nothing = wrong_copies(Draw(record(copies), copies), ReductionEnded(0, 0, 3, None, (A,), 0.0))
    assert all(nothing.values()), "where nothing is fit, any mean is made up"


def world_of(*partitions: PartitionRecord) -> World:
    return World(
        SPEC,
        {},
        merges={0: record(*partitions)},
        reduced={(0, each.partition_index): honest(each.partition_index) for each in partitions},
    )


def test_two_reducers_that_collude_are_both_named() -> None:
    world = world_of(partition(0, copy_of(A, BAD), copy_of(B, BAD)), partition(1, copy_of(B), copy_of(C)))
    world.give_feed(phase=Phase.TRAIN, outer_step=1)
    verdicts = {(verdict.miner, verdict.passed) for verdict in world.verdicts.values()}
    assert verdicts == {(A, False), (B, False), (C, True)}
    assert all(verdict.subject is Subject.REDUCTION for verdict in world.verdicts.values())
    assert world.verdicts[B].num_operations == 2
    assert "stage 0, partition 0" in world.verdicts[B].reason
    assert (world.core.num_checks, world.core.num_failed) == (3, 2)
    assert {notice.fields["miner"] for notice in world.notices if notice.event == "wrong_mean"} == {A, B}


def test_nothing_is_looked_at_before_the_merge_is_over() -> None:
    world = world_of(partition(0, copy_of(A), copy_of(B)))
    world.give_feed(phase=Phase.MERGE, outer_step=0)
    world.pass_time(5)
    assert not any(isinstance(effect, FetchMerge | Reduce) for effect in world.effects)
    world.give_feed(phase=Phase.TRAIN, outer_step=1)
    assert {verdict.passed for verdict in world.verdicts.values()} == {True}


def test_what_the_validator_could_not_do_is_said_and_gives_no_verdict() -> None:
    world = world_of(partition(0, copy_of(A), copy_of(B)))
    world.reduced.clear()
    world.give_feed(phase=Phase.TRAIN, outer_step=1)
    assert not world.verdicts
    assert [notice.event for notice in world.notices if notice.level == "warning"] == ["reduction_undecided"]


def test_a_merge_that_nobody_knows_ends_the_round_all_the_same() -> None:
    world = World(SPEC, {})
    world.give_feed(phase=Phase.TRAIN, outer_step=1)
    assert not world.verdicts
    assert "merge_not_known" in [notice.event for notice in world.notices]
    world.merges[0] = record(partition(0, copy_of(A), copy_of(B)))
    world.give_feed(phase=Phase.DONE, outer_step=1, finished=True)
    world.pass_time(400)
    assert world.core.is_done


def test_an_attempt_is_repeated_with_a_bound() -> None:
    check = ReductionCheck(SPEC, 0, random.Random(0))
    check.on_merge(0, record(partition(0, copy_of(A))))
    now_s = 0.0
    for _ in range(TRIES):
        assert not check.is_over
        assert len(check.pump(now_s)) == 1
        assert not check.pump(now_s), "one at a time"
        check.on_unavailable(ReductionUnavailable(0, 0, 0, "planted", retry=True), now_s)
        assert not check.pump(now_s), "not at once"
        now_s += 10.0
    assert check.is_over and not check.verdicts()


@pytest.mark.parametrize(
    "event", [honest(1), ReductionEnded(0, 1, 0, BAD, (), 0.0), ReductionEnded(1, 0, 0, BAD, (), 0.0)]
)
def test_answers_that_nobody_waits_for_change_nothing(event: ReductionEnded) -> None:
    check = ReductionCheck(SPEC, 0, random.Random(0))
    check.on_merge(0, record(partition(0, copy_of(A))))
    check.on_reduced(honest(0))
    check.pump(0.0)
    check.on_reduced(event)
    assert not check.is_over
    check.on_reduced(honest(0))
    check.on_reduced(honest(0))
    assert check.is_over
    assert [(verdict.miner, verdict.passed) for verdict in check.verdicts()] == [(A, True)]
