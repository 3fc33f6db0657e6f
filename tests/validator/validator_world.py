"""A small world around a ValidatorCore: working miners, an orchestrator and a chain, in memory and without waiting."""

import random
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from working_miner import CPU, Body, Tokens, WorkingMiner, answer_to, record_of

from orion.common.config import RunSpec
from orion.common.ids import Digest, Hotkey, MemberState, Phase
from orion.common.protocol.codec import encode
from orion.common.protocol.messages import (
    Contribution,
    Feed,
    Manifest,
    MergedPartition,
    Peer,
    StageState,
)
from orion.common.protocol.records import (
    BoundaryRecord,
    CommitmentRecord,
    Commitments,
    EvidenceRequest,
    Ledger,
    LogEntry,
    MergeRecord,
    Pathways,
    ScoreSheet,
    Verdict,
    VerdictRecord,
    WorkRecord,
)
from orion.common.train.anchor import initial_anchor
from orion.validator.core import ValidatorCore
from orion.validator.events import (
    ChainFailed,
    ChainView,
    CommitmentsArrived,
    Effect,
    Event,
    EvidenceArrived,
    EvidenceFailed,
    FeedArrived,
    FetchCommitments,
    FetchEvidence,
    FetchLedger,
    FetchLog,
    FetchMerge,
    FetchMetagraph,
    FetchProblem,
    FetchSigns,
    LedgerArrived,
    LogArrived,
    LogFailed,
    MergeArrived,
    MetagraphArrived,
    Notice,
    OrchestratorErrand,
    OrchestratorFailed,
    Reduce,
    ReductionEnded,
    ReductionUnavailable,
    Replay,
    ReplayEnded,
    ReplayUnavailable,
    ScoresSent,
    SendScores,
    SendVerdict,
    SetWeights,
    SignsArrived,
    Ticked,
    VerdictSent,
    WeightsRefused,
    WeightsSet,
)
from orion.validator.replay import replay

VALIDATOR = Hotkey("5" + "V" * 47)


def merge_record(stage_index: int, *contributions: Contribution) -> MergeRecord:
    """A merge of the first outer step that nobody reduced."""
    return MergeRecord(
        stage_index=stage_index,
        outer_step=0,
        contributions=contributions,
        partitions=(),
        manifest=Manifest(
            stage_index=stage_index,
            outer_step=0,
            partitions=(MergedPartition(partition_index=0, object=None, reducers=()),),
            contributors=tuple(contribution.hotkey for contribution in contributions),
            total_microbatches=0,
        ),
    )


def make_feed(
    spec: RunSpec,
    miners: Mapping[Hotkey, int],
    *,
    version: int,
    outer_step: int = 0,
    phase: Phase = Phase.MERGE,
    finished: bool = False,
    states: Mapping[Hotkey, MemberState] | None = None,
    validators: tuple[Hotkey, ...] = (VALIDATOR,),
) -> Feed:
    """A validator's feed; all miners are active unless `states` says otherwise."""
    return Feed(
        version=version,
        now_s=0.0,
        finished=finished,
        assignment=None,
        stages=tuple(
            StageState(
                stage_index=stage_index,
                phase=phase,
                outer_step=outer_step,
                deadline_s=0.0,
                checkpoint=None,
                checkpoint_by=None,
            )
            for stage_index in range(spec.num_stages)
        ),
        peers=tuple(
            Peer(
                hotkey=miner,
                url=f"http://miner-{stage_index}:80",
                stage_index=stage_index,
                state=(states or {}).get(miner, MemberState.ACTIVE),
            )
            for miner, stage_index in miners.items()
        ),
        merge_plan=None,
        manifest=None,
        validators=validators,
    )


class LongestPrefix(random.Random):
    """Draws every number of operations as high as it may be."""

    def randint(self, a: int, b: int) -> int:
        return b


@dataclass
class World:
    """Answers a core's effects at once: what the orchestrator, the miners and the chain would say."""

    spec: RunSpec
    miners: dict[Hotkey, WorkingMiner]
    rng: random.Random = field(default_factory=lambda: random.Random(0))
    now_s: float = 1000.0
    problems: dict[Hotkey, FetchProblem] = field(default_factory=dict)
    """Miners that hand nothing over, and how."""
    evidence_problems: dict[Hotkey, FetchProblem] = field(default_factory=dict)
    logs: dict[Hotkey, tuple[LogEntry, ...]] = field(default_factory=dict)
    """Logs that miners hand over instead of theirs."""
    bodies: dict[Hotkey, Body] = field(default_factory=dict)
    """Bodies that miners hand over instead of all of theirs."""
    records: dict[Hotkey, CommitmentRecord] = field(default_factory=dict)
    """Other commitments than those to their logs."""
    uncommitted: set[Hotkey] = field(default_factory=set)
    work_outer_step: int = 0
    """The outer step that the miners' work is passed off as."""
    credited: dict[Hotkey, int] = field(default_factory=dict)
    pathways: tuple[Pathways, ...] = ()
    boundaries: tuple[BoundaryRecord, ...] = ()
    orchestrator_problem: bool | None = None
    """It fails, and whether it is worth asking again."""
    can_replay: bool = True
    compute_s: float = 0.0
    """What each replay takes."""
    view: ChainView | None = None
    """None: the chain is not reached."""
    refusal: WeightsRefused | None = None
    merges: dict[int, MergeRecord] = field(default_factory=dict)
    """By stage; of the others nothing is known."""
    reduced: dict[tuple[int, int], ReductionEnded] = field(default_factory=dict)
    """By stage and partition; other partitions cannot be reduced here."""
    verdicts: dict[Hotkey, Verdict] = field(default_factory=dict)
    weights: list[Mapping[int, float]] = field(default_factory=list)
    notices: list[Notice] = field(default_factory=list)
    sheets: list[ScoreSheet] = field(default_factory=list)
    effects: list[Effect] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.core = ValidatorCore(self.spec, VALIDATOR, self.rng)
        self._version = 0

    @property
    def stages(self) -> dict[Hotkey, int]:
        return {name: miner.stage_index for name, miner in self.miners.items()}

    def give(self, event: Event) -> None:
        """Hands over an event, and all that follows from it."""
        events = deque([event])
        while events:
            effects = self.core.handle(events.popleft(), self.now_s)
            self.core.check_invariants()
            self.effects += effects
            events.extend(answer for effect in effects if (answer := self.answer(effect)) is not None)

    def give_feed(self, **changes: object) -> None:
        """Hands over the next feed."""
        self._version += 1
        self.give(FeedArrived(make_feed(self.spec, self.stages, version=self._version, **changes)))  # type: ignore[arg-type]

    def pass_time(self, seconds: float) -> None:
        """Lets time pass, with a tick each second."""
        for _ in range(int(seconds)):
            self.now_s += 1.0
            self.give(Ticked())

    def answer(self, effect: Effect) -> Event | None:
        """The event that an effect ends as."""
        match effect:
            case FetchLog() | FetchEvidence() | Replay():
                return self._answer_of_miner(effect)
            case Reduce(task):
                named = (task.stage_index, task.outer_step, task.partition_index)
                unavailable = ReductionUnavailable(*named, "planted", retry=False)
                return self.reduced.get((task.stage_index, task.partition_index), unavailable)
            case FetchMetagraph() | SetWeights():
                return self._answer_of_chain(effect)
            case Notice():
                self.notices.append(effect)
                return None
            case _:
                return self._answer_of_orchestrator(effect)

    def _answer_of_orchestrator(self, effect: OrchestratorErrand) -> Event | None:
        if self.orchestrator_problem is not None:
            return OrchestratorFailed(effect, "planted", retry=self.orchestrator_problem)
        match effect:
            case FetchCommitments():
                return CommitmentsArrived(effect.outer_step, self.commitments(effect.outer_step))
            case FetchLedger():
                return LedgerArrived(self.ledger())
            case FetchMerge():
                if effect.stage_index not in self.merges:
                    return OrchestratorFailed(effect, "not kept", retry=False)
                return MergeArrived(self.merges[effect.stage_index])
            case FetchSigns(outer_steps):
                pages = tuple(page for page in self.pathways if page.outer_step in outer_steps)
                return SignsArrived(effect, pages, self.boundaries)
            case SendVerdict():
                self.verdicts[effect.verdict.miner] = effect.verdict
                return VerdictSent(effect.verdict)
            case SendScores():
                self.sheets.append(effect.sheet)
                return ScoresSent(effect.sheet)

    def _answer_of_chain(self, effect: FetchMetagraph | SetWeights) -> Event | None:
        if self.view is None:
            return ChainFailed(effect, "planted")
        if isinstance(effect, FetchMetagraph):
            return MetagraphArrived(self.view)
        if self.refusal is not None:
            return self.refusal
        self.weights.append(effect.weights)
        return WeightsSet()

    def _answer_of_miner(self, effect: FetchLog | FetchEvidence | Replay) -> Event | None:
        match effect:
            case FetchLog():
                return self._log(effect)
            case FetchEvidence():
                return self._evidence(effect)
            case Replay() if not self.can_replay:
                return ReplayUnavailable(effect.task.miner, effect.task.outer_step, "planted", retry=True)
            case Replay():
                state = initial_anchor(self.spec, effect.task.stage_index)
                has_uploaded = effect.task.contribution is not None
                result = replay(
                    effect.task,
                    state,
                    spec=self.spec,
                    tokens=Tokens(),
                    device=CPU,
                    compute_dtype=torch.float32,
                    uploaded=self.miners[effect.task.miner].pseudo_gradient_bodies() if has_uploaded else (),
                )
                return ReplayEnded(effect.task.miner, effect.task.outer_step, result, self.compute_s)

    def commitments(self, outer_step: int) -> Commitments:
        """Everybody's commitment to the one outer step."""
        return Commitments(
            records=tuple(
                self.records.get(name) or record_of(name, miner)
                for name, miner in self.miners.items()
                if name not in self.uncommitted and outer_step == self.work_outer_step
            )
        )

    def ledger(self) -> Ledger:
        """All work of the one outer step, as credited."""
        return Ledger(
            num_entries=1,
            digest=Digest("0" * 64),
            outer_step=self.work_outer_step,
            work=tuple(
                WorkRecord(
                    hotkey=name,
                    stage_index=miner.stage_index,
                    outer_step=self.work_outer_step,
                    num_microbatches=(count := self.credited.get(name, miner.num_applied)),
                    num_committed=count,
                    merge=None,
                    flops=100.0 * count,
                )
                for name, miner in self.miners.items()
            ),
            verdicts=tuple(VerdictRecord(validator=VALIDATOR, verdict=verdict) for verdict in self.verdicts.values()),
        )

    def _log(self, effect: FetchLog) -> Event:
        if effect.miner in self.problems:
            return LogFailed(effect.miner, effect.request.outer_step, self.problems[effect.miner], "planted")
        entries = self.logs.get(effect.miner, tuple(self.miners[effect.miner].entries))
        return LogArrived(effect.miner, effect.request.outer_step, answer_to(effect.request, entries))

    def _evidence(self, effect: FetchEvidence) -> Event:
        if effect.miner in self.evidence_problems:
            return EvidenceFailed(effect.miner, effect.request, self.evidence_problems[effect.miner], "planted")
        body = self.bodies.get(effect.miner, self._kept(effect.miner, effect.request))
        return EvidenceArrived(effect.miner, effect.request, encode(body).digest, body)

    def _kept(self, miner: Hotkey, request: EvidenceRequest) -> Body:
        return self.miners[miner].bodies[request.microbatch_id, request.operation, request.side]
