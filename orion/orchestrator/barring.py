"""Who is barred from work: a miner with a failed check that stands, until that has left the score window. Pure.

Lost pay stops nobody from sending noise to its neighbours and poisoning means. A barred miner stays a member, so that
validators who have not checked it yet still can; it gets no work, reduces nothing and is waited for by nobody. What
stands is decided by the vote that decides pay (`orion.common.ledger.scoring`). Invariant: a stage is never emptied by
this; its last miner works on, whatever it did.
"""

from orion.common.ids import Hotkey, MemberState
from orion.common.ledger.scoring import failed_checks, window_start
from orion.common.protocol.records import Ledger
from orion.orchestrator.membership import Member
from orion.orchestrator.state import RunState


def bar_if_failed(state: RunState, hotkey: Hotkey) -> None:
    """Bars a member if a failed check of it stands, unless its stage would be left without anybody."""
    member = state.memory.membership.get(hotkey)
    if member is None or member.is_barred or not has_failed(state, hotkey):
        return
    able = state.memory.membership.of_stage(member.stage_index, MemberState.ACTIVE, MemberState.READY)
    if any(other is not member for other in able):
        member.is_barred = True
        state.send_back(member, "the check that it failed stands against it, and it gets no work")


def release_if_clear(state: RunState, member: Member) -> None:
    """Lets a barred member work again once nothing stands against it."""
    if member.is_barred and not has_failed(state, member.hotkey):
        member.is_barred = False


def has_failed(state: RunState, hotkey: Hotkey) -> bool:
    """Whether a failed check of this miner stands."""
    memory = state.memory
    start = window_start(memory.ledger.outer_step, state.spec)
    ledger = Ledger(
        num_entries=memory.num_entries,
        digest=memory.ledger_digest,
        outer_step=memory.ledger.outer_step,
        work=(),
        verdicts=tuple(record for record in memory.ledger.verdicts(start) if record.verdict.miner == hotkey),
    )
    return hotkey in failed_checks(ledger, state.spec)
