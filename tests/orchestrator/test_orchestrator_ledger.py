"""Credit follows what both ends of a transfer say, and lies touch their sender only."""

from typing import Any

import pytest
from orchestrator_world import STRANGER, World, digest_of, hotkey_of, make_spec
from pydantic import ValidationError

from orion.common.ids import Direction, Hotkey, Outcome
from orion.common.protocol.fields import COMMITMENTS_MAX
from orion.common.protocol.messages import (
    Commitment,
    MicrobatchEnd,
    Receipt,
    RefusalCode,
    Report,
)
from orion.common.protocol.records import (
    CommitmentQuery,
    LedgerQuery,
)

A0, A1 = hotkey_of(0, 0), hotkey_of(0, 1)
B0, B1 = hotkey_of(1, 0), hotkey_of(1, 1)
C0 = hotkey_of(2, 0)


def credited(world: World) -> dict[Hotkey, int]:
    return {record.hotkey: record.num_microbatches for record in world.core.ledger(LedgerQuery()).work}


def started(**changes: object) -> World:
    world = World(make_spec(**changes))
    world.start()
    return world


def test_a_trip_through_three_stages_pays_all_three() -> None:
    world = started(num_stages=3, replicas=1)
    (leased,) = world.lease(A0)
    world.travel(leased.microbatch_id, (A0, B0, C0))
    assert credited(world) == {A0: 1, B0: 1, C0: 1}


def test_stages_are_paid_for_what_they_did_although_the_trip_failed_further_down() -> None:
    world = started(num_stages=3, replicas=1)
    (leased,) = world.lease(A0)
    for (sender, receiver), receipt in world.receipts(leased.microbatch_id, (A0, B0, C0)):
        if (sender, receiver) != (B0, A0):
            world.report(sender, receipts=(receipt,))
            world.report(receiver, receipts=(receipt,))
    end = MicrobatchEnd(microbatch_id=leased.microbatch_id, outcome=Outcome.CANCELLED, reason="deadline")
    world.report(A0, ends=(end,))
    assert credited(world) == {C0: 1}


@pytest.mark.parametrize("silent", [0, 1])
def test_one_sided_claims_pay_nothing(silent: int) -> None:
    world = started()
    (leased,) = world.lease(A0)
    for ends, receipt in world.receipts(leased.microbatch_id, (A0, B0)):
        world.report(ends[1 - silent], receipts=(receipt,))
    assert credited(world) == {}
    assert not world.notices("ignored")


@pytest.mark.parametrize("field", [{"digest": digest_of("other")}, {"size_bytes": 99}])
def test_contradicting_claims_pay_nothing(field: dict[str, object]) -> None:
    world = started()
    (leased,) = world.lease(A0)
    for ends, receipt in world.receipts(leased.microbatch_id, (A0, B0)):
        world.report(ends[0], receipts=(receipt,))
        world.report(ends[1], receipts=(receipt.model_copy(update=field),))
    world.report(A0, ends=(MicrobatchEnd(microbatch_id=leased.microbatch_id, outcome=Outcome.APPLIED, path=(A0, B0)),))
    assert credited(world) == {}


def test_the_first_stage_is_paid_once_its_trip_was_applied_whatever_comes_first() -> None:
    world = started()
    first, second = world.lease(A0, 2)
    for leased, end_comes_first in ((first, True), (second, False)):
        end = MicrobatchEnd(microbatch_id=leased.microbatch_id, outcome=Outcome.APPLIED, path=(A0, B0))
        if end_comes_first:
            world.report(A0, ends=(end,))
        assert A0 not in credited(world) or not end_comes_first
        for ends, receipt in world.receipts(leased.microbatch_id, (A0, B0)):
            for hotkey in ends:
                world.report(hotkey, receipts=(receipt,))
        if not end_comes_first:
            assert credited(world) == {A0: 1, B0: 2}
            world.report(A0, ends=(end,))
    assert credited(world) == {A0: 2, B0: 2}


def test_a_detour_pays_the_replica_that_ran_backward() -> None:
    world = started()
    (leased,) = world.lease(A0)
    by_the_first = world.receipts(leased.microbatch_id, (A0, B0))
    for hotkey in (A0, B0):
        world.report(hotkey, receipts=(by_the_first[0][1],))
    world.travel(leased.microbatch_id, (A0, B1))
    assert credited(world) == {A0: 1, B1: 1}


def test_a_stage_is_paid_once_for_a_trip() -> None:
    world = started()
    (leased,) = world.lease(A0)
    world.travel(leased.microbatch_id, (A0, B0))
    for ends, receipt in world.receipts(leased.microbatch_id, (A0, B1)):
        for hotkey in ends:
            world.report(hotkey, receipts=(receipt,))
    world.travel(leased.microbatch_id, (A0, B0))
    assert credited(world) == {A0: 1, B0: 1}


def test_claims_that_cannot_be_true_are_ignored() -> None:
    world = started()
    (leased,) = world.lease(A0)
    (_, activation), (_, gradient) = world.receipts(leased.microbatch_id, (A0, B0))
    cannot_be: list[tuple[Hotkey, Receipt]] = [
        (A1, gradient),
        (A0, gradient.model_copy(update={"to_stage": 1, "receiver": A0})),
        (B0, gradient.model_copy(update={"to_stage": 511})),
        (B0, activation.model_copy(update={"to_stage": 0})),
        (B0, gradient.model_copy(update={"receiver": B0})),
        (A0, activation.model_copy(update={"outer_step": 5})),
        (A0, activation.model_copy(update={"microbatch_id": 12345})),
    ]
    for hotkey, receipt in cannot_be:
        world.report(hotkey, receipts=(receipt,))
    assert credited(world) == {}
    assert len(world.notices("ignored")) == len({hotkey for hotkey, _ in cannot_be})


def test_a_flood_of_claims_is_bounded_and_touches_nobody_else() -> None:
    world = started()
    (leased,) = world.lease(A0)
    for number in range(30):
        forged = Receipt(
            direction=Direction.GRADIENT,
            microbatch_id=leased.microbatch_id,
            outer_step=0,
            sender=hotkey_of(1, number + 10),
            receiver=A1,
            to_stage=0,
            digest=digest_of(number),
            size_bytes=1,
        )
        world.report(A1, receipts=(forged,))
    assert world.notices(f"records of {A1}")
    world.travel(leased.microbatch_id, (A0, B0))
    assert credited(world) == {A0: 1, B0: 1}


def test_receipts_of_the_last_outer_step_still_count_and_old_ones_do_not() -> None:
    world = started(outer_steps=9, keep_outer_steps=2)
    (leased,) = world.lease(A0)
    late = world.receipts(leased.microbatch_id, (A0, B0))[1]
    end = MicrobatchEnd(microbatch_id=leased.microbatch_id, outcome=Outcome.APPLIED, path=(A0, B0))
    world.report(A0, ends=(end,))
    num_applied = world.train(num_left=1)
    world.upload_all(num_applied)
    for stage_index in (0, 1):
        world.merge(stage_index)
    before = credited(world)[late[0][0]]
    world.report(late[0][0], receipts=(late[1],))
    world.report(late[0][1], receipts=(late[1],))
    assert credited(world)[late[0][0]] == before + 1
    for _ in range(3):
        world.outer_step()
    total = world.core.ledger(LedgerQuery()).work
    world.report(A0, receipts=(late[1].model_copy(update={"sender": B1}),))
    assert world.core.ledger(LedgerQuery()).work == total


def committed(world: World) -> list[int]:
    """The work that A0 has committed to, each time that it did."""
    (record,) = world.core.commitments(CommitmentQuery(outer_step=0)).records
    return [commitment.num_applied for commitment in (*record.earlier, record.commitment)]


def test_commitments_to_a_growing_log_are_all_published() -> None:
    world = started()
    world.train()
    for num_applied in (2, 4, 4, 7):
        world.commit(A0, num_applied, is_final=False)
    world.commit(A0, 7)
    assert committed(world) == [2, 4, 7, 7]
    assert not world.notices("ignored")


@pytest.mark.parametrize(
    "contradiction",
    [
        {"num_applied": 3, "is_final": False},
        {"num_applied": 4, "is_final": False, "log": "another"},
        {"num_applied": 3, "is_final": True},
    ],
)
def test_a_commitment_that_shrinks_or_contradicts_is_refused(contradiction: dict[str, Any]) -> None:
    world = started()
    world.train()
    world.commit(A0, 4, is_final=False)
    world.commit(A0, **contradiction)
    assert committed(world) == [4]
    assert world.notices("ignored")


def test_nothing_comes_after_the_final_commitment() -> None:
    world = started()
    world.train()
    world.commit(A0, 4)
    world.commit(A0, 7, is_final=False)
    world.commit(A0, 8)
    assert committed(world) == [4]
    assert world.notices("ignored")


def test_of_very_many_commitments_the_newest_are_kept() -> None:
    world = started()
    for num_applied in range(COMMITMENTS_MAX + 10):
        world.commit(A0, num_applied, is_final=False)
    assert committed(world) == list(range(9, COMMITMENTS_MAX + 10))


def test_a_commitment_cannot_claim_more_than_its_log_has() -> None:
    fields = {
        "outer_step": 0,
        "num_entries": 4,
        "num_applied": 2,
        "num_contributed": 2,
        "num_kept": 4,
        "root": "a" * 64,
    }
    Commitment.model_validate({**fields, "is_final": True})
    for change in ({"num_applied": 5}, {"num_contributed": 3}, {"num_kept": 5}, {"num_entries": 1}):
        with pytest.raises(ValidationError):
            Commitment.model_validate({**fields, **change, "is_final": True})


def test_who_never_joined_reports_nothing() -> None:
    world = started()
    assert world.refusal(STRANGER, Report(sequence=0)) is RefusalCode.NOT_MEMBER
    assert world.refusal(hotkey_of(0, 3), Report(sequence=0)) is RefusalCode.NOT_MEMBER


def test_what_somebody_reports_after_it_has_gone_still_pays_its_partners() -> None:
    world = started()
    (leased,) = world.lease(A0)
    for ends, receipt in world.receipts(leased.microbatch_id, (A0, B0)):
        world.report(ends[0] if ends[0] != B0 else ends[1], receipts=(receipt,))
    world.wait(11.0, A0, A1, B1)
    assert B0 in world.members(1, "gone")
    for _, receipt in world.receipts(leased.microbatch_id, (A0, B0)):
        world.report(B0, receipts=(receipt,))
    world.report(A0, ends=(MicrobatchEnd(microbatch_id=leased.microbatch_id, outcome=Outcome.APPLIED, path=(A0, B0)),))
    assert credited(world) == {A0: 1, B0: 1}
