"""Leases: who gets which data, and how every trip ends exactly once."""

from orchestrator_world import World, hotkey_of, make_spec

from orion.common.ids import Outcome, Phase
from orion.common.protocol.messages import (
    Lease,
    MicrobatchEnd,
    RefusalCode,
    Report,
)
from orion.common.protocol.records import LossQuery

A0, A1 = hotkey_of(0, 0), hotkey_of(0, 1)
B0, B1 = hotkey_of(1, 0), hotkey_of(1, 1)
ALL = (A0, A1, B0, B1)


def end(microbatch_id: int, outcome: Outcome = Outcome.APPLIED, **fields: object) -> tuple[MicrobatchEnd, ...]:
    return (MicrobatchEnd.model_validate({"microbatch_id": microbatch_id, "outcome": outcome, **fields}),)


def test_every_lease_is_new_and_the_share_is_all_there_is() -> None:
    world = World()
    world.start()
    leased = [*world.lease(A0, 5), *world.lease(A1, 99)]
    assert [item.microbatch_id for item in leased] == list(range(8))
    assert [item.data_id for item in leased] == list(range(8))
    assert world.refusal(A0, world.lease_request()) is RefusalCode.NO_WORK


def test_only_active_members_of_the_first_stage_lease_in_the_right_outer_step() -> None:
    world = World()
    world.start()
    request = world.lease_request()
    assert world.refusal(B0, request) is RefusalCode.WRONG_STAGE
    assert world.refusal(A0, request.model_copy(update={"outer_step": 1})) is RefusalCode.WRONG_PHASE
    world.train()
    assert world.refusal(A0, request) is RefusalCode.WRONG_PHASE


def test_a_lease_whose_answer_was_lost_is_granted_again() -> None:
    world = World()
    world.start()
    request = world.lease_request(3)
    lost = world.accept(A0, request)
    assert isinstance(lost, Lease)
    before = world.status
    assert world.accept(A0, request) == lost
    assert world.status.microbatches_started == before.microbatches_started == 3
    first, *others = lost.microbatches
    world.report(A0, ends=end(first.microbatch_id, Outcome.CANCELLED, reason="next hop died"))
    assert world.accept(A0, request) == lost.model_copy(update={"microbatches": tuple(others)}), (
        "what has ended has not"
    )
    (fresh,) = world.lease(A0)
    assert fresh.microbatch_id == 3, "who has heard of all gets something new"


def test_nobody_is_granted_what_another_has_leased() -> None:
    world = World()
    world.start()
    leased = world.lease(A0, 2)
    others = world.accept(A1, world.lease_request().model_copy(update={"next_microbatch_id": 0}))
    assert isinstance(others, Lease)
    assert {item.microbatch_id for item in others.microbatches}.isdisjoint(item.microbatch_id for item in leased)


def test_nobody_hoards() -> None:
    world = World(make_spec(inner_steps=200, flow={"in_flight_max": 2}))
    world.start()
    leased = world.lease(A0, 256)
    assert len(leased) == 16
    assert world.refusal(A0, world.lease_request()) is RefusalCode.BUSY
    world.report(A0, ends=end(leased[0].microbatch_id))
    assert len(world.lease(A0, 256)) == 1


def test_cancelled_data_is_leased_again_under_a_new_id() -> None:
    world = World()
    world.start()
    (leased,) = world.lease(A0)
    world.report(A0, ends=end(leased.microbatch_id, Outcome.CANCELLED, reason="next hop died"))
    (again,) = world.lease(A1)
    assert again.data_id == leased.data_id and again.microbatch_id > leased.microbatch_id
    assert (world.status.microbatches_started, world.status.microbatches_cancelled) == (2, 1)


def test_data_that_failed_three_times_is_given_up() -> None:
    world = World()
    world.start()
    for _ in range(3):
        (leased,) = world.lease(A0)
        assert leased.data_id == 0
        world.report(A0, ends=end(leased.microbatch_id, Outcome.CANCELLED))
    assert [item.data_id for item in world.lease(A0, 99)] == [1, 2, 3, 4, 5, 6, 7]
    for microbatch_id in range(3, 10):
        world.report(A0, ends=end(microbatch_id))
    assert world.phases[0] == (Phase.UPLOAD, 0), "the share has ended without the data that was given up"


def test_an_overdue_lease_ends_and_a_late_report_changes_nothing() -> None:
    world = World()
    world.start()
    (leased,) = world.lease(A0)
    world.wait(34.0, *ALL)
    assert world.status.microbatches_cancelled == 0, "its end may still be on its way"
    world.wait(2.0, *ALL)
    assert world.status.microbatches_cancelled == 1
    world.report(A0, ends=end(leased.microbatch_id, loss=2.0))
    assert (world.status.microbatches_applied, world.status.microbatches_cancelled) == (0, 1)
    assert world.core.losses(LossQuery()).total == 0
    assert world.notices(f"1 records of {A0} were wrong or late")


def test_repeated_reports_change_nothing() -> None:
    world = World()
    world.start()
    (leased,) = world.lease(A0)
    for _ in range(3):
        world.report(A0, ends=end(leased.microbatch_id, loss=2.0))
    world.join(A0)  # a new process counts its reports anew
    world.accept(A0, Report(sequence=0, ends=end(leased.microbatch_id, loss=2.0)))
    assert world.status.microbatches_applied == 1
    assert world.core.losses(LossQuery()).total == 1
    assert not world.notices("ignored")


def test_only_the_lessee_ends_a_trip() -> None:
    world = World()
    world.start()
    (leased,) = world.lease(A0)
    world.report(A1, ends=end(leased.microbatch_id, loss=0.0))
    world.report(B0, ends=end(leased.microbatch_id, Outcome.CANCELLED))
    world.report(A0, ends=end(999, loss=0.0))
    assert world.status.microbatches_applied == world.status.microbatches_cancelled == 0
    assert len(world.notices("ignored")) == 3
    world.report(A0, ends=end(leased.microbatch_id, loss=2.0))
    assert world.status.microbatches_applied == 1


def test_training_is_cut_short_at_its_deadline_and_what_was_in_time_still_counts() -> None:
    world = World()
    world.start()
    deadline_s = world.stage(0).deadline_s
    while world.now_s < deadline_s - 2.0:
        world.wait(1.0, *ALL)
    (first, second) = world.lease(A0, 2)
    world.wait(3.0, *ALL)
    assert world.phases == [(Phase.UPLOAD, 0), (Phase.UPLOAD, 0)]
    assert world.notices("training cut short with 8 microbatches unfinished")
    world.travel(first.microbatch_id, (A0, B0))
    assert world.status.microbatches_applied == 1, "it was applied in time and is reported late"
    for hotkey in (A0, B0):
        world.upload(hotkey, 1)
    world.wait(6.0, *ALL)
    assert world.phases[0] == (Phase.MERGE, 0)
    assert world.status.microbatches_cancelled == 1
    world.report(A0, ends=end(second.microbatch_id, loss=1.0))
    assert (world.status.microbatches_applied, world.status.microbatches_cancelled) == (1, 1)


def test_a_dead_lessee_holds_nobody_up_longer_than_its_silence() -> None:
    world = World()
    world.start()
    world.lease(A1, 4)
    world.wait(11.0, A0, B0, B1)
    assert world.status.microbatches_cancelled == 4
    for leased in world.lease(A0, 99):
        world.travel(leased.microbatch_id, (A0, B0))
    assert world.phases[0] == (Phase.UPLOAD, 0)


def test_a_share_is_fixed_when_its_outer_step_opens() -> None:
    world = World()
    world.start()
    world.outer_step()
    world.wait(11.0, A0, B0, B1)
    assert world.active(0) == [A0]
    world.train()
    assert world.phases[0] == (Phase.TRAIN, 1), "it was opened for two replicas"
    world.train()
    assert world.phases[0] == (Phase.UPLOAD, 1)
    world.upload_all({A0: 8, B0: 4, B1: 4})
    for stage_index in (0, 1):
        world.merge(stage_index)
    world.train()
    assert world.phases[0] == (Phase.UPLOAD, 2), "the next one is for those who are left"
    assert world.status.microbatches_applied == 20
