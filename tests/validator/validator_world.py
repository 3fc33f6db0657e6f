"""Miners with real engines and a small world around a ValidatorCore, in memory and without waiting."""

import random
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import torch
from blake3 import blake3
from torch import Tensor

from orion.common.config import RunSpec
from orion.common.ids import DataId, Digest, Hotkey, MemberState, MicrobatchId, Operation, Phase
from orion.common.model.params import num_params
from orion.common.model.stage import Stage
from orion.common.protocol.codec import encode
from orion.common.protocol.keys import pseudo_gradient_key
from orion.common.protocol.log import entry_bytes, log_root
from orion.common.protocol.merkle import MerkleTree
from orion.common.protocol.messages import (
    Commitment,
    Contribution,
    Feed,
    Manifest,
    MergedPartition,
    ObjectRef,
    Peer,
    StageState,
)
from orion.common.protocol.records import (
    BoundaryRecord,
    CommitmentRecord,
    Commitments,
    CommittedLog,
    EvidenceRequest,
    Ledger,
    LogEntry,
    LogRequest,
    MergeRecord,
    Pathways,
    ScoreSheet,
    Verdict,
    VerdictRecord,
    WorkRecord,
)
from orion.common.protocol.reduction import encode_slice
from orion.common.train.anchor import initial_anchor
from orion.common.train.engine import StageEngine
from orion.common.train.partition import partition_bounds
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
from orion.validator.replay import TokenSource, replay

CPU = torch.device("cpu")
VALIDATOR = Hotkey("5" + "V" * 47)


def hotkey(stage_index: int, replica: int = 0) -> Hotkey:
    """A well-formed name for a miner."""
    return Hotkey("5" + f"M{stage_index + 1}R{replica + 1}".ljust(47, "x"))


def make_spec(validation: Mapping[str, object] | None = None, **changes: object) -> RunSpec:
    """A run of three nano stages, with steps large enough to show whether they were taken; merges are not looked at
    where a test does not ask for it."""
    tree: dict[str, object] = {
        "run_id": "test",
        "seed": 3,
        "model": {"preset": "nano"},
        "data": {"sequence_length": 16, "sequences_per_microbatch": 2},
        "num_stages": 3,
        "replicas": 1,
        "outer_steps": 4,
        "inner_steps": 4,
        "microbatches_per_step": 2,
        "inner": {"lr_matrix": 0.05, "lr_other": 0.05, "schedule": {"num_warmup_steps": 0}},
        "time_limits": {"transfer_grace_s": 10.0},
        "validation": {"reductions_per_outer_step": 0, "whole_share": 0.0, **(validation or {})},
    }
    return RunSpec.parse({**tree, **changes}, "test")


class Tokens:
    """Made-up data."""

    def microbatch(self, run_seed: int, data_id: int) -> npt.NDArray[np.int64]:
        rng = np.random.default_rng([run_seed, data_id])
        return rng.integers(0, 512, size=(2, 17), dtype=np.int64)


Body = Mapping[str, Tensor]
Alter = Callable[[Tensor], Tensor]


@dataclass
class Cheat:
    """What a miner does otherwise than it says. The defaults are honest."""

    output: Alter = lambda tensor: tensor
    gradient: Alter = lambda tensor: tensor
    skips_backward: bool = False
    skips_steps: bool = False
    ids: Alter = lambda tensor: tensor
    pseudo_gradient: Alter = lambda tensor: tensor


def digest(body: Body | None) -> Digest | None:
    return None if body is None else encode(body).digest


class WorkingMiner:
    """Runs a real engine and keeps the log and bodies that the protocol asks for."""

    def __init__(
        self, spec: RunSpec, stage_index: int, cheat: Cheat | None = None, tokens: TokenSource | None = None
    ) -> None:
        self.tokens = tokens if tokens is not None else Tokens()
        self.spec, self.stage_index, self.cheat = spec, stage_index, cheat if cheat is not None else Cheat()
        layout = spec.layouts[stage_index]
        self.engine = StageEngine(
            Stage(spec.model, layout),
            inner=spec.inner,
            outer=spec.outer,
            total_params=num_params(spec.model, spec.num_stages, rule=spec.split),
            device=CPU,
            compute_dtype=torch.float32,
            wire_dtype=torch.float32,
            graphs_max=2,
        )
        self.engine.load(initial_anchor(spec, stage_index))
        self.engine.begin_outer_step()
        self.entries: list[LogEntry] = []
        self.bodies: dict[tuple[MicrobatchId, Operation, str], Body] = {}
        self.num_applied = 0
        self._waiting = 0
        self._steps = 0
        self._data_ids: dict[MicrobatchId, DataId] = {}

    def forward(self, microbatch_id: MicrobatchId, data_id: DataId, body: Body | None) -> Body:
        """The activation for the next stage, or the last one's gradient."""
        is_last = self.stage_index == self.spec.num_stages - 1
        ids_BU = (
            torch.from_numpy(self.tokens.microbatch(self.spec.seed, data_id)) if body is None else body["ids"].long()
        )
        result = self.engine.forward(microbatch_id, None if body is None else body["z"], ids_BU)
        self._data_ids[microbatch_id] = data_id
        output: Body
        if is_last:
            assert result.input_grad_BTC is not None
            output = {"g": self.cheat.gradient(result.input_grad_BTC)}
            self._applied()
        else:
            assert result.output_BTC is not None
            output = {"z": self.cheat.output(result.output_BTC), "ids": self.cheat.ids(ids_BU.int())}
        self._log(Operation.FORWARD, microbatch_id, body, output)
        if is_last:
            self.step_when_full()
        return output

    def backward(self, microbatch_id: MicrobatchId, body: Body) -> Body | None:
        """The gradient for the stage before."""
        output: Body | None
        if self.cheat.skips_backward:
            self.engine.drop(microbatch_id)
            output = {"g": body["g"].clone()} if self.stage_index > 0 else None
        else:
            gradient = self.engine.backward(microbatch_id, body["g"]).input_grad_BTC
            output = None if gradient is None else {"g": self.cheat.gradient(gradient)}
        self._applied()
        self._log(Operation.BACKWARD, microbatch_id, body, output)
        self.step_when_full()
        return output

    def step_when_full(self, last: bool = False) -> None:
        """The inner step, once enough has accumulated."""
        if self._waiting < self.spec.microbatches_per_step and not (last and self._waiting):
            return
        if not self.cheat.skips_steps and self.engine.num_accumulated:
            share = self._waiting / self.spec.microbatches_per_step
            self.engine.inner_step(self._steps, share)
        self.entries.append(
            LogEntry(
                operation=Operation.INNER_STEP,
                microbatch_id=None,
                data_id=None,
                inner_step=self._steps,
                input_digest=None,
                output_digest=None,
                num_microbatches=self._waiting,
            )
        )
        self._steps += 1
        self._waiting = 0

    def commitment(self, num_entries: int | None = None, *, is_final: bool = True) -> Commitment:
        """Over the log, or its first entries."""
        entries = self.entries[:num_entries]
        applying = Operation.FORWARD if self.stage_index == self.spec.num_stages - 1 else Operation.BACKWARD
        num_applied = sum(entry.operation is applying for entry in entries)
        return Commitment(
            outer_step=0,
            num_entries=len(entries),
            num_applied=num_applied,
            num_contributed=num_applied,
            num_kept=len(entries),
            root=log_root(entries),
            is_final=is_final,
        )

    def commitments(self) -> tuple[Commitment, ...]:
        """Two on the way, and the final one."""
        sizes = (len(self.entries) // 3, 2 * len(self.entries) // 3)
        return (*(self.commitment(size, is_final=False) for size in sizes), self.commitment())

    def pseudo_gradient_bodies(self) -> list[bytearray]:
        """The encoded slices that it uploads."""
        values_N = self.cheat.pseudo_gradient(self.engine.pseudo_gradient_N())
        return [
            bytearray(encode_slice(self.spec.codec, values_N[partition.start : partition.end]).tobytes())
            for partition in partition_bounds(values_N.numel(), self.spec.num_partitions)
        ]

    def contribution(self) -> Contribution:
        """What it says it has uploaded."""
        return Contribution(
            hotkey=hotkey(self.stage_index),
            num_microbatches=self.num_applied,
            objects=tuple(
                ObjectRef(
                    key=pseudo_gradient_key(0, self.stage_index, hotkey(self.stage_index), index),
                    digest=Digest(blake3(body).hexdigest()),
                    size_bytes=len(body),
                )
                for index, body in enumerate(self.pseudo_gradient_bodies())
            ),
        )

    def _applied(self) -> None:
        self._waiting += 1
        self.num_applied += 1

    def _log(self, operation: Operation, microbatch_id: MicrobatchId, received: Body | None, sent: Body | None) -> None:
        self.entries.append(
            LogEntry(
                operation=operation,
                microbatch_id=microbatch_id,
                data_id=self._data_ids[microbatch_id],
                inner_step=self._steps,
                input_digest=digest(received),
                output_digest=digest(sent),
            )
        )
        for side, body in (("input", received), ("output", sent)):
            if body is not None:
                self.bodies[microbatch_id, operation, side] = body


def train(miners: list[WorkingMiner], num_microbatches: int = 7) -> None:
    """One outer step of a whole pipeline, two microbatches in flight, the last inner step a short one."""
    gradients: deque[tuple[MicrobatchId, Body]] = deque()

    def bring_back() -> None:
        microbatch_id, body = gradients.popleft()
        for miner in reversed(miners[:-1]):
            gradient = miner.backward(microbatch_id, body)
            if gradient is not None:
                body = gradient

    for number in range(num_microbatches):
        microbatch_id, data_id = MicrobatchId(number), DataId(100 + number)
        body: Body | None = None
        for miner in miners:
            body = miner.forward(microbatch_id, data_id, body)
        assert body is not None
        gradients.append((microbatch_id, body))
        if len(gradients) == 2:
            bring_back()
    while gradients:
        bring_back()
    for miner in miners:
        miner.step_when_full(last=True)


def trained(
    spec: RunSpec, cheats: Mapping[int, Cheat] | None = None, tokens: TokenSource | None = None
) -> list[WorkingMiner]:
    """A pipeline after one outer step, with cheats by stage."""
    miners = [WorkingMiner(spec, stage_index, (cheats or {}).get(stage_index), tokens) for stage_index in range(3)]
    train(miners)
    return miners


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


def record_of(name: Hotkey, miner: WorkingMiner) -> CommitmentRecord:
    """What an honest miner has committed to."""
    *earlier, newest = miner.commitments()
    return CommitmentRecord(hotkey=name, stage_index=miner.stage_index, commitment=newest, earlier=tuple(earlier))


def answer_to(request: LogRequest, entries: Sequence[LogEntry]) -> CommittedLog:
    """What a miner with that log answers."""
    tree = MerkleTree([entry_bytes(entry) for entry in entries])
    return CommittedLog(
        outer_step=request.outer_step,
        start=request.start,
        entries=tuple(entries[request.start : request.stop]),
        proof=tree.proof(request.sizes, request.start, request.stop),
    )


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
