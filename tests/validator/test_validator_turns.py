"""Whose turn it is in a whole run: real draws of a real core, over many seeds, with whatever leaves a check undone.

Six miners, one check an outer step, eight outer steps, as in the local run. Logs are two entries long and their replay
is passed off, because what is looked at is who is drawn.
"""

import random
from collections import deque
from dataclasses import dataclass, field

import pytest
from validator_core_kit import VIEW
from validator_world import VALIDATOR, make_feed
from working_miner import answer_to, hotkey, make_spec

from orion.common.config import RunSpec
from orion.common.ids import DataId, Digest, Hotkey, MicrobatchId, Operation, Phase, Subject
from orion.common.protocol.keys import pseudo_gradient_key
from orion.common.protocol.log import log_root
from orion.common.protocol.messages import Commitment, Contribution, Feed, Manifest, MergedPartition, ObjectRef
from orion.common.protocol.records import (
    CommitmentRecord,
    Commitments,
    Ledger,
    LogEntry,
    MergeRecord,
    Verdict,
    VerdictRecord,
)
from orion.validator.core import ValidatorCore
from orion.validator.events import (
    CommitmentsArrived,
    Effect,
    Event,
    FeedArrived,
    FetchCommitments,
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
    Replay,
    ReplayEnded,
    ReplayResult,
    ReplayUnavailable,
    ScoresSent,
    SendScores,
    SendVerdict,
    SetWeights,
    SignsArrived,
    VerdictSent,
    WeightsSet,
)

MINERS = [hotkey(0, number) for number in range(6)]
OUTER_STEPS = 8
NUM_RUNS = 100


def spec_with(num_checks: int = 1, whole_share: float = 0.5) -> RunSpec:
    rules = {"checks_per_outer_step": num_checks, "whole_share": whole_share}
    return make_spec(rules, num_stages=1, replicas=len(MINERS), outer_steps=OUTER_STEPS, microbatches_per_step=1)


def entry(operation: Operation, **fields: object) -> LogEntry:
    nothing = {"microbatch_id": None, "data_id": None, "input_digest": None, "output_digest": None}
    return LogEntry(operation=operation, inner_step=0, **{**nothing, **fields})  # type: ignore[arg-type]


LOG = (
    entry(Operation.FORWARD, microbatch_id=MicrobatchId(1), data_id=DataId(1)),
    entry(Operation.INNER_STEP, num_microbatches=1),
)
PASSED = ReplayResult(
    num_operations=len(LOG),
    num_compared=1,
    num_bit_equal=1,
    cosine_least=1.0,
    norm_ratio_least=1.0,
    num_partitions=1,
    pseudo_gradient_cosine_least=1.0,
    pseudo_gradient_norm_ratio_least=1.0,
    num_foreign_inputs=0,
    failure=None,
)


@dataclass
class Run:
    """A run of honest miners as one validator sees it."""

    spec: RunSpec
    seed: int
    left_out: frozenset[tuple[Hotkey, int]] = frozenset()
    """Whose upload of which outer step did not enter the merge."""
    away: frozenset[Hotkey] = frozenset()
    """Who leaves for the outer step when it is asked for its log, and comes back."""
    unreplayable: frozenset[int] = frozenset()
    """Outer steps whose anchor the validator cannot have."""
    verdicts: list[Verdict] = field(default_factory=list)
    num_undone: int = 0
    """Checks that were spoilt."""

    def __post_init__(self) -> None:
        self.core = ValidatorCore(self.spec, VALIDATOR, random.Random(self.seed))
        self._now_s = 1000.0
        self._version = 0
        self._gone: set[Hotkey] = set()

    @property
    def verified(self) -> list[Hotkey]:
        """Who was verified, in order."""
        return [verdict.miner for verdict in self.verdicts if verdict.subject is Subject.WHOLE and verdict.passed]

    def steps(self, *outer_steps: int) -> "Run":
        """The validator sees these outer steps end; those between it did not get to."""
        for outer_step in outer_steps:
            self._gone.clear()
            self._give(FeedArrived(self._feed(outer_step, Phase.MERGE)))
            self._give(FeedArrived(self._feed(outer_step + 1, Phase.TRAIN)))
        return self

    def _feed(self, outer_step: int, phase: Phase) -> Feed:
        self._now_s += 1.0
        self._version += 1
        there = {miner: 0 for miner in MINERS if miner not in self._gone}
        return make_feed(self.spec, there, version=self._version, outer_step=outer_step, phase=phase)

    def _give(self, event: Event) -> None:
        events = deque([event])
        while events:
            effects = self.core.handle(events.popleft(), self._now_s)
            self.core.check_invariants()
            for effect in effects:
                events.extend(self._answers(effect))

    def _answers(self, effect: Effect) -> list[Event]:
        match effect:
            case FetchLog() | Replay():
                return self._answers_of_check(effect)
            case FetchMetagraph():
                return [MetagraphArrived(VIEW)]
            case SetWeights():
                return [WeightsSet()]
            case _:
                answer = self._answer_of_orchestrator(effect)
                return [] if answer is None else [answer]

    def _answer_of_orchestrator(self, effect: Effect) -> Event | None:
        match effect:
            case FetchCommitments(outer_step):
                return CommitmentsArrived(outer_step, self._commitments(outer_step))
            case FetchLedger():
                records = tuple(VerdictRecord(validator=VALIDATOR, verdict=verdict) for verdict in self.verdicts)
                newest = max((verdict.outer_step for verdict in self.verdicts), default=0)
                digest = Digest("0" * 64)
                return LedgerArrived(Ledger(num_entries=1, digest=digest, outer_step=newest, work=(), verdicts=records))
            case FetchMerge(_, outer_step):
                return MergeArrived(self._merge(outer_step))
            case FetchSigns():
                return SignsArrived(effect, (), ())
            case SendVerdict(verdict):
                self.verdicts.append(verdict)
                return VerdictSent(verdict)
            case SendScores(sheet):
                return ScoresSent(sheet)
            case _:
                return None

    def _answers_of_check(self, effect: FetchLog | Replay) -> list[Event]:
        match effect:
            case FetchLog(miner, _, request) if miner in self.away:
                self.num_undone += 1
                self._gone.add(miner)
                problem = LogFailed(miner, request.outer_step, FetchProblem.UNREACHABLE, "gone")
                return [problem, FeedArrived(self._feed(request.outer_step, Phase.MERGE))]
            case FetchLog(miner, _, request):
                return [LogArrived(miner, request.outer_step, answer_to(request, LOG))]
            case Replay(task) if task.outer_step in self.unreplayable:
                self.num_undone += 1
                return [ReplayUnavailable(task.miner, task.outer_step, "no anchor", retry=False)]
            case Replay(task):
                self.num_undone += (task.miner, task.outer_step) in self.left_out
                return [ReplayEnded(task.miner, task.outer_step, PASSED, 0.0)]

    def _commitments(self, outer_step: int) -> Commitments:
        commitment = Commitment(
            outer_step=outer_step,
            num_entries=len(LOG),
            num_applied=1,
            num_contributed=1,
            num_kept=len(LOG),
            root=log_root(LOG),
            is_final=True,
        )
        return Commitments(
            records=tuple(CommitmentRecord(hotkey=miner, stage_index=0, commitment=commitment) for miner in MINERS)
        )

    def _merge(self, outer_step: int) -> MergeRecord:
        there = [miner for miner in MINERS if (miner, outer_step) not in self.left_out]
        return MergeRecord(
            stage_index=0,
            outer_step=outer_step,
            contributions=tuple(
                Contribution(
                    hotkey=miner,
                    num_microbatches=1,
                    objects=(
                        ObjectRef(
                            key=pseudo_gradient_key(outer_step, 0, miner, 0), digest=Digest("0" * 64), size_bytes=1
                        ),
                    ),
                )
                for miner in there
            ),
            partitions=(),
            manifest=Manifest(
                stage_index=0,
                outer_step=outer_step,
                partitions=(MergedPartition(partition_index=0, object=None, reducers=()),),
                contributors=tuple(there),
                total_microbatches=0,
            ),
        )


@pytest.mark.parametrize("whole_share", (0.1, 0.5, 1.0))
def test_everybody_is_verified_once_as_soon_as_there_were_as_many_turns_as_miners(whole_share: float) -> None:
    for seed in range(NUM_RUNS):
        first = Run(spec_with(whole_share=whole_share), seed).steps(*range(len(MINERS)))
        assert set(first.verified) == set(MINERS), f"seed {seed}"


def test_it_does_not_matter_which_outer_steps_the_validator_got_to() -> None:
    """Without a permit at the beginning, or too slow for each outer step: whoever still waits is not passed over."""
    for seed in range(NUM_RUNS):
        steps = sorted(random.Random(f"left out {seed}").sample(range(OUTER_STEPS), len(MINERS)))
        run = Run(spec_with(), seed).steps(*steps)
        assert set(run.verified) == set(MINERS), f"seed {seed}: {steps}"


def test_several_checks_an_outer_step_pass_nobody_over_either() -> None:
    for seed in range(NUM_RUNS):
        run = Run(spec_with(num_checks=4), seed).steps(0, 1)
        assert set(run.verified) == set(MINERS), f"seed {seed}"


def test_a_check_that_came_to_nothing_is_made_up_for() -> None:
    """An upload that did not enter its merge, and an anchor that could not be had, leave a miner unverified."""
    num_undone = 0
    for seed in range(NUM_RUNS):
        rng = random.Random(f"undone {seed}")
        left_out, unreplayable = rng.sample(range(5), 2)
        run = Run(
            spec_with(),
            seed,
            left_out=frozenset((miner, left_out) for miner in MINERS),
            unreplayable=frozenset([unreplayable]),
        ).steps(*range(OUTER_STEPS))
        num_undone += run.num_undone
        assert set(run.verified) == set(MINERS), f"seed {seed}"
    assert num_undone >= 2 * NUM_RUNS


def test_who_goes_away_when_it_is_asked_does_not_take_the_others_turns() -> None:
    evader = MINERS[0]
    for seed in range(NUM_RUNS):
        run = Run(spec_with(), seed, away=frozenset([evader])).steps(*range(OUTER_STEPS))
        assert run.num_undone >= 2
        assert set(run.verified) >= set(MINERS) - {evader}, f"seed {seed}"
