"""A miner's part in overlapped outer steps: the next one trains while the last one is uploaded and merged."""

from collections.abc import Sequence

from miner_kit import STATE_DIGEST, Driver, hotkey_of, object_of

from orion.common.ids import Digest, MemberState, MicrobatchId, Operation, Phase
from orion.common.protocol.messages import Applied, Manifest, MergedPartition, Uploaded
from orion.miner.effects import (
    ApplyManifest,
    Compute,
    Effect,
    FetchMerged,
    LoadAnchor,
    SendNotice,
    UploadPseudoGradient,
)
from orion.miner.events import (
    ApplyEnded,
    ComputeEnded,
    EncodePseudoGradient,
    Forward,
    ForwardDone,
    InnerStep,
    InnerStepDone,
    Job,
    LeaseRefused,
    MergedFetched,
    MergedNotFetched,
    MergedTaken,
    PseudoGradientEncoded,
    TakeMerged,
    Ticked,
    UploadEnded,
)

OBJECTS = tuple(object_of(f"part{index}") for index in range(3))
NEXT_DIGEST = Digest("b" * 64)


def jobs(effects: Sequence[Effect]) -> list[Job]:
    return [effect.job for effect in effects if isinstance(effect, Compute)]


def notices(effects: Sequence[Effect]) -> list[object]:
    return [effect.notice for effect in effects if isinstance(effect, SendNotice)]


def manifest_of(driver: Driver, outer_step: int, *contributors: str) -> Manifest:
    partitions = tuple(
        MergedPartition(partition_index=index, object=object_of(f"mean{index}"), reducers=(driver.me,))
        for index in range(3)
    )
    return Manifest(
        stage_index=0, outer_step=outer_step, partitions=partitions, contributors=contributors, total_microbatches=4
    )


def run(driver: Driver, outer_step: int, *numbers: int) -> None:
    """A single-stage miner runs these microbatches and the inner steps that they fill."""
    for number in numbers:
        driver.lease(number, outer_step=outer_step)
        effects = driver.handle(ComputeEnded(ForwardDone(MicrobatchId(number), None, 1.0)))
        if any(isinstance(job, InnerStep) for job in jobs(effects)):
            driver.handle(ComputeEnded(InnerStepDone(2, None)))
    driver.handle(LeaseRefused(None))


def ahead() -> Driver:
    """A miner that has gone on with outer step 1, while its pseudo-gradient of 0 is to be uploaded."""
    driver = Driver(0, 1, sync="overlapped")
    driver.start()
    run(driver, 0, 10, 11)
    driver.all_reports()
    driver.world.set_phase(Phase.UPLOAD, 0)
    driver.world.trains_ahead = True
    assert jobs(driver.tell()) == [EncodePseudoGradient(0)]
    driver.handle(ComputeEnded(PseudoGradientEncoded(0, OBJECTS, goes_on=True)))
    return driver


def operations(driver: Driver, outer_step: int) -> list[Operation]:
    driver.handle(Ticked(), after_s=10.0)
    driver.all_reports()
    log = driver.core.committed_log(outer_step)
    return [] if log is None else [entry.operation for entry in log]


def test_the_next_outer_step_trains_while_the_last_is_uploaded_and_merged() -> None:
    driver = ahead()
    assert jobs(driver.lease(20, outer_step=1)) == [Forward(MicrobatchId(20), 120)]
    driver.handle(ComputeEnded(ForwardDone(MicrobatchId(20), None, 1.0)))
    driver.all_reports()
    (upload,) = [effect for effect in driver.tell() if isinstance(effect, UploadPseudoGradient)] or [
        UploadPseudoGradient(0, OBJECTS)
    ]
    assert upload == UploadPseudoGradient(0, OBJECTS)
    (told,) = notices(driver.handle(UploadEnded(0, succeeded=True)))
    assert isinstance(told, Uploaded)
    assert (told.outer_step, told.contribution.num_microbatches) == (0, 2)

    driver.world.set_phase(Phase.MERGE, 0)
    driver.world.manifest = manifest_of(driver, 0, driver.me)
    assert FetchMerged(driver.world.manifest) in driver.tell()
    driver.lease(21, outer_step=1)
    # Before anything else is given to the device, but not in the middle of a job.
    assert jobs(driver.handle(MergedFetched(0, NEXT_DIGEST))) == []
    effects = driver.handle(ComputeEnded(ForwardDone(MicrobatchId(21), None, 1.0)))
    assert jobs(effects) == [TakeMerged(0)]
    assert driver.core.ready_step == 0
    effects = driver.handle(ComputeEnded(MergedTaken(0)))
    assert notices(effects) == [Applied(outer_step=0, state_digest=NEXT_DIGEST)]
    assert [type(job) for job in jobs(effects)] == [InnerStep]
    assert driver.core.ready_step == 1
    driver.handle(ComputeEnded(InnerStepDone(2, None)))
    assert operations(driver, 1) == [
        Operation.BEGIN_AHEAD,
        Operation.FORWARD,
        Operation.FORWARD,
        Operation.TAKE_MERGED,
        Operation.INNER_STEP,
    ]

    driver.world.set_phase(Phase.UPLOAD, 1)
    assert jobs(driver.tell()) == [EncodePseudoGradient(1, adds_error=True)]


def test_a_merge_that_comes_before_any_work_is_taken_in_as_well() -> None:
    driver = ahead()
    driver.world.set_phase(Phase.MERGE, 0)
    driver.world.manifest = manifest_of(driver, 0, driver.me)
    driver.tell()
    assert jobs(driver.handle(MergedFetched(0, NEXT_DIGEST))) == [TakeMerged(0)]
    driver.handle(ComputeEnded(MergedTaken(0)))
    assert operations(driver, 1) == [Operation.BEGIN_AHEAD, Operation.TAKE_MERGED]


def test_means_that_cannot_be_fetched_are_fetched_again() -> None:
    driver = ahead()
    driver.world.set_phase(Phase.MERGE, 0)
    driver.world.manifest = manifest_of(driver, 0, driver.me)
    driver.tell()
    assert not [each for each in driver.tell() if isinstance(each, FetchMerged)], "once at a time"
    driver.handle(MergedNotFetched(0, "lost"))
    assert FetchMerged(driver.world.manifest) in driver.handle(Ticked(), after_s=1.0)


def test_who_was_left_out_begins_the_outer_step_anew_at_its_anchor() -> None:
    driver = ahead()
    run(driver, 1, 20)
    driver.world.set_phase(Phase.MERGE, 0)
    driver.world.manifest = manifest_of(driver, 0, hotkey_of(0, 1))
    assert ApplyManifest(driver.world.manifest) in driver.tell()
    effects = driver.handle(ApplyEnded(0, NEXT_DIGEST))
    assert Applied(outer_step=0, state_digest=NEXT_DIGEST) in notices(effects)
    driver.world.set_phase(Phase.TRAIN, 1)
    driver.world.trains_ahead = False
    driver.tell()
    run(driver, 1, 30)
    found = operations(driver, 1)
    assert found == [Operation.BEGIN_AHEAD, Operation.FORWARD, Operation.BEGIN_ANEW, Operation.FORWARD]


def test_who_is_late_takes_in_the_merge_and_uploads_what_follows_after_what_is_late() -> None:
    driver = ahead()
    run(driver, 1, 20, 21)
    driver.all_reports()
    driver.world.set_phase(Phase.MERGE, 0)
    driver.world.manifest = manifest_of(driver, 0, hotkey_of(0, 1)).model_copy(update={"late": (driver.me,)})
    assert FetchMerged(driver.world.manifest) in driver.tell()
    assert jobs(driver.handle(MergedFetched(0, NEXT_DIGEST))) == [TakeMerged(0)]
    driver.handle(ComputeEnded(MergedTaken(0)))
    driver.world.set_phase(Phase.UPLOAD, 1)
    assert EncodePseudoGradient(1, adds_error=True) in jobs(driver.tell())
    driver.all_reports()
    following = tuple(object_of(f"next{index}") for index in range(3))
    effects = driver.handle(ComputeEnded(PseudoGradientEncoded(1, following, goes_on=True)))
    effects += driver.handle(Ticked(), after_s=10.0)
    driver.all_reports()
    effects += driver.tell()
    told = [notice for notice in notices(effects) if isinstance(notice, Uploaded) and notice.outer_step == 1]
    assert told and not any(notice.is_stored for notice in told), "announced at once"
    assert UploadPseudoGradient(1, following) not in effects, "and uploaded in its turn"
    assert UploadPseudoGradient(1, following) in driver.handle(UploadEnded(0, succeeded=True))


def test_nobody_goes_on_from_a_pseudo_gradient_that_could_not_be_encoded() -> None:
    driver = Driver(0, 1, sync="overlapped")
    driver.start()
    run(driver, 0, 10, 11)
    driver.all_reports()
    driver.world.set_phase(Phase.UPLOAD, 0)
    driver.world.trains_ahead = True
    driver.tell()
    driver.handle(ComputeEnded(PseudoGradientEncoded(0, ())))
    assert jobs(driver.lease(20, outer_step=1)) == []
    driver.world.set_phase(Phase.MERGE, 0)
    driver.world.manifest = manifest_of(driver, 0, hotkey_of(0, 1))
    assert ApplyManifest(driver.world.manifest) in driver.tell()


def test_a_member_that_is_sent_back_meanwhile_builds_its_anchor_anew() -> None:
    driver = ahead()
    run(driver, 1, 20)
    driver.world.state = MemberState.JOINING
    assert LoadAnchor(0, 0, None) in driver.tell()
    assert STATE_DIGEST != NEXT_DIGEST
