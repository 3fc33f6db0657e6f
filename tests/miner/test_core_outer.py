"""MinerCore around the train phase: membership, anchors, inner steps left over, upload, merge, checkpoints."""

from random import Random

import pytest
from miner_kit import STATE_DIGEST, Driver, digest_of, hotkey_of, object_of

from orion.common.ids import Digest, MemberState, MicrobatchId, Operation, Phase
from orion.common.protocol.log import log_root
from orion.common.protocol.messages import (
    Applied,
    CheckpointRef,
    CheckpointUploaded,
    Contribution,
    Joined,
    Manifest,
    MergedPartition,
    MergePlan,
    PartitionPlan,
    Reduced,
    Uploaded,
)
from orion.miner.core import MinerCore
from orion.miner.effects import (
    ApplyManifest,
    Compute,
    Effect,
    LoadAnchor,
    ReducePartition,
    RequestJoin,
    RequestLease,
    SendNotice,
    SendReport,
    UploadCheckpoint,
    UploadPseudoGradient,
)
from orion.miner.events import (
    AnchorFailed,
    AnchorLoaded,
    ApplyEnded,
    ApplyFailed,
    CheckpointEnded,
    ComputeEnded,
    EncodePseudoGradient,
    FeedArrived,
    ForwardDone,
    InnerStep,
    InnerStepDone,
    JoinEnded,
    LeaseRefused,
    Notice,
    NoticeEnded,
    PseudoGradientEncoded,
    ReduceEnded,
    ReduceFailed,
    ReportEnded,
    SendOutcome,
    Ticked,
    UploadEnded,
)

OBJECTS = tuple(object_of(f"part{index}") for index in range(3))
NEXT_DIGEST = Digest("b" * 64)


def notices(effects: list[Effect]) -> list[Notice]:
    return [effect.notice for effect in effects if isinstance(effect, SendNotice)]


def manifest_of(driver: Driver, outer_step: int) -> Manifest:
    partitions = tuple(
        MergedPartition(partition_index=index, object=object_of(f"mean{index}"), reducers=(driver.me,))
        for index in range(3)
    )
    return Manifest(
        stage_index=driver.stage_index,
        outer_step=outer_step,
        partitions=partitions,
        contributors=(driver.me,),
        total_microbatches=4,
    )


def plan_of(driver: Driver, outer_step: int, *mine: int) -> MergePlan:
    contribution = Contribution(hotkey=driver.me, num_microbatches=4, objects=OBJECTS)
    other = hotkey_of(driver.stage_index, 1)
    partitions = tuple(
        PartitionPlan(partition_index=index, reducers=(driver.me, other) if index in mine else (other,))
        for index in range(3)
    )
    return MergePlan(
        stage_index=driver.stage_index, outer_step=outer_step, contributions=(contribution,), partitions=partitions
    )


def train(driver: Driver, num_microbatches: int) -> None:
    """A single-stage miner runs that many microbatches of outer step 0, and the inner steps that they fill."""
    driver.start()
    num_run = 0
    while num_run < num_microbatches:
        number = 10 + num_run
        driver.lease(number)
        effects = driver.handle(ComputeEnded(ForwardDone(MicrobatchId(number), None, 1.0)))
        num_run += 1
        if any(isinstance(effect, Compute) and isinstance(effect.job, InnerStep) for effect in effects):
            driver.handle(ComputeEnded(InnerStepDone(2, None)))
    driver.handle(LeaseRefused(None))


def upload_phase(driver: Driver) -> list[Effect]:
    driver.world.set_phase(Phase.UPLOAD, 0)
    return driver.tell()


# --- membership and anchors -------------------------------------------------------------------------------------------


def test_a_newcomer_joins_builds_its_anchor_and_says_so() -> None:
    driver = Driver(1)
    driver.world.state = None
    assert driver.tell() == [RequestJoin()]
    assert driver.tell() == [], "once at a time"
    driver.handle(JoinEnded(None))
    assert driver.handle(Ticked(), after_s=1.1) == [RequestJoin()]

    driver.world.state = MemberState.JOINING
    assert driver.tell() == [LoadAnchor(1, 0, None)]
    assert driver.core.heartbeat(0, 0).ready_outer_step is None
    assert driver.handle(AnchorLoaded(1, 0, STATE_DIGEST)) == []
    assert driver.core.heartbeat(0, 0).ready_outer_step == 0
    driver.world.state = MemberState.READY
    assert driver.tell() == []


def test_a_process_that_starts_anew_joins_although_its_hotkey_is_a_member() -> None:
    driver = Driver(1)
    fresh = MinerCore(driver.spec, driver.me, Random(1))
    now_s = driver.now_s
    assert driver.world.state is MemberState.ACTIVE
    assert fresh.handle(FeedArrived(driver.world.feed()), now_s) == [RequestJoin()]
    assert fresh.heartbeat(0, 0).ready_outer_step is None
    joined = JoinEnded(Joined(stage_index=1, state=MemberState.ACTIVE))
    assert fresh.handle(joined, now_s) == [LoadAnchor(1, 0, None)]


def test_an_anchor_that_could_not_be_built_is_tried_again_later() -> None:
    driver = Driver(1)
    driver.tell()

    assert driver.handle(AnchorFailed("store is away")) == []
    wake_s = driver.core.next_wake_s(driver.now_s)
    assert wake_s is not None and 0 < wake_s - driver.now_s < 1
    assert driver.handle(Ticked(), after_s=0.3) == [LoadAnchor(1, 0, None)]


def test_a_newcomer_starts_from_the_newest_checkpoint() -> None:
    driver = Driver(1)
    driver.world.set_phase(Phase.TRAIN, 3)
    checkpoint = CheckpointRef(stage_index=1, outer_step=2, object=object_of("c"), state_digest=NEXT_DIGEST)
    driver.world.checkpoint = checkpoint

    assert driver.tell() == [LoadAnchor(1, 3, checkpoint)]


def test_another_stage_is_followed() -> None:
    driver = Driver(1)
    driver.start()
    driver.world.stage_index = 2

    assert driver.tell() == [LoadAnchor(2, 0, None)]


@pytest.mark.parametrize("seen", [MemberState.JOINING, MemberState.READY])
def test_a_member_that_fell_back_builds_its_anchor_anew(seen: MemberState) -> None:
    driver = Driver(1)
    driver.start()
    driver.world.state = seen

    assert driver.tell() == [LoadAnchor(1, 0, None)]
    assert driver.core.heartbeat(0, 0).ready_outer_step is None


def test_another_digest_than_the_agreed_one_means_building_anew() -> None:
    driver = Driver(1)
    driver.start()
    checkpoint = CheckpointRef(stage_index=1, outer_step=0, object=object_of("c"), state_digest=NEXT_DIGEST)
    driver.world.checkpoint = checkpoint

    assert driver.tell() == [LoadAnchor(1, 0, checkpoint)]


def test_who_was_thrown_out_joins_again_and_builds_anew() -> None:
    driver = Driver(1)
    driver.start()
    driver.world.state = None
    assert driver.tell() == [RequestJoin()]
    driver.world.state = MemberState.JOINING

    assert driver.tell() == [LoadAnchor(1, 0, None)]


# --- the end of training ----------------------------------------------------------------------------------------------


def test_what_is_left_over_makes_a_smaller_last_step_then_commit_then_upload() -> None:
    driver = Driver(0, num_stages=1)
    train(driver, 3)

    effects = upload_phase(driver)
    assert effects == [Compute(InnerStep(1, 0.5))]
    effects = driver.handle(ComputeEnded(InnerStepDone(1, None)))
    assert Compute(EncodePseudoGradient(0)) in effects
    effects = driver.handle(ComputeEnded(PseudoGradientEncoded(0, OBJECTS)))
    assert not any(isinstance(effect, UploadPseudoGradient) for effect in effects), "the commitment comes first"

    reports = driver.all_reports()
    log = driver.core.committed_log(0)
    assert log is not None
    assert [entry.operation for entry in log].count(Operation.INNER_STEP) == 2
    commitment = [report.commitment for report in reports if report.commitment is not None][-1]
    assert (commitment.num_applied, commitment.num_contributed, commitment.num_entries) == (3, 3, 5)
    assert commitment.is_final
    assert commitment.root == log_root(log)
    assert driver.core.committed_log(1) is None


def committed_and_encoded(driver: Driver) -> list[Effect]:
    """Trained, committed and encoded; what comes of the acknowledgement of the commitment."""
    train(driver, 4)
    upload_phase(driver)
    driver.handle(ComputeEnded(PseudoGradientEncoded(0, OBJECTS)))
    effects: list[Effect] = []
    acknowledged = 0
    while not any(isinstance(effect, UploadPseudoGradient) for effect in effects):
        assert acknowledged < len(driver.reports), "no commitment was reported"
        effects = driver.handle(ReportEnded(driver.reports[acknowledged].sequence, True))
        acknowledged += 1
    return effects


def test_the_upload_is_told_until_it_is_acknowledged() -> None:
    driver = Driver(0, num_stages=1)
    assert UploadPseudoGradient(0, OBJECTS) in committed_and_encoded(driver)

    effects = driver.handle(UploadEnded(0, True))
    contribution = Contribution(hotkey=driver.me, num_microbatches=4, objects=OBJECTS)
    uploaded = Uploaded(outer_step=0, contribution=contribution)
    assert notices(effects) == [uploaded]
    driver.handle(NoticeEnded(uploaded, SendOutcome.UNREACHABLE))
    assert notices(driver.handle(Ticked(), after_s=0.3)) == [uploaded]
    driver.handle(NoticeEnded(uploaded, SendOutcome.ACCEPTED))
    assert notices(driver.handle(Ticked(), after_s=60)) == []


def test_an_upload_that_failed_is_repeated_for_as_long_as_it_can_be_merged() -> None:
    driver = Driver(0, num_stages=1)
    committed_and_encoded(driver)

    assert driver.handle(UploadEnded(0, False)) == []
    assert driver.handle(Ticked(), after_s=0.3) == [UploadPseudoGradient(0, OBJECTS)]
    driver.world.set_phase(Phase.MERGE, 0)
    driver.tell()
    driver.handle(UploadEnded(0, False))
    assert driver.handle(Ticked(), after_s=30) == [UploadPseudoGradient(0, OBJECTS)], "it may be late"
    driver.handle(UploadEnded(0, False))
    driver.world.manifest = manifest_of(driver, 0).model_copy(update={"contributors": ()})
    driver.tell()
    assert driver.handle(Ticked(), after_s=30) == [], "it is not"


def applied_without(driver: Driver) -> None:
    """The manifest names this miner as late, and it stands at the next anchor; its upload is under way."""
    committed_and_encoded(driver)
    driver.world.set_phase(Phase.MERGE, 0)
    driver.world.manifest = manifest_of(driver, 0).model_copy(update={"contributors": (), "late": (driver.me,)})
    assert ApplyManifest(driver.world.manifest) in driver.tell()
    driver.handle(ApplyEnded(0, NEXT_DIGEST))
    driver.world.set_phase(Phase.TRAIN, 1)
    driver.tell()


def test_what_is_late_is_uploaded_while_the_next_outer_step_trains() -> None:
    driver = Driver(0, num_stages=1)
    applied_without(driver)
    driver.handle(UploadEnded(0, False))
    assert UploadPseudoGradient(0, OBJECTS) in driver.handle(Ticked(), after_s=1)
    uploaded = Uploaded(outer_step=0, contribution=Contribution(hotkey=driver.me, num_microbatches=4, objects=OBJECTS))
    assert uploaded in notices(driver.handle(UploadEnded(0, True)))
    driver.handle(NoticeEnded(uploaded, SendOutcome.UNREACHABLE))
    assert uploaded in notices(driver.handle(Ticked(), after_s=1)), "told until it is acknowledged"


def test_what_is_late_is_too_old_once_the_next_merge_has_begun() -> None:
    driver = Driver(0, num_stages=1)
    applied_without(driver)
    driver.handle(UploadEnded(0, False))
    driver.world.set_phase(Phase.MERGE, 1)
    driver.tell()
    effects = driver.handle(Ticked(), after_s=30)
    assert not [effect for effect in effects if isinstance(effect, UploadPseudoGradient)]


def test_who_did_nothing_says_so_and_uploads_nothing() -> None:
    driver = Driver(0, num_stages=1)
    driver.start()

    effects = upload_phase(driver)

    assert [type(effect) for effect in effects] == [SendReport]
    (commitment,) = [report.commitment for report in driver.all_reports()]
    assert commitment is not None and (commitment.num_entries, commitment.num_applied) == (0, 0)


def test_a_refused_inner_step_does_not_count_as_work() -> None:
    driver = Driver(0, num_stages=1)
    train(driver, 1)
    upload_phase(driver)

    effects = driver.handle(ComputeEnded(InnerStepDone(1, "the gradient is not finite")))

    assert not any(isinstance(effect, Compute) for effect in effects)


def test_the_end_of_training_waits_for_the_device() -> None:
    driver = Driver(0, num_stages=1)
    driver.start()
    driver.lease(1)

    assert upload_phase(driver) == []
    effects = driver.handle(ComputeEnded(ForwardDone(MicrobatchId(1), None, 1.0)))
    assert Compute(InnerStep(0, 0.5)) in effects


# --- merge ------------------------------------------------------------------------------------------------------------


def merge_phase(driver: Driver, *mine: int) -> list[Effect]:
    driver.world.set_phase(Phase.MERGE, 0)
    driver.world.merge_plan = plan_of(driver, 0, *mine)
    return driver.tell()


def test_reducers_reduce_their_partitions_a_few_at_a_time_and_tell() -> None:
    driver = Driver(1)
    driver.start()

    effects = merge_phase(driver, 0, 1, 2)
    assert [effect.partition_index for effect in effects if isinstance(effect, ReducePartition)] == [0, 1]
    effects = driver.handle(ReduceEnded(0, 0, object_of("mean0"), ()))
    assert [effect.partition_index for effect in effects if isinstance(effect, ReducePartition)] == [2]
    assert notices(effects) == [Reduced(outer_step=0, partition_index=0, object=object_of("mean0"))]
    assert driver.handle(ReduceFailed(0, 1, "store is away")) == []
    effects = driver.handle(Ticked(), after_s=0.3)
    assert [effect.partition_index for effect in effects if isinstance(effect, ReducePartition)] == [1]


def test_a_third_reducer_is_called_by_a_later_plan() -> None:
    driver = Driver(1)
    driver.start()
    assert merge_phase(driver) == []

    effects = merge_phase(driver, 2)

    assert [effect.partition_index for effect in effects if isinstance(effect, ReducePartition)] == [2]


def test_the_manifest_is_applied_told_and_training_goes_on() -> None:
    driver = Driver(0, num_stages=1)
    train(driver, 2)
    driver.world.set_phase(Phase.MERGE, 0)
    driver.world.manifest = manifest_of(driver, 0)

    assert ApplyManifest(manifest_of(driver, 0)) in driver.tell()
    effects = driver.handle(ApplyEnded(0, NEXT_DIGEST))
    assert notices(effects) == [Applied(outer_step=0, state_digest=NEXT_DIGEST)]
    assert driver.core.heartbeat(0, 0).ready_outer_step == 1
    driver.world.set_phase(Phase.TRAIN, 1)
    assert any(isinstance(effect, RequestLease) for effect in driver.tell())


def test_an_apply_that_failed_is_repeated() -> None:
    driver = Driver(1)
    driver.start()
    driver.world.set_phase(Phase.MERGE, 0)
    driver.world.manifest = manifest_of(driver, 0)
    driver.tell()

    assert driver.handle(ApplyFailed(0, "store is away")) == []
    assert driver.handle(Ticked(), after_s=0.3) == [ApplyManifest(manifest_of(driver, 0))]


@pytest.mark.parametrize("num_skipped", [1, 2])
def test_feeds_may_be_skipped(num_skipped: int) -> None:
    """From the middle of training straight to the train phase of a later outer step."""
    driver = Driver(0, num_stages=1)
    train(driver, 3)
    driver.world.set_phase(Phase.TRAIN, num_skipped)
    driver.world.manifest = manifest_of(driver, num_skipped - 1)

    effects = driver.tell()

    if num_skipped == 1:
        assert ApplyManifest(manifest_of(driver, 0)) in effects
        effects = driver.handle(ApplyEnded(0, NEXT_DIGEST))
    else:
        assert LoadAnchor(0, 2, None) in effects
        effects = driver.handle(AnchorLoaded(0, 2, NEXT_DIGEST))
    assert any(isinstance(effect, RequestLease) for effect in effects)
    assert notices(effects) == [], "nobody waits for that any more"


def test_older_feeds_are_ignored() -> None:
    driver = Driver(1)
    old = driver.world.feed()
    driver.start()

    driver.world.state = None
    assert driver.handle(FeedArrived(old)) == []


def test_the_last_anchor_is_uploaded_by_whom_is_asked() -> None:
    driver = Driver(1)
    driver.start()
    driver.world.set_phase(Phase.MERGE, 1)
    driver.world.manifest = manifest_of(driver, 0)
    driver.world.checkpoint_by = driver.me
    driver.tell()

    effects = driver.handle(ApplyEnded(0, NEXT_DIGEST))
    assert UploadCheckpoint(1, 1) in effects
    driver.handle(CheckpointEnded(1, None))
    assert driver.handle(Ticked(), after_s=0.3) == [UploadCheckpoint(1, 1)]
    effects = driver.handle(CheckpointEnded(1, object_of("c")))
    expected = CheckpointUploaded(outer_step=1, object=object_of("c"), state_digest=NEXT_DIGEST)
    assert notices(effects) == [expected]
    assert driver.handle(NoticeEnded(expected, SendOutcome.ACCEPTED)) == []
    assert driver.handle(Ticked(), after_s=30) == []


def test_it_is_finished_when_everything_was_told() -> None:
    driver = Driver(0, num_stages=1)
    train(driver, 2)
    driver.world.set_phase(Phase.DONE, 0)
    driver.world.finished = True
    driver.tell()
    assert not driver.core.is_finished

    driver.all_reports()

    assert driver.core.is_finished
    assert not any(isinstance(effect, SendReport | RequestLease) for effect in driver.handle(Ticked(), after_s=10))


def test_digests_of_a_log_are_those_of_the_transfers() -> None:
    driver = Driver(0, num_stages=1)
    train(driver, 2)
    upload_phase(driver)

    log = driver.core.committed_log(0)

    assert log is not None
    assert [(entry.operation, entry.inner_step, entry.num_microbatches) for entry in log] == [
        (Operation.FORWARD, 0, 0),
        (Operation.FORWARD, 0, 0),
        (Operation.INNER_STEP, 0, 2),
    ]
    assert {entry.input_digest for entry in log} == {None}
    assert digest_of("z1") not in {entry.output_digest for entry in log}
