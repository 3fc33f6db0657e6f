"""Reductions: what is fetched ahead of its use, and who writes."""

import pytest
from miner_kit import Driver, hotkey_of, object_of

from orion.common.ids import Phase
from orion.common.protocol.messages import Contribution, MergePlan, ObjectRef, PartitionPlan, Reduced
from orion.miner import reducing
from orion.miner.effects import Effect, FetchMean, FetchSlices, ReducePartition, SendNotice
from orion.miner.events import MeanFetched, ReduceEnded, SlicesFetched, Ticked

OTHER = hotkey_of(1, 1)


def plan_of(
    driver: Driver, *, is_final: bool, writers: tuple[int, ...] = (), settled: tuple[int, ...] = ()
) -> MergePlan:
    """Everything is reduced by this miner and the other one; of these partitions it is this one that writes."""
    objects = tuple(object_of(f"part{index}") for index in range(3))
    return MergePlan(
        stage_index=1,
        outer_step=0,
        is_final=is_final,
        contributions=(Contribution(hotkey=OTHER, num_microbatches=4, objects=objects),),
        partitions=tuple(
            PartitionPlan(
                partition_index=index,
                reducers=(driver.me, OTHER),
                writers=(driver.me,) if index in writers else (OTHER,),
                settled=mean_of(index) if index in settled else None,
            )
            for index in range(3)
        ),
    )


def mean_of(index: int) -> ObjectRef:
    return object_of(f"mean{index}")


def partitions(effects: list[Effect], kind: type[FetchSlices | FetchMean | ReducePartition]) -> list[int]:
    return [effect.partition_index for effect in effects if isinstance(effect, kind)]


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch) -> Driver:
    monkeypatch.setattr(reducing, "FETCHES_MAX", 2)  # fewer than the plan has partitions
    driver = Driver(1)
    driver.start()
    return driver


def show(driver: Driver, phase: Phase, plan: MergePlan) -> list[Effect]:
    driver.world.set_phase(phase, 0)
    driver.world.merge_plan = plan
    return driver.tell()


def test_slices_are_fetched_while_others_still_upload_and_nothing_is_reduced(driver: Driver) -> None:
    effects = show(driver, Phase.UPLOAD, plan_of(driver, is_final=False))
    assert partitions(effects, FetchSlices) == [0, 1] and partitions(effects, ReducePartition) == []
    effects = driver.handle(SlicesFetched(0, 0, True))
    assert partitions(effects, FetchSlices) == [2]


def test_what_was_not_there_yet_is_looked_for_again(driver: Driver) -> None:
    show(driver, Phase.UPLOAD, plan_of(driver, is_final=False))
    driver.handle(SlicesFetched(0, 1, True))
    assert partitions(driver.handle(SlicesFetched(0, 0, False)), FetchSlices) == []
    driver.handle(SlicesFetched(0, 2, True))
    assert partitions(driver.handle(Ticked(), after_s=reducing.FETCH_PAUSE_S), FetchSlices) == [0]


def test_a_reduction_waits_for_slices_that_are_on_their_way_and_for_no_others(driver: Driver) -> None:
    show(driver, Phase.UPLOAD, plan_of(driver, is_final=False))
    driver.handle(SlicesFetched(0, 0, True))
    driver.handle(SlicesFetched(0, 2, False))

    effects = show(driver, Phase.MERGE, plan_of(driver, is_final=True, writers=(0,)))

    reduced = [effect for effect in effects if isinstance(effect, ReducePartition)]
    assert [(effect.partition_index, effect.writes) for effect in reduced] == [(0, True), (2, False)]
    assert partitions(driver.handle(SlicesFetched(0, 1, True)), ReducePartition) == [1]


def test_who_does_not_write_says_what_its_mean_is_and_writes_when_it_is_asked(driver: Driver) -> None:
    show(driver, Phase.MERGE, plan_of(driver, is_final=True))
    effects = driver.handle(ReduceEnded(0, 0, mean_of(0), (), is_stored=False))
    told = Reduced(outer_step=0, partition_index=0, object=mean_of(0), is_stored=False)
    assert SendNotice(told) in effects
    assert partitions(driver.handle(Ticked(), after_s=10.0), ReducePartition) == []
    driver.handle(ReduceEnded(0, 1, mean_of(1), (), is_stored=False))

    effects = show(driver, Phase.MERGE, plan_of(driver, is_final=True, writers=(0,)))

    assert [(effect.partition_index, effect.writes) for effect in effects if isinstance(effect, ReducePartition)] == [
        (0, True)
    ]
    effects = driver.handle(ReduceEnded(0, 0, mean_of(0), ()))
    assert SendNotice(told.model_copy(update={"is_stored": True})) in effects
    assert partitions(driver.handle(Ticked(), after_s=10.0), ReducePartition) == []


def test_means_that_are_written_do_not_hold_up_those_that_are_only_told(
    driver: Driver, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reducing, "REDUCTIONS_MAX", 1)
    effects = show(driver, Phase.MERGE, plan_of(driver, is_final=True, writers=(0, 1)))
    assert partitions(effects, ReducePartition) == [0, 2], "one that is written, and one that is not"
    assert partitions(driver.handle(ReduceEnded(0, 2, mean_of(2), (), is_stored=False)), ReducePartition) == []
    assert partitions(driver.handle(ReduceEnded(0, 0, mean_of(0), ())), ReducePartition) == [1]


def test_means_of_others_are_fetched_as_they_settle(driver: Driver) -> None:
    effects = show(driver, Phase.MERGE, plan_of(driver, is_final=True, settled=(1,)))
    assert partitions(effects, ReducePartition) == [0, 2] and partitions(effects, FetchMean) == [1]
    driver.handle(MeanFetched(0, 1, True))
    driver.handle(ReduceEnded(0, 0, mean_of(0), ()))
    effects = show(driver, Phase.MERGE, plan_of(driver, is_final=True, settled=(0, 1)))
    assert partitions(effects, FetchMean) == [], "its own means are here"


def test_what_is_held_ahead_is_bounded(driver: Driver, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reducing, "FETCHED_BYTES_MAX", 15)
    effects = show(driver, Phase.UPLOAD, plan_of(driver, is_final=False))
    assert partitions(effects, FetchSlices) == [0], "ten bytes a partition"
    assert partitions(driver.handle(SlicesFetched(0, 0, True)), FetchSlices) == []


def test_a_plan_of_the_next_outer_step_waits_until_the_last_one_s_fetches_have_ended(driver: Driver) -> None:
    show(driver, Phase.UPLOAD, plan_of(driver, is_final=False))
    driver.world.set_phase(Phase.UPLOAD, 1)
    driver.world.merge_plan = plan_of(driver, is_final=False).model_copy(update={"outer_step": 1})
    assert partitions(driver.tell(), FetchSlices) == []
    driver.handle(SlicesFetched(0, 0, False))
    assert partitions(driver.handle(SlicesFetched(0, 1, False)), FetchSlices) == [0, 1]
