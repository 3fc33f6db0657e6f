"""Who takes part: every miner's stage, address and state, and when it was last heard of.

Owns the member records and their index by stage. Decides nothing about phases. Invariants: a present member is in the
index of exactly one stage; one that is gone is in none; records are bounded by `MINERS_MAX`.
"""

from dataclasses import dataclass, field

from orion.common.ids import Hotkey, MemberState
from orion.common.protocol.fields import MINERS_MAX
from orion.common.protocol.messages import BoundaryReport, Heartbeat


@dataclass(slots=True)
class Member:
    """One miner of the run, also after it has gone."""

    hotkey: Hotkey
    url: str
    device: str
    memory_bytes: int
    stage_index: int
    state: MemberState
    last_seen_s: float
    heartbeat: Heartbeat | None = None
    boundary: BoundaryReport | None = None
    """Its newest report on its neighbours."""
    ready_outer_step: int | None = None
    """The outer step whose anchor it says it holds."""
    distrusted_until_s: float = 0.0
    """Its word on the anchor it holds counts for nothing until then: it has just been found with another one."""
    is_barred: bool = False
    """It failed a check: it gets no work, and its word on its anchor counts for nothing."""
    next_report: int = 0
    """Lowest report number that is new."""
    num_credited: int = 0
    """Microbatches over the whole run."""
    ignored_told_step: int = -1
    """Newest outer step for which a notice said that records of this miner were ignored."""
    contradiction_told_step: int = -1
    """Newest outer step for which a notice said that a receipt of this miner contradicts another."""
    lost_s: float | None = None
    """Since when there is no connection on which it waits for the feed, and nothing else was heard of it; None while
    there is one, as far as is known."""
    grace_s: float = 0.0
    """What it has from then on to be heard again."""
    grace_min_s: float = 0.0
    """What it has at least, because it has needed as much before."""
    is_suspect: bool = False
    """It may well have died (`suspicion`): phases do not wait for it."""

    @property
    def is_present(self) -> bool:
        return self.state is not MemberState.GONE

    def trusts_ready(self, outer_step: int, now_s: float) -> bool:
        """Whether it says, and may be believed, that it holds the anchor of this outer step."""
        return self.ready_outer_step == outer_step and now_s >= self.distrusted_until_s and not self.is_barred


@dataclass(slots=True)
class Membership:
    """All members, and the present ones of each stage."""

    num_stages: int
    members: dict[Hotkey, Member] = field(default_factory=dict)
    stages: list[dict[Hotkey, Member]] = field(default_factory=list)
    first_join_s: float | None = None

    def __post_init__(self) -> None:
        self.stages = [{} for _ in range(self.num_stages)]

    def get(self, hotkey: Hotkey) -> Member | None:
        """The member if it is present."""
        member = self.members.get(hotkey)
        return member if member is not None and member.is_present else None

    def of_stage(self, stage_index: int, *states: MemberState) -> list[Member]:
        """Present members of a stage in the order of their hotkeys; only those in the given states, if any is given."""
        found = [member for member in self.stages[stage_index].values() if not states or member.state in states]
        return sorted(found, key=lambda member: member.hotkey)

    def heard(self, stage_index: int, *states: MemberState) -> list[Member]:
        """Those of `of_stage` that are not suspected of having died, all if there is none: phases wait for nobody
        else."""
        members = self.of_stage(stage_index, *states)
        return [member for member in members if not member.is_suspect] or members

    def count(self, stage_index: int, state: MemberState) -> int:
        return sum(member.state is state for member in self.stages[stage_index].values())

    def supply(self) -> list[int]:
        """Present members of each stage that may work, and have not died as far as is known."""
        return [sum(not (member.is_barred or member.is_suspect) for member in stage.values()) for stage in self.stages]

    def has_room(self, hotkey: Hotkey) -> bool:
        """Whether this hotkey can be added: known already, or room is left once the gone are forgotten."""
        return hotkey in self.members or sum(map(len, self.stages)) < MINERS_MAX

    def add(self, member: Member) -> None:
        """Adds a newcomer or one that comes back. The longest gone is forgotten when there are too many records."""
        known = self.members.pop(member.hotkey, None)
        if known is not None:
            self.stages[known.stage_index].pop(known.hotkey, None)
        if len(self.members) >= MINERS_MAX:
            longest_gone = min(
                (other for other in self.members.values() if not other.is_present),
                key=lambda other: (other.last_seen_s, other.hotkey),
            )
            del self.members[longest_gone.hotkey]
        self.members[member.hotkey] = member
        self.stages[member.stage_index][member.hotkey] = member
        if self.first_join_s is None:
            self.first_join_s = member.last_seen_s

    def remove(self, member: Member) -> None:
        """Marks a present member as gone; its record stays."""
        member.state = MemberState.GONE
        member.ready_outer_step = None
        del self.stages[member.stage_index][member.hotkey]

    def silent(self, before_s: float) -> list[Member]:
        """Present members that were last heard of at or before the given time."""
        return [member for stage in self.stages for member in stage.values() if member.last_seen_s <= before_s]
