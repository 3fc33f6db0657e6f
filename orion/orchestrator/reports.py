"""Miners' records of their work: ends of trips, receipts, commitments.

Each record is taken or ignored by itself. What is wrong, late or not the sender's to say is ignored and told once per
miner and outer step; it never touches another miner's records.
"""

from orion.common.ids import Hotkey, Outcome
from orion.common.protocol.messages import (
    Commitment,
    MicrobatchEnd,
    Receipt,
    Report,
)
from orion.common.protocol.records import LossPoint
from orion.orchestrator.leases import Trip
from orion.orchestrator.membership import Member
from orion.orchestrator.stages import Training, Uploading
from orion.orchestrator.state import RunState


def take_report(state: RunState, member: Member, report: Report) -> None:
    """Takes the records of a report. One that was taken before changes nothing."""
    if report.sequence < member.next_report:
        return
    member.next_report = report.sequence + 1
    num_ignored = sum(not _take_receipt(state, member, receipt) for receipt in report.receipts)
    num_ignored += sum(not _take_end(state, member, end) for end in report.ends)
    if report.commitment is not None:
        num_ignored += not _take_commitment(state, member, report.commitment)
    outer_step = state.memory.train.outer_step
    if num_ignored and member.ignored_told_step < outer_step:
        member.ignored_told_step = outer_step
        state.notice(f"outer step {outer_step}: {num_ignored} records of {member.hotkey} were wrong or late; ignored")


def _take_end(state: RunState, member: Member, end: MicrobatchEnd) -> bool:
    trip = state.memory.leases.live.get(end.microbatch_id)
    if trip is None or trip.lessee != member.hotkey:
        return _is_repeated(state, member, end)
    state.memory.leases.end(trip, end.outcome, end.reason or "cancelled by the first stage")
    if end.outcome is Outcome.APPLIED:
        if end.loss is not None:
            state.memory.losses.add(
                LossPoint(
                    microbatch_id=trip.microbatch_id,
                    outer_step=trip.outer_step,
                    loss=end.loss,
                    time_s=state.memory.now_s,
                )
            )
            _keep_pathway(state, member, trip, end.path, end.loss)
        _credit(state, trip)
    state.look_again()
    return True


def _keep_pathway(state: RunState, member: Member, trip: Trip, path: tuple[Hotkey, ...], loss: float) -> None:
    """Keeps who ran a trip, when its path can be true: it begins with its lessee and has one known miner a stage."""
    members = state.memory.membership.members
    stages = [known.stage_index for hotkey in path if (known := members.get(hotkey)) is not None]
    if stages == list(range(state.memory.num_stages)) and len(path) == len(stages) and path[0] == member.hotkey:
        state.memory.pathways.add(trip.outer_step, trip.microbatch_id, path, loss)


def _is_repeated(state: RunState, member: Member, end: MicrobatchEnd) -> bool:
    """Whether a trip that is not live ended just as the miner says: then nothing is wrong."""
    outer_step = state.memory.leases.outer_step
    trip = state.memory.leases.trip(outer_step, end.microbatch_id)
    return trip is not None and trip.lessee == member.hotkey and trip.outcome is end.outcome


def _take_receipt(state: RunState, member: Member, receipt: Receipt) -> bool:
    trip = state.memory.leases.trip(receipt.outer_step, receipt.microbatch_id)
    if trip is None:
        return False
    num_trips = len(state.memory.leases.trips[receipt.outer_step])
    if not state.memory.ledger.add_receipt(member.hotkey, member.stage_index, receipt, trip, num_trips):
        return False
    _credit(state, trip)
    return True


def _credit(state: RunState, trip: Trip) -> None:
    for credit in state.memory.ledger.credit(trip):
        earner = state.memory.membership.members.get(credit.hotkey)
        if earner is not None:
            earner.num_credited += 1


def _take_commitment(state: RunState, member: Member, commitment: Commitment) -> bool:
    stage = state.stage_of(member)
    in_time = isinstance(stage.activity, Training | Uploading) and commitment.outer_step == stage.outer_step
    if not member.is_present or not in_time:
        return state.memory.ledger.commitment(commitment.outer_step, member.hotkey) == commitment
    taken = state.memory.ledger.commit(member.hotkey, stage.stage_index, commitment)
    state.look_again()
    return taken
