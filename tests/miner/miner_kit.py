"""What the miner's tests share: a small run, made-up hotkeys, feeds, and a core that is checked after every event."""

from random import Random

from blake3 import blake3

from orion.common.config import RunSpec
from orion.common.ids import DataId, Digest, Direction, Hotkey, MemberState, MicrobatchId, Phase
from orion.common.protocol.messages import (
    CheckpointRef,
    Feed,
    Joined,
    Lease,
    LeasedMicrobatch,
    Manifest,
    MergePlan,
    MicrobatchEnd,
    ObjectRef,
    Peer,
    Receipt,
    Report,
    StageState,
    Transfer,
)
from orion.miner.core import MinerCore
from orion.miner.effects import Effect, LoadAnchor, PersistLog, SendReport
from orion.miner.events import (
    AnchorLoaded,
    Event,
    FeedArrived,
    JoinEnded,
    LeaseGranted,
    LogPersisted,
    ReportEnded,
    Ticked,
)

NOW_S = 1_000.0
STATE_DIGEST = Digest("a" * 64)


def make_spec(num_stages: int = 3, **fields: object) -> RunSpec:
    tree: dict[str, object] = {
        "run_id": "test",
        "seed": 1,
        "model": {"preset": "nano", "vocab_size": 64},
        "data": {
            "source": "python-docs",
            "tokenizer": "bpe:512",
            "sequence_length": 8,
            "sequences_per_microbatch": 2,
        },
        "num_stages": num_stages,
        "replicas": 2,
        "outer_steps": 4,
        "inner_steps": 4,
        "microbatches_per_step": 2,
        "num_partitions": 3,
        **fields,
    }
    return RunSpec.parse(tree, "test")


def hotkey_of(stage_index: int, replica: int) -> Hotkey:
    return Hotkey(f"5Stage{chr(65 + stage_index)}Member{replica + 1}".ljust(48, "z"))


def digest_of(name: object) -> Digest:
    return Digest(blake3(repr(name).encode()).hexdigest())


def object_of(name: str) -> ObjectRef:
    return ObjectRef(key=f"outer/0/{name}", digest=digest_of(name), size_bytes=10)


class World:
    """What the orchestrator would say; every change makes a new feed version."""

    def __init__(self, spec: RunSpec, hotkey: Hotkey, stage_index: int) -> None:
        self.spec, self.hotkey, self.stage_index = spec, hotkey, stage_index
        self.version = 0
        self.state: MemberState | None = MemberState.ACTIVE
        self.phases = [Phase.TRAIN] * spec.num_stages
        self.outer_steps = [0] * spec.num_stages
        self.checkpoint: CheckpointRef | None = None
        self.checkpoint_by: Hotkey | None = None
        self.everybody = [hotkey_of(stage, replica) for stage in range(spec.num_stages) for replica in range(2)]
        self.gone: set[Hotkey] = set()
        self.merge_plan: MergePlan | None = None
        self.manifest: Manifest | None = None
        self.finished = False
        self.trains_ahead = False
        self.validators: tuple[Hotkey, ...] = ()

    def set_phase(self, phase: Phase, outer_step: int) -> None:
        self.phases = [phase] * self.spec.num_stages
        self.outer_steps = [outer_step] * self.spec.num_stages

    def feed(self) -> Feed:
        self.version += 1
        stages = tuple(
            StageState(
                stage_index=index,
                phase=self.phases[index],
                outer_step=self.outer_steps[index],
                deadline_s=NOW_S + 1e6,
                checkpoint=self.checkpoint if index == self.stage_index else None,
                checkpoint_by=self.checkpoint_by if index == self.stage_index else None,
                trains_ahead=self.trains_ahead,
            )
            for index in range(self.spec.num_stages)
        )
        peers = tuple(
            Peer(hotkey=hotkey, url=f"http://peer:{place}", stage_index=place // 2, state=MemberState.ACTIVE)
            for place, hotkey in enumerate(self.everybody)
            if hotkey not in self.gone
        )
        joined = None if self.state is None else Joined(stage_index=self.stage_index, state=self.state)
        return Feed(
            version=self.version,
            now_s=NOW_S,
            finished=self.finished,
            assignment=joined,
            stages=stages,
            peers=peers,
            merge_plan=self.merge_plan,
            manifest=self.manifest,
            validators=self.validators,
        )


class Driver:
    """A core and its time; every event is followed by a check of the invariants."""

    def __init__(self, stage_index: int, num_stages: int = 3, *, seed: int = 1, **fields: object) -> None:
        self.spec = make_spec(num_stages, **fields)
        self.stage_index = stage_index
        self.me = hotkey_of(stage_index, 0)
        self.core = MinerCore(self.spec, self.me, Random(seed))
        self.core.handle(JoinEnded(Joined(stage_index=stage_index, state=MemberState.JOINING)), NOW_S - 10.0)
        self.world = World(self.spec, self.me, stage_index)
        self.now_s = NOW_S
        self.reports: list[Report] = []
        """Those that were sent, each once."""

    def handle(self, event: Event, after_s: float = 0.0) -> list[Effect]:
        self.now_s += after_s
        effects = self._handle(event)
        for effect in effects:
            if isinstance(effect, SendReport) and effect.report not in self.reports:
                self.reports.append(effect.report)
        return effects

    def _handle(self, event: Event) -> list[Effect]:
        """What is to be made durable is so at once, with all its tensors."""
        effects: list[Effect] = []
        for effect in self.core.handle(event, self.now_s):
            if isinstance(effect, PersistLog):
                self.core.check_invariants()
                kept = effect.commitment.model_copy(update={"num_kept": effect.commitment.num_entries})
                effects += self._handle(LogPersisted(kept))
            else:
                effects.append(effect)
        self.core.check_invariants()
        return effects

    def all_reports(self) -> list[Report]:
        """Acknowledges every report until none is left to send."""
        num_acknowledged = 0
        while num_acknowledged < len(self.reports):
            self.handle(ReportEnded(self.reports[num_acknowledged].sequence, True))
            num_acknowledged += 1
            self.handle(Ticked(), after_s=1.0)
        assert [report.sequence for report in self.reports] == list(range(len(self.reports)))
        return self.reports

    def ends(self) -> list[MicrobatchEnd]:
        return [end for report in self.all_reports() for end in report.ends]

    def receipts(self) -> list[Receipt]:
        return [receipt for report in self.all_reports() for receipt in report.receipts]

    def tell(self) -> list[Effect]:
        """The newest feed arrives."""
        return self.handle(FeedArrived(self.world.feed()))

    def start(self) -> list[Effect]:
        """An active member that holds its anchor; what it does first."""
        effects = self.tell()
        assert effects == [LoadAnchor(self.stage_index, self.world.outer_steps[self.stage_index], None)]
        return self.handle(AnchorLoaded(self.stage_index, self.world.outer_steps[self.stage_index], STATE_DIGEST))

    def lease(self, *microbatch_ids: int, outer_step: int = 0) -> list[Effect]:
        microbatches = tuple(
            LeasedMicrobatch(microbatch_id=MicrobatchId(number), data_id=DataId(number + 100))
            for number in microbatch_ids
        )
        return self.handle(
            LeaseGranted(Lease(outer_step=outer_step, microbatches=microbatches, deadline_s=self.now_s + 50))
        )

    def activation(self, number: int, *, replica: int = 0, **fields: object) -> Transfer:
        """What the given replica of the stage before would offer."""
        path = tuple(hotkey_of(stage, replica) for stage in range(self.stage_index))
        return self.transfer(Direction.ACTIVATION, number, **{"path": path, **fields})

    def gradient(self, number: int, *, next_replica: int = 0, **fields: object) -> Transfer:
        """What the given replica of the next stage would return."""
        before = tuple(hotkey_of(stage, 0) for stage in range(self.stage_index))
        after = tuple(hotkey_of(stage, next_replica) for stage in range(self.stage_index + 1, self.spec.num_stages))
        return self.transfer(Direction.GRADIENT, number, **{"path": (*before, self.me, *after), "loss": 2.5, **fields})

    def transfer(self, direction: Direction, number: int, /, **fields: object) -> Transfer:
        base: dict[str, object] = {
            "direction": direction,
            "microbatch_id": number,
            "data_id": number + 100,
            "outer_step": 0,
            "to_stage": self.stage_index,
            "deadline_s": self.now_s + 50,
            "digest": digest_of((direction, number)),
            "size_bytes": 10,
        }
        return Transfer.model_validate(base | fields)
