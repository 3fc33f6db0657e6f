"""All that the orchestrator remembers, in one tree, and the few operations that every rule needs.

Owns no rule. Whatever is not in here (or follows from the RunSpec) is forgotten at a restart, and `digest` covers all
of it. The outbox is empty between two events.
"""

from collections import deque
from dataclasses import dataclass, field

from blake3 import blake3

from orion.common.config import RunSpec
from orion.common.ids import DataId, Digest, Hotkey, MemberState, Outcome
from orion.common.ledger.book import LedgerBook
from orion.common.ledger.evidence import Taken
from orion.common.protocol.entries import (
    CheckpointKept,
    Fact,
    LedgerEntry,
    OuterStepOpened,
    TripsDied,
    chained,
    entry_to_json,
    first_digest,
)
from orion.common.protocol.fields import BATCH_MAX
from orion.common.protocol.messages import ObjectRef
from orion.common.protocol.start import start_checkpoint, whole_start
from orion.orchestrator.events import CheckObject, Effect, Recorded
from orion.orchestrator.figures import StageFigures
from orion.orchestrator.leases import LeaseBook, Trip
from orion.orchestrator.losses import LossHistory
from orion.orchestrator.membership import Member, Membership
from orion.orchestrator.objects import ObjectBook
from orion.orchestrator.pathways import PathwayBook
from orion.orchestrator.stages import NEVER_S, Ended, StageProgress, Training
from orion.orchestrator.staleness import StalenessBook
from orion.orchestrator.state_codec import StateCodec

NOTICES_MAX = 200
NOTICE_CHARS_MAX = 500


@dataclass(slots=True)
class TrainRound:
    """The train phase that is under way in all stages, or that they will enter next."""

    outer_step: int = 0
    is_open: bool = False
    """Whether every stage has entered it with members, so that microbatches can travel."""
    deadline_s: float = NEVER_S
    lacking: list[int] = field(default_factory=list)
    """Stages whose lack of members a notice has told."""


@dataclass(slots=True)
class Memory:
    """What the digest covers, and a snapshot holds."""

    num_stages: int
    first_outer_step: int
    ledger_digest: Digest
    """Of the public ledger so far."""
    draw_seed: int
    """Secret part of every draw, so that nobody can foresee who reduces what."""
    final_outer_step: int
    """The run is over when every stage has reached this anchor."""
    now_s: float = 0.0
    """Of the newest event."""
    ticked_s: float = 0.0
    """When it was last looked at what is due by time alone."""
    advanced_s: float = 0.0
    """When the rules of the phases were last looked at."""
    version: int = 0
    started_s: float | None = None
    finish_reason: str = ""
    anchors_equal: bool = True
    deleted_before: int = field(init=False)
    """Objects of outer steps below this have been deleted."""
    permits: dict[Hotkey, bool] = field(default_factory=dict)
    """Registered hotkeys, and whether each may act as a validator."""
    train: TrainRound = field(init=False)
    leases: LeaseBook = field(default_factory=LeaseBook)
    losses: LossHistory = field(default_factory=LossHistory)
    objects: ObjectBook = field(default_factory=ObjectBook)
    num_rerouted: int = 0
    num_spliced: int = 0
    """Repairs of microbatches, as miners' heartbeats counted them; those after a miner's last one are not known."""
    num_notices: int = 0
    """Ever given."""
    notices: deque[str] = field(default_factory=lambda: deque(maxlen=NOTICES_MAX))
    num_entries: int = 0
    """Of the public ledger."""
    membership: Membership = field(init=False)
    ledger: LedgerBook = field(init=False)
    pathways: PathwayBook = field(init=False)
    stages: list[StageProgress] = field(init=False)
    staleness: StalenessBook = field(init=False)

    def __post_init__(self) -> None:
        self.membership = Membership(self.num_stages)
        self.ledger = LedgerBook(self.num_stages, self.first_outer_step)
        self.pathways = PathwayBook(self.num_stages)
        self.staleness = StalenessBook(self.num_stages)
        self.train = TrainRound(self.first_outer_step)
        self.deleted_before = self.first_outer_step
        self.stages = [
            StageProgress(stage_index, outer_step=self.first_outer_step) for stage_index in range(self.num_stages)
        ]


_CODEC = StateCodec(Memory, shared=(Member, Trip))


def begin_from_checkpoint(memory: Memory, spec: RunSpec) -> None:
    """Where the run goes on from a checkpoint: it is durable, and data goes on after what has been used."""
    memory.leases.first_data_ids[spec.first_outer_step] = DataId(0)
    if spec.start is None:
        return
    memory.leases.next_data_id = spec.start.next_data_id
    memory.leases.first_data_ids[spec.first_outer_step] = DataId(spec.start.next_data_id)
    for stage in memory.stages:
        checkpoint = start_checkpoint(spec.start, stage.stage_index)
        stage.checkpoints.append(checkpoint)
        stage.anchor_digest = checkpoint.state_digest
        memory.objects.durable[checkpoint.object.key] = checkpoint.object


class RunState:
    """The memory, what the run's specification says, and what the event under way has caused."""

    def __init__(self, spec: RunSpec, figures: tuple[StageFigures, ...], draw_seed: int) -> None:
        self.spec = spec
        self.figures = figures
        self.memory = Memory(
            spec.num_stages, spec.first_outer_step, first_digest(spec.digest), draw_seed, spec.outer_steps
        )
        self.memory.ledger.is_overlapped = spec.sync == "overlapped"
        begin_from_checkpoint(self.memory, spec)
        self.outbox: list[Effect] = []
        self.feed_changed = False
        self.rules_due = False

    def digest(self) -> Digest:
        """Changes with anything that is remembered."""
        return Digest(blake3(self.spec.digest.encode() + self.encoded()).hexdigest())

    def encoded(self) -> bytes:
        """All that is remembered."""
        return _CODEC.encode(self.memory)

    def restore(self, encoded: bytes) -> None:
        """Remembers what another one remembered, and nothing else. Raises DataError, and then nothing has changed."""
        self.memory = _CODEC.decode(encoded)

    # --- what rules say ---

    @property
    def validators(self) -> list[Hotkey]:
        """Who has a validator permit, in the order of their hotkeys."""
        return sorted(hotkey for hotkey, has_permit in self.memory.permits.items() if has_permit)

    def changed(self) -> None:
        """Something that the feed shows is different now."""
        self.feed_changed = True
        self.rules_due = True

    def look_again(self) -> None:
        """Something that a phase waits for may have come."""
        self.rules_due = True

    def notice(self, text: str) -> None:
        """Tells people; shown in the run's status."""
        self.memory.num_notices += 1
        self.memory.notices.append(text[:NOTICE_CHARS_MAX])

    # --- the public ledger ---

    def open_ledger(self) -> None:
        """Writes the ledger's first entry. Called with the first event, because effects come from events alone."""
        if self.memory.num_entries == 0:
            self.record(OuterStepOpened(outer_step=self.spec.first_outer_step))
            if self.spec.start is not None:
                self.record(CheckpointKept(checkpoint=whole_start(self.spec.start)))

    def record(self, fact: Fact) -> Taken:
        """Does what follows from a fact, and puts it into the ledger if anything does."""
        memory = self.memory
        taken = memory.ledger.take(memory.num_entries, fact)
        if taken.changed:
            entry = entry_to_json(LedgerEntry(sequence=memory.num_entries, time_s=memory.now_s, fact=fact))
            memory.ledger_digest = chained(memory.ledger_digest, entry)
            self.outbox.append(Recorded(memory.num_entries, entry, memory.ledger_digest))
            memory.num_entries += 1
        return taken

    def end_trips(self, trips: list[Trip], reason: str) -> None:
        """Cancels live trips without their lessees."""
        for trip in trips:
            self.memory.leases.end(trip, Outcome.CANCELLED, reason)
        by_step: dict[int, list[Trip]] = {}
        for trip in trips:
            by_step.setdefault(trip.outer_step, []).append(trip)
        for outer_step, dead in by_step.items():
            for start in range(0, len(dead), BATCH_MAX):
                ids = tuple(trip.microbatch_id for trip in dead[start : start + BATCH_MAX])
                self.record(TripsDied(outer_step=outer_step, microbatch_ids=ids, reason=reason[:NOTICE_CHARS_MAX]))

    def watch(self, ref: ObjectRef) -> None:
        """Has the store asked about an object."""
        if self.memory.objects.watch(ref, self.memory.now_s):
            self.outbox.append(CheckObject(ref))
        else:
            self.look_again()

    def draw(self, purpose: str) -> int:
        """A number in [0, 2^63) that depends on the purpose and that nobody outside can foresee."""
        digest = blake3(f"{self.memory.draw_seed} {purpose}".encode()).digest(length=8)
        return int.from_bytes(digest, "little") >> 1

    # --- what every rule asks ---

    @property
    def is_finished(self) -> bool:
        return all(isinstance(stage.activity, Ended) for stage in self.memory.stages)

    @property
    def oldest_kept_step(self) -> int:
        """The oldest outer step whose trips and objects are still kept, seen from the stage that is furthest behind."""
        newest = min(stage.outer_step for stage in self.memory.stages)
        return max(self.spec.first_outer_step, newest - self.spec.keep_outer_steps)

    def training_step(self, stage: StageProgress) -> int | None:
        """The outer step of which a stage takes work; while it merges one, the next, if that trains already."""
        if isinstance(stage.activity, Training):
            return stage.outer_step
        return self.memory.train.outer_step if self.memory.train.is_open else None

    def stage_of(self, member: Member) -> StageProgress:
        return self.memory.stages[member.stage_index]

    # --- members ---

    def set_state(self, member: Member, state: MemberState) -> None:
        """Moves a present member to another state."""
        if member.state is not state:
            member.state = state
            self.changed()

    def send_back(self, member: Member, reason: str) -> None:
        """Makes a member fetch its anchor anew; what it had leased is leased again."""
        if member.state is MemberState.ACTIVE:
            self.notice(f"{member.hotkey} of stage {member.stage_index} is joining again: {reason}")
        self.end_leases(member.hotkey, reason)
        member.ready_outer_step = None
        self.set_state(member, MemberState.JOINING)

    def remove(self, member: Member, reason: str) -> None:
        """A member is gone: peers no longer see it, its leases end."""
        self.notice(f"{member.hotkey} of stage {member.stage_index} is gone: {reason}")
        self.end_leases(member.hotkey, reason)
        self.memory.membership.remove(member)
        self.changed()

    def end_leases(self, hotkey: Hotkey, reason: str) -> None:
        self.end_trips(self.memory.leases.live_trips_of(hotkey), reason)
        self.look_again()
