"""Who is suspected of having died: a member whose connection broke off and that does not ask for the feed again soon.

A process that is killed has its connections closed by its machine at once, so the request for the feed that a member
nearly always has open tells of its death long before its silence does. It is a hint and no proof. So a suspect stays a
member in the state it was in: phases no longer wait for it and its leases go back, and with its next request all that
ends. What it does meanwhile counts as always.

Owns when suspicion begins and ends; who is waited for is `Membership.heard`. Invariants: nobody but the member itself
can bring it under suspicion, as only a connection that it has signed for counts; no suspicion while the stage could not
go on without the member; when more than half of all members are lost at a time, it is not they that have died, and
nobody is suspected.
"""

from orion.common.ids import Hotkey, MemberState
from orion.orchestrator.events import ConnectionLost
from orion.orchestrator.membership import Member
from orion.orchestrator.state import RunState

GRACE_TIMES = 4.0
"""Times what a member usually takes from one answer to its next request, for it to ask again after its connection broke
off: that takes a new connection, two round trips more than on the old one."""
GRACE_MIN_S, GRACE_MAX_S = 0.25, 2.0
"""Bounds of that: a machine pauses, and nobody is waited for much longer than a silent member would be."""
AWAY_TIMES = 2.0
"""A member that came back from suspicion gets this many times what it took, from then on."""

_WAITED_FOR = (MemberState.ACTIVE, MemberState.READY)


def connection_lost(state: RunState, event: ConnectionLost) -> None:
    """The connection on which a member waited for the feed has broken off."""
    member = state.memory.membership.get(event.hotkey)
    if member is not None and member.lost_s is None:
        member.lost_s = state.memory.now_s
        usual_s = min(GRACE_MAX_S, max(GRACE_MIN_S, GRACE_TIMES * event.usual_s))
        member.grace_s = max(usual_s, member.grace_min_s)


def connection_seen(state: RunState, hotkey: Hotkey) -> None:
    """A member asks for the feed again: it lives."""
    member = state.memory.membership.get(hotkey)
    if member is None or member.lost_s is None:
        return
    heard(state, member)
    member.lost_s = None


def heard(state: RunState, member: Member) -> None:
    """A signed request of a member has come. One that was lost gets its grace anew: the request may have been on its
    way when its process died; only who asks for the feed again is known to live."""
    now_s = state.memory.now_s
    member.last_seen_s = now_s
    if member.lost_s is None:
        return
    if member.is_suspect:
        member.is_suspect = False
        away_s = now_s - member.lost_s
        member.grace_min_s = min(state.spec.time_limits.member_s, max(member.grace_min_s, AWAY_TIMES * away_s))
        state.notice(f"{member.hotkey} of stage {member.stage_index} is heard again after {away_s:.1f} s")
        state.look_again()
    member.lost_s = now_s


def suspect_the_lost(state: RunState) -> None:
    """Brings under suspicion whoever's grace is over."""
    membership = state.memory.membership
    if state.is_finished:
        return  # they close their connections themselves
    present = [member for stage in range(membership.num_stages) for member in membership.of_stage(stage, *_WAITED_FOR)]
    lost = [member for member in present if member.lost_s is not None]
    if 2 * len(lost) > len(present):
        state.notice(f"the connections of {len(lost)} of {len(present)} members broke off: none is suspected")
        for member in lost:
            member.lost_s, member.is_suspect = None, False
        return
    for member in lost:
        if not member.is_suspect and _is_over(state, member) and _has_substitute(state, member):
            member.is_suspect = True
            reason = f"its connection broke off, and it was not heard for {member.grace_s:.2f} s"
            state.notice(f"{member.hotkey} of stage {member.stage_index} is not waited for: {reason}")
            state.end_leases(member.hotkey, reason)


def forget(state: RunState) -> None:
    """The orchestrator was away: every connection broke off, and not through its members."""
    for member in state.memory.membership.members.values():
        member.lost_s, member.is_suspect = None, False


def _is_over(state: RunState, member: Member) -> bool:
    return member.lost_s is not None and state.memory.now_s >= member.lost_s + member.grace_s


def _has_substitute(state: RunState, member: Member) -> bool:
    """Whether its stage can go on without it."""
    active = state.memory.membership.of_stage(member.stage_index, MemberState.ACTIVE)
    return any(other is not member and other.lost_s is None for other in active)
