"""Miners' records of their work: ends of trips, receipts, commitments.

What counts and what follows from it is the ledger's rule (`orion.common.ledger.book`); here it is carried to leases,
losses and members. Each record is taken or ignored by itself. What is wrong, late or not the sender's to say is ignored
and told once per miner and outer step; it never touches another miner's records.
"""

from orion.common.ids import Hotkey, Outcome
from orion.common.ledger.contradictions import Contradiction
from orion.common.protocol.entries import Proof, Said
from orion.common.protocol.messages import (
    Commitment,
    MicrobatchEnd,
    Reduced,
    Report,
    Uploaded,
)
from orion.common.protocol.records import LossPoint
from orion.orchestrator.leases import Trip
from orion.orchestrator.membership import Member
from orion.orchestrator.stages import Uploading
from orion.orchestrator.state import RunState


def take_report(state: RunState, member: Member, report: Report, proof: Proof | None) -> None:
    """Takes the records of a report. One that was taken before changes nothing."""
    if report.sequence < member.next_report:
        return
    member.next_report = report.sequence + 1
    in_time = report.commitment is None or _is_in_time(state, member, report.commitment)
    taken = state.record(said(member, report, proof, commitment_in_time=in_time))
    for end in taken.ends:
        _end(state, member, end)
    for credit in taken.credits:
        earner = state.memory.membership.members.get(credit.hotkey)
        if earner is not None:
            earner.num_credited += 1
    if taken.num_taken and (report.ends or report.commitment is not None):
        state.look_again()
    outer_step = state.memory.train.outer_step
    for contradiction in taken.contradictions:
        _tell(state, member, outer_step, contradiction)
    if taken.num_ignored and member.ignored_told_step < outer_step:
        member.ignored_told_step = outer_step
        state.notice(
            f"outer step {outer_step}: {taken.num_ignored} records of {member.hotkey} were wrong or late; ignored"
        )


def said(
    member: Member, message: Report | Uploaded | Reduced, proof: Proof | None, *, commitment_in_time: bool = True
) -> Said:
    """A member's message as the ledger keeps it."""
    return Said(
        hotkey=member.hotkey,
        stage_index=member.stage_index,
        message=message,
        proof=proof,
        commitment_in_time=commitment_in_time,
    )


def _end(state: RunState, member: Member, end: MicrobatchEnd) -> None:
    trip = state.memory.leases.live[end.microbatch_id]
    state.memory.leases.end(trip, end.outcome, end.reason or "cancelled by the first stage")
    if end.outcome is Outcome.APPLIED and end.loss is not None:
        state.memory.losses.add(
            LossPoint(
                microbatch_id=trip.microbatch_id,
                outer_step=trip.outer_step,
                loss=end.loss,
                time_s=state.memory.now_s,
            )
        )
        _keep_pathway(state, member, trip, end.path, end.loss)


def _keep_pathway(state: RunState, member: Member, trip: Trip, path: tuple[Hotkey, ...], loss: float) -> None:
    """Keeps who ran a trip, when its path can be true: it begins with its lessee and has one known miner a stage."""
    members = state.memory.membership.members
    stages = [known.stage_index for hotkey in path if (known := members.get(hotkey)) is not None]
    if stages == list(range(state.memory.num_stages)) and len(path) == len(stages) and path[0] == member.hotkey:
        state.memory.pathways.add(trip.outer_step, trip.microbatch_id, path, loss)


def _is_in_time(state: RunState, member: Member, commitment: Commitment) -> bool:
    stage = state.stage_of(member)
    is_uploading = isinstance(stage.activity, Uploading) and commitment.outer_step == stage.outer_step
    return member.is_present and (is_uploading or commitment.outer_step == state.training_step(stage))


def _tell(state: RunState, member: Member, outer_step: int, contradiction: Contradiction) -> None:
    """Says that receipts contradict each other, once per miner and outer step."""
    if member.contradiction_told_step >= outer_step:
        return
    member.contradiction_told_step = outer_step
    state.notice(
        f"outer step {outer_step}: receipts of microbatch {contradiction.microbatch_id} contradict each other "
        f"({contradiction.kind}: {', '.join(contradiction.hotkeys)})"
    )
