"""`ValidatorCore`: whom to check, what came of it, when to set weights. Pure.

One round for each outer step, begun when every stage has the commitments it will get: fetch them and the ledger, draw
miners, check one after the other, reduce a few partitions again once the manifests are out, send the verdicts, then set
chain weights. Rounds are not queued: when several
outer steps have become due meanwhile, only the newest is checked, because evidence does not stay for ever.

Must not fetch, compute with tensors, read a clock or draw from anything but its own generator. Invariants: nobody is
drawn before the commitments are in; a miner gets one verdict on each subject of an outer
step at most; a failed verdict rests on the
miner's own bytes, or on the silence of a miner that has been active all along and still is, as a feed from after the
silence says; the validator's own failures give no verdict.

What a miner has committed to lies on its disk, so that one that was started anew answers like any other: whoever no
longer has it fails. Work that no commitment covers is not checked and not paid.
"""

import random
from dataclasses import asdict

from orion.common.config import RunSpec
from orion.common.ids import Hotkey, Subject
from orion.common.ledger.scoring import verified_steps, verifying_subject, window_start
from orion.common.protocol.codec import activation_spec, body_size
from orion.common.protocol.records import (
    Verdict,
)
from orion.validator.budget import Spending
from orion.validator.check import Check, Ending, EndingKind
from orion.validator.config import Budget
from orion.validator.errand import Errands, notice_of_missing
from orion.validator.events import (
    ChainFailed,
    CommitmentsArrived,
    Effect,
    Event,
    EvidenceArrived,
    EvidenceFailed,
    FeedArrived,
    FetchCommitments,
    FetchLedger,
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
    OrchestratorFailed,
    ReductionEnded,
    ReductionUnavailable,
    ReplayEnded,
    ReplayUnavailable,
    ScoresSent,
    SendScores,
    SendVerdict,
    SignsArrived,
    Ticked,
    VerdictSent,
    WeightsRefused,
    WeightsSet,
)
from orion.validator.lookout import Lookout
from orion.validator.membership import Membership
from orion.validator.reduction_check import ReductionCheck
from orion.validator.round import Round, target_of
from orion.validator.sampling import draw_checks
from orion.validator.turns import Turns
from orion.validator.weight_duty import WeightDuty

FEED_PATIENCE_S = 60.0
"""How long a silent miner's check waits for a feed that says whether it is still there: twice the long-poll's wait."""

OUTER_STEPS_OWED = 3
"""Outer steps that a miner must be able to answer for: the one under way and the two before it. Miners keep one more,
because a feed may be late."""
_REASON_CHARS_MAX = 500
"""Bound of `Text`."""


class ValidatorCore:
    """Decides; see the module. `handle` is its only door."""

    def __init__(self, spec: RunSpec, hotkey: Hotkey, rng: random.Random, budget: Budget | None = None) -> None:
        """`hotkey` is the validator's own; `rng` must be unknown to the miners. `budget` is what it can afford."""
        self._spec = spec
        self._hotkey = hotkey
        self._rng = rng
        self._members = Membership(spec)
        self._spending = Spending(budget if budget is not None else Budget())
        self._body_bytes = body_size(activation_spec(spec, 1)) if spec.num_stages > 1 else 0
        self._errands = Errands()
        self._duty = WeightDuty(spec, self._errands)
        self._lookout = Lookout()
        self._round: Round | None = None
        self._last_round = -1
        self._turns = Turns()
        self._has_requested_final_weights = False
        self._notices: list[Notice] = []
        self.num_checks = 0
        """Verdicts given."""
        self.num_failed = 0
        """Of these, those that failed."""

    @property
    def is_done(self) -> bool:
        """Whether the run is finished, all its checks are through and its last weights set (or refused for good)."""
        return (
            self._members.finished
            and self._has_requested_final_weights
            and self._round is None
            and not self._duty.is_open
            and not self._errands
        )

    def handle(self, event: Event, now_s: float) -> list[Effect]:
        """Takes in an event and says what to do now. `now_s` never runs backwards."""
        self._take_in(event, now_s)
        effects: list[Effect] = []
        # Each pass does what the state asks for; it goes on as long as that changes the state.
        while self._advance(effects, now_s):
            pass
        effects.extend(self._duty.pump(now_s, is_checking=self._round is not None))
        effects.extend(self._errands.pump(now_s))
        effects.extend(self._notices)
        self._notices.clear()
        return effects

    def check_invariants(self) -> None:
        """Raises AssertionError when the state is impossible."""
        current = self._round
        assert self.num_failed <= self.num_checks
        if current is None:
            return
        assert current.outer_step > self._last_round
        assert current.targets is None or current.commitments is not None, "drawn before the commitments"
        assert current.check is None or current.check.target.outer_step == current.outer_step
        num_logs = sum(subject is not Subject.REDUCTION for _, subject in current.verdicts)
        assert num_logs <= 2 * self._spec.validation.checks_per_outer_step, "more than the usual and those on top"
        assert all(verdict.outer_step == current.outer_step for verdict in current.verdicts.values())
        if current.check is not None:
            checked = {miner for miner, subject in current.verdicts if subject is not Subject.REDUCTION}
            assert current.check.target.miner not in checked, "checked twice"
            current.check.check_invariants()

    # --- what happened ------------------------------------------------------------------------------------------------

    def _take_in(self, event: Event, now_s: float) -> None:
        match event:
            case Ticked():
                pass
            case FeedArrived():
                self._members.update(event.feed)
                self._on_feed(now_s)
            case CommitmentsArrived() | SignsArrived():
                self._on_record(event)
            case MergeArrived() | ReductionEnded() | ReductionUnavailable():
                self._on_reduction(event, now_s)
            case LedgerArrived():
                self._errands.ledger_arrived()
                self._duty.on_ledger(event.ledger, now_s)
                if self._round is not None and self._round.ledger is None:
                    self._round.ledger = event.ledger
            case MetagraphArrived():
                self._errands.succeeded(FetchMetagraph())
                self._duty.on_view(event.view, now_s)
            case VerdictSent() | ScoresSent():
                sent = SendVerdict(event.verdict) if isinstance(event, VerdictSent) else SendScores(event.sheet)
                self._errands.succeeded(sent)
                self._duty.on_sent(sent)
            case WeightsSet():
                self._notices += self._duty.on_set()
            case WeightsRefused():
                self._notices += self._duty.on_refused(event, now_s)
            case OrchestratorFailed() | ChainFailed():
                self._on_failed(event, now_s)
            case _:
                self._on_check_event(event, now_s)

    def _on_feed(self, now_s: float) -> None:
        """A silent miner's case is settled by the first feed after its silence began."""
        current = self._round
        if current is not None and current.silent_since_s is not None and now_s > current.silent_since_s:
            assert current.check is not None
            assert current.check.ending is not None
            self._conclude_silence(current, current.check, current.check.ending)

    def _on_record(self, event: CommitmentsArrived | SignsArrived) -> None:
        if isinstance(event, SignsArrived):
            self._errands.succeeded(event.asked)
            self._lookout.on_signs(event)
            return
        self._errands.succeeded(FetchCommitments(event.outer_step))
        current = self._round
        if current is not None and current.outer_step == event.outer_step and current.commitments is None:
            current.commitments = event.commitments

    def _on_reduction(self, event: MergeArrived | ReductionEnded | ReductionUnavailable, now_s: float) -> None:
        if isinstance(event, MergeArrived):
            self._errands.succeeded(FetchMerge(event.record.stage_index, event.record.outer_step))
        if self._round is None:
            return
        match event:
            case MergeArrived(record):
                self._round.on_merge(record.stage_index, record.outer_step, record)
            case ReductionEnded():
                self._spending.spend(event.compute_s)
                self._round.reductions.on_reduced(event)
            case ReductionUnavailable():
                self._notices += self._round.reductions.on_unavailable(event, now_s)

    def _on_failed(self, event: OrchestratorFailed | ChainFailed, now_s: float) -> None:
        retry = event.retry if isinstance(event, OrchestratorFailed) else True
        if not self._errands.failed(event.effect, retry, now_s):
            return
        current = self._round
        if isinstance(event.effect, FetchSigns):
            self._lookout.on_failed(event.effect)
        if isinstance(event.effect, FetchMerge) and current is not None:
            current.on_merge(event.effect.stage_index, event.effect.outer_step, None)
        missing = notice_of_missing(event.effect, event.detail)
        if missing is not None:
            self._notices.append(missing)
            return
        if current is not None and current.targets is None and not isinstance(event, ChainFailed):
            current.targets = []
            skipped = {"first": current.outer_step, "last": current.outer_step, "detail": event.detail}
            self._notices.append(Notice("warning", "outer_steps_not_checked", skipped))
        if not isinstance(event.effect, FetchCommitments):
            self._notices += self._duty.on_given_up(event)

    def _on_check_event(
        self,
        event: LogArrived | LogFailed | EvidenceArrived | EvidenceFailed | ReplayEnded | ReplayUnavailable,
        now_s: float,
    ) -> None:
        check = None if self._round is None else self._round.check
        outer_step = (
            event.request.outer_step if isinstance(event, EvidenceArrived | EvidenceFailed) else event.outer_step
        )
        if check is None or (event.miner, outer_step) != (check.target.miner, check.target.outer_step):
            return
        match event:
            case LogFailed() | EvidenceFailed() if self._members.finished and event.problem is FetchProblem.UNREACHABLE:
                check.on_gone("the run is over and the miner has left")
            case LogArrived():
                check.on_log(event.log, event.agreed, now_s)
            case LogFailed():
                check.on_log_failed(event.problem, event.detail, now_s)
            case EvidenceArrived():
                check.on_evidence(event)
            case EvidenceFailed():
                check.on_evidence_failed(event.request, event.problem, event.detail, now_s)
            case ReplayEnded():
                self._spending.spend(event.compute_s, event.result.num_operations)
                check.on_replayed(event.result)
            case ReplayUnavailable():
                check.on_replay_unavailable(event.detail, event.retry, now_s)

    # --- what to do ---------------------------------------------------------------------------------------------------

    def _advance(self, effects: list[Effect], now_s: float) -> bool:
        current = self._round
        if current is None:
            return self._begin_round()
        if current.targets is None:
            return self._draw(current)
        self._ask_for_merges(current)
        if current.check is not None:
            return self._pursue(current, current.check, effects, now_s)
        if self._spending.is_exhausted and not current.has_judged_reductions:
            self._cut_short(current)
        if current.targets:
            target = current.targets.pop(0)
            # An overlapped outer step begins on the anchor before it.
            oldest_anchor = target.outer_step - (self._spec.sync == "overlapped")
            checkpoint = self._members.checkpoint(target.stage_index, oldest_anchor)
            operations_max = self._spending.operations_max(self._body_bytes)
            current.check = Check(self._spec, target, checkpoint, self._rng, operations_max)
            current.check.start(now_s)
            return True
        if not current.has_judged_reductions:
            return self._reduce(current, effects, now_s)
        if self._errands.has_verdicts:
            return False
        self._end_round(current.outer_step)
        return True

    def _begin_round(self) -> bool:
        newest = self._members.checkable_outer_step
        if newest is None or newest <= self._last_round:
            if self._members.finished and not self._has_requested_final_weights:
                self._has_requested_final_weights = True
                self._duty.request(max(0, self._last_round))
            return False
        if self._hotkey not in self._members.validators:
            return self._wait_for_permit(newest)
        if 0 <= self._last_round < newest - 1:
            skipped = {"first": self._last_round + 1, "last": newest - 1}
            self._notices.append(Notice("warning", "outer_steps_not_checked", skipped))
        if self._num_checks == 0 and self._spec.validation.reductions_per_outer_step == 0:
            self._end_round(newest)
            return True
        self._spending.begin_round()
        self._round = Round(newest, ReductionCheck(self._spec, newest, self._rng))
        self._errands.add(FetchCommitments(newest))
        self._errands.add(FetchLedger(window_start(newest, self._spec)))
        self._errands.add(self._lookout.ask(newest))
        return False

    def _wait_for_permit(self, newest: int) -> bool:
        """Without one no miner answers and no verdict counts. Permits come at an epoch; a run that is over ends."""
        if not self._members.finished:
            return False
        self._notices.append(Notice("warning", "outer_steps_not_checked", {"last": newest, "detail": "no permit"}))
        self._end_round(newest)
        return True

    def _draw(self, current: Round) -> bool:
        """Draws the round's miners among those that committed to work (who did not is not paid for any) and are there
        now."""
        if current.commitments is None or current.ledger is None or self._lookout.is_waiting:
            return False
        outer_step = current.outer_step
        records = {record.hotkey: record for record in current.commitments.records if record.commitment.num_entries > 0}
        there = {hotkey for hotkey in records if self._members.url(hotkey) is not None}
        self._turns.verified(verified_steps(current.ledger, self._spec))
        suspicions = self._lookout.suspicions(self._members.stages)
        if suspicions:
            suspects = {hotkey: round(suspicion, 2) for hotkey, suspicion in sorted(suspicions.items())}
            self._notices.append(Notice("info", "suspects", {"outer_step": outer_step, "suspects": suspects}))
        drawn = draw_checks(
            there,
            self._turns.last,
            outer_step,
            self._num_checks,
            self._rng,
            rules=self._spec.validation,
            suspicions=suspicions,
            in_vain=self._turns.in_vain,
        )
        current.targets = [target_of(records[draw.hotkey], draw, outer_step) for draw in drawn]
        return True

    def _pursue(self, current: Round, check: Check, effects: list[Effect], now_s: float) -> bool:
        if check.needs_contribution and current.knows_contribution(check.target.miner, check.target.stage_index):
            check.on_contribution(current.contribution_of(check.target.miner, check.target.stage_index))
        effects += check.pump(self._members.url(check.target.miner), now_s)
        if check.ending is None:
            return False
        if check.ending.kind not in (EndingKind.SILENT, EndingKind.WITHHELD):
            self._conclude(current, check, check.ending)
            return True
        if current.silent_since_s is None:
            current.silent_since_s = now_s
        elif now_s >= current.silent_since_s + FEED_PATIENCE_S:
            detail = f"{check.ending.detail}, but the orchestrator is silent too"
            self._conclude(current, check, Ending(EndingKind.UNDECIDED, detail))
            return True
        return False

    def _conclude_silence(self, current: Round, check: Check, ending: Ending) -> None:
        """A feed has come since the miner owes an answer: it says whether the miner still does."""
        miner = check.target.miner
        why: str | None = None
        if self._hotkey not in self._members.validators:
            why = "this validator has lost its permit"
        elif ending.kind is EndingKind.WITHHELD:
            if self._members.outer_step(check.target.stage_index) >= current.outer_step + OUTER_STEPS_OWED:
                why = "it need not have that any more"
        elif self._members.finished or not self._members.was_there(miner, current.outer_step):
            why = "the run is over" if self._members.finished else "it was away"
        if why is not None:
            self._conclude(current, check, Ending(EndingKind.UNDECIDED, f"{ending.detail}, but {why}"))
            return
        self._conclude(current, check, Ending(EndingKind.FAILED, ending.detail))

    def _conclude(self, current: Round, check: Check, ending: Ending) -> None:
        """Turns the ending of the check under way into a verdict, or says why there is none."""
        current.check = None
        current.silent_since_s = None
        target = check.target
        fields: dict[str, object] = {
            "miner": target.miner,
            "stage_index": target.stage_index,
            "outer_step": target.outer_step,
            "detail": ending.detail,
        }
        if check.replay_result is not None:
            fields |= asdict(check.replay_result)
        if target.verifies:
            self._note_turn(check, ending)
        if ending.kind is EndingKind.UNDECIDED:
            self._notices.append(Notice("warning", "check_undecided", fields))
            return
        passed = ending.kind is EndingKind.PASSED
        verdict = Verdict(
            miner=target.miner,
            outer_step=target.outer_step,
            passed=passed,
            subject=check.subject,
            num_operations=ending.num_operations,
            reason=ending.detail[:_REASON_CHARS_MAX],
        )
        self._judge(current, verdict)
        self._notices.append(Notice("info" if passed else "warning", "check_ended", {**fields, "passed": passed}))

    def _note_turn(self, check: Check, ending: Ending) -> None:
        """What a check that was to verify its miner has come to. Also one that could not be made is a turn: a miner of
        which the whole never can be replayed must not take everybody's."""
        target = check.target
        if ending.kind is EndingKind.PASSED and check.subject is verifying_subject(self._spec):
            self._turns.verified({target.miner: target.outer_step})
            return
        is_withheld = check.ending is not None and check.ending.kind is EndingKind.WITHHELD
        is_away = is_withheld or not self._members.was_there(target.miner, target.outer_step)
        was_there = ending.kind is not EndingKind.UNDECIDED or not is_away
        self._turns.tried_in_vain(target.miner, target.outer_step, was_there=was_there)

    @property
    def _num_checks(self) -> int:
        """Miners to check in a round. With optimizer state that is kept, a log does not follow from the public
        anchor."""
        return self._spec.validation.checks_per_outer_step if self._spec.inner.inner_state == "reset" else 0

    def _ask_for_merges(self, current: Round) -> None:
        """Fetches how each stage was merged, once it was."""
        is_needed = current.check is not None and current.check.needs_contribution
        if self._spec.validation.reductions_per_outer_step == 0 and not is_needed:
            return
        for stage_index in range(self._spec.num_stages):
            if not current.reductions.knows(stage_index):
                self._ask_for_merge(current, stage_index, current.outer_step)
        check = current.check
        if check is not None and check.needs_contribution:
            stage_index = check.target.stage_index
            if current.is_late(check.target.miner, stage_index) and stage_index not in current.next_merges:
                self._ask_for_merge(current, stage_index, current.outer_step + 1)

    def _ask_for_merge(self, current: Round, stage_index: int, outer_step: int) -> None:
        if self._members.has_merged(stage_index, outer_step):
            self._errands.add(FetchMerge(stage_index, outer_step))
        elif self._members.finished:
            current.on_merge(stage_index, outer_step, None)

    def _cut_short(self, current: Round) -> None:
        """Leaves out what the budget has no room for; whoever is not looked at is due again."""
        assert current.targets is not None
        num_partitions = current.reductions.give_up()
        if not current.targets and not num_partitions:
            return
        fields = {
            "outer_step": current.outer_step,
            "compute_s": self._spending.spent_s,
            "miners": [target.miner for target in current.targets],
            "num_partitions": num_partitions,
        }
        current.targets = []
        self._notices.append(Notice("warning", "round_cut_short", fields))

    def _reduce(self, current: Round, effects: list[Effect], now_s: float) -> bool:
        """Reduces the drawn partitions again, one after the other, and judges their reducers at the end."""
        effects += current.reductions.pump(now_s)
        if not current.reductions.is_over:
            return False
        current.has_judged_reductions = True
        for verdict in current.reductions.verdicts():
            self._judge(current, verdict)
            if not verdict.passed:
                fields = {"miner": verdict.miner, "outer_step": verdict.outer_step, "detail": verdict.reason}
                self._notices.append(Notice("warning", "wrong_mean", fields))
        fields = {"outer_step": current.outer_step, "num_partitions": current.reductions.num_reduced}
        self._notices.append(Notice("info", "reductions_checked", fields))
        return True

    def _judge(self, current: Round, verdict: Verdict) -> None:
        current.verdicts[verdict.miner, verdict.subject] = verdict
        self.num_checks += 1
        self.num_failed += not verdict.passed
        self._errands.add(SendVerdict(verdict))

    def _end_round(self, outer_step: int) -> None:
        self._round = None
        self._last_round = outer_step
        if not self._members.finished:  # else the last weights follow at once
            self._duty.request(outer_step)
