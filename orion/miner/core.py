"""`MinerCore`: all that a miner decides. Pure and synchronous: events in, effects out; time and randomness come in.

Owns the parts (flow of microbatches, outer steps, reports, notices) and the order in which they are asked; each rule is
in its part. It holds ids, digests, sizes and states, never tensors. After every event it looks at the whole situation
again and starts what is due, so that no event is needed to make up for one that was skipped, doubled or late.

Invariants (`check_invariants`): the device has at most one job that runs and one that waits; every admitted microbatch
ends exactly once, and is freed in that moment; what is computed is logged, in order; the engine's anchor changes only
between outer steps.
"""

import math
from collections.abc import Sequence
from random import Random

from orion.common.config import RunSpec
from orion.common.ids import Hotkey, MicrobatchId, Phase
from orion.common.protocol.messages import (
    BoundaryReport,
    Feed,
    Heartbeat,
    Refusal,
    RefusalCode,
)
from orion.common.protocol.records import CommittedLog, EvidenceRequest, LogEntry, LogRequest
from orion.miner import events
from orion.miner.archive import KeptLog
from orion.miner.device_work import DeviceWork
from orion.miner.effects import Effect, RefreshFeed, RequestJoin, SendReport
from orion.miner.events import ComputeEnded, Event
from orion.miner.flow import Flow
from orion.miner.injection import Injection
from orion.miner.leasing import Leasing
from orion.miner.moment import Moment
from orion.miner.notices import Notices
from orion.miner.oplog import OpLog
from orion.miner.outbound import Outbound
from orion.miner.outer import OuterSteps
from orion.miner.repair import Repair
from orion.miner.reports import Reports
from orion.miner.router import Router
from orion.miner.table import WITH_NEXT, MicrobatchTable, Stand
from orion.miner.view import View, view_of
from orion.miner.watch import AWAY_S, Watch

JOIN_RETRY_S = 1.0
"""Between two requests to join: the feed takes a moment to show a membership."""
QUESTION_RETRY_S = 1.0
"""Hint to who may not ask for logs and evidence yet."""
FEED_REFRESH_S = 2.0
"""Between two looks at the feed because of strangers, who could otherwise make us ask without end."""


class MinerCore:
    """One miner of one run."""

    work_type: type[DeviceWork] = DeviceWork
    """What has the device do something, and logs it; a dishonest miner has another one."""

    def __init__(
        self,
        spec: RunSpec,
        hotkey: Hotkey,
        rng: Random,
        kept: Sequence[KeptLog] = (),
        injection: Injection | None = None,
    ) -> None:
        """`kept`: the logs that earlier processes of this miner have committed to. `injection`: how much a first-stage
        miner has in flight; None: as much as the pipeline needs."""
        self._spec = spec
        self._effects: list[Effect] = []
        emit = self._effects.append
        self._feed: Feed | None = None
        self._view: View | None = None
        self._reports = Reports()
        self._notices = Notices(emit)
        self._oplog = OpLog(kept)
        self._table = MicrobatchTable(spec.flow.in_flight_max)
        self._router = Router(rng)
        self._outer = OuterSteps(
            spec, hotkey, oplog=self._oplog, reports=self._reports, notices=self._notices, emit=emit
        )
        self._watch = Watch()
        self._injection = Injection(spec.num_stages, spec.flow.in_flight_max) if injection is None else injection
        self._flow = Flow(
            spec,
            hotkey,
            table=self._table,
            router=self._router,
            watch=self._watch,
            reports=self._reports,
            injection=self._injection,
            emit=emit,
        )
        self._outbound = Outbound(
            hotkey, table=self._table, router=self._router, watch=self._watch, flow=self._flow, emit=emit
        )
        self._repair = Repair(
            spec, table=self._table, router=self._router, watch=self._watch, flow=self._flow, emit=emit
        )
        self._leasing = Leasing(
            table=self._table, injection=self._injection, reports=self._reports, flow=self._flow, emit=emit
        )
        self._work = self.work_type(
            spec,
            table=self._table,
            flow=self._flow,
            outer=self._outer,
            oplog=self._oplog,
            injection=self._injection,
            emit=emit,
        )
        self._has_joined = False
        """In this process. One that ran before under this hotkey may still be a member: the orchestrator must hear that
        records are numbered anew, and where we listen now."""
        self._is_joining = False
        self._join_s = 0.0
        self._refresh_s = 0.0
        self._look_s = math.inf
        """When this core wanted to look at everything again."""

    # --- the one door -------------------------------------------------------------------------------------------------

    def handle(self, event: Event, now_s: float) -> list[Effect]:
        """Takes in what happened at `now_s` (seconds since the epoch) and gives what is to be done about it, in
        order."""
        if now_s > self._look_s + AWAY_S:
            self._watch.was_away(now_s)
        self._take(event, now_s)
        self._advance(now_s)
        wake_s = self.next_wake_s(now_s)
        self._look_s = math.inf if wake_s is None else wake_s
        effects = self._effects.copy()
        self._effects.clear()
        return effects

    def next_wake_s(self, now_s: float) -> float | None:
        """When `Ticked` is due although nothing else happens; None when only an event can change anything."""
        times = [
            *self._flow.wake_times_s(),
            *self._outbound.wake_times_s(self._moment(now_s)),
            *self._repair.wake_times_s(self._moment(now_s)),
            *self._outer.wake_times_s(),
            *self._notices.wake_times_s(),
            *self._leasing.wake_times_s(),
            self._join_s,
        ]
        report_s = self._reports.due_s()
        if report_s is not None:
            times.append(report_s)
        return min((time_s for time_s in times if time_s > now_s), default=None)

    # --- what others may look at --------------------------------------------------------------------------------------

    @property
    def view(self) -> View | None:
        """What the newest feed says to this member; None while it is none."""
        return self._view

    @property
    def is_finished(self) -> bool:
        """Whether the run is over and everything was reported."""
        return self._feed is not None and self._feed.finished and self._reports.is_empty and not len(self._notices)

    @property
    def ready_step(self) -> int | None:
        """The outer step whose anchor this miner holds; None while it holds none."""
        return self._outer.ready_step(self._view)

    @property
    def num_applied(self) -> int:
        """Microbatches applied since the process started."""
        return self._table.num_applied_total

    def standing(self, stand: Stand) -> tuple[MicrobatchId, ...]:
        """Microbatches that stand there."""
        return tuple(item.microbatch_id for item in self._table.standing(stand))

    @property
    def run_is_over(self) -> bool:
        """Whether the orchestrator has ended the run."""
        return self._feed is not None and self._feed.finished

    def refusal_of_question(self, hotkey: Hotkey) -> Refusal | None:
        """The answer to somebody who may not ask for logs and evidence, now; None for who may."""
        if self._feed is None:
            message = "has not heard who validates yet"
            return Refusal(code=RefusalCode.BUSY, message=message, retry_after_s=QUESTION_RETRY_S)
        if hotkey in self._feed.validators:
            return None
        # It may have a permit that our feed does not show yet: it should come again.
        message = "logs and evidence are for hotkeys with a validator permit"
        return Refusal(code=RefusalCode.FORBIDDEN, message=message, retry_after_s=QUESTION_RETRY_S)

    def refusal_of_state(self, hotkey: Hotkey, stage_index: int) -> Refusal | None:
        """The answer to somebody who may not read this miner's anchor; None for the other members of its stage."""
        peer = None if self._view is None else self._view.peers.get(hotkey)
        if peer is not None and self._view is not None and peer.stage_index == stage_index == self._view.stage_index:
            return None
        return Refusal(code=RefusalCode.FORBIDDEN, message="anchors are handed to members of the same stage")

    def committed_log(self, outer_step: int) -> tuple[LogEntry, ...] | None:
        """The log behind this miner's newest commitment; None when there is none or it was forgotten."""
        return self._oplog.committed(outer_step)

    def log_answer(self, request: LogRequest) -> CommittedLog | None:
        """What a validator asks of a committed log, with proof; None when there is no such thing."""
        return self._oplog.answer(request)

    def may_show(self, request: EvidenceRequest) -> bool:
        """Whether that tensor belongs to work that was committed to."""
        return self._oplog.may_show(request)

    def heartbeat(self, tokens_per_s: float, busy_share: float, boundary: BoundaryReport | None = None) -> Heartbeat:
        """How this miner is doing; the measurements are the shell's."""
        view, local = self._view, self._outer.local
        held = self._table.held()
        inner_steps = 0 if local is None else local.inner_steps
        awaiting = (Stand.AWAITING_GRADIENT, Stand.GRADIENT_RECEIVING, Stand.BACKWARD_QUEUED, Stand.BACKWARDING)
        return Heartbeat(
            outer_step=0 if view is None else view.stage.outer_step,
            phase=Phase.TRAIN if view is None else view.stage.phase,
            ready_outer_step=self.ready_step,
            inner_step=inner_steps,
            queued=self._flow.num_queued,
            in_flight=len(self._table),
            applied=self.num_applied,
            tokens_per_s=tokens_per_s,
            busy_share=busy_share,
            staleness_max=max((inner_steps - item.version for item in held if item.stand in awaiting), default=0),
            rerouted=self._flow.num_rerouted,
            spliced=self._flow.num_spliced,
            staleness=tuple(self._flow.staleness),
            boundary=boundary,
        )

    def check_invariants(self) -> None:
        """Raises AssertionError when anything is as it must never be."""
        self._table.check_invariants()
        self._reports.check_invariants()
        self._outer.check_invariants(num_computing=len(self._work))
        self._work.check_invariants()
        with_next = [item.next_hop for item in self._table.held() if item.stand in WITH_NEXT]
        for peer in set(with_next):
            assert peer is not None and self._router.in_flight(peer) == with_next.count(peer), "in flight miscounted"

    # --- events -------------------------------------------------------------------------------------------------------

    def _take(self, event: Event, now_s: float) -> None:
        moment = self._moment(now_s)
        match event:
            case events.Ticked():
                pass
            case events.FeedArrived(feed):
                self._feed_arrived(feed)
            case events.JoinEnded():
                self._join_ended(event, now_s)
            case events.ForwardOffered():
                self._flow.forward_offered(moment, event)
            case events.BackwardOffered():
                self._flow.backward_offered(moment, event)
            case events.BodyEnded():
                self._flow.body_ended(moment, event)
            case events.CancelArrived():
                self._flow.cancel_arrived(moment, event)
            case events.SendEnded():
                self._outbound.send_ended(moment, event)
            case events.HoldsAsked() | events.HoldsEnded():
                self._repair.take(moment, event)
            case ComputeEnded(result):
                self._work.ended(moment, result)
            case events.LeaseGranted() | events.LeaseRefused():
                self._leasing.ended(moment, event)
            case _:
                self._take_beside_work(event, now_s)

    def _take_beside_work(self, event: Event, now_s: float) -> None:
        outer = self._outer
        match event:
            case events.ReportEnded(sequence, acknowledged):
                self._reports.ended(sequence, acknowledged, now_s)
            case events.StrangerAsked():
                self._stranger_asked(now_s)
            case events.NoticeEnded(notice, outcome):
                self._notices.ended(notice, outcome, now_s)
            case events.AnchorLoaded():
                outer.anchor_loaded(event, self._view, now_s)
            case events.ApplyEnded():
                outer.apply_ended(event, self._view, now_s)
            case events.AnchorFailed() | events.ApplyFailed():
                outer.state_change_failed(now_s, anchor_is_lost=isinstance(event, events.AnchorFailed))
            case events.MergedFetched() | events.MergedNotFetched():
                outer.merged_fetch_ended(event, now_s)
            case events.LogPersisted(commitment):
                outer.commits.persisted(commitment)
            case events.UploadEnded():
                outer.upload_ended(event, now_s)
            case events.ReduceEnded() | events.ReduceFailed() | events.SlicesFetched() | events.MeanFetched():
                outer.reductions.ended(event, now_s)
            case events.CheckpointEnded():
                outer.checkpoint_ended(event, now_s)

    def _join_ended(self, event: events.JoinEnded, now_s: float) -> None:
        self._is_joining, self._join_s = False, now_s + JOIN_RETRY_S
        if event.joined is not None and not self._has_joined:
            self._has_joined = True
            self._look_at_feed()

    def _feed_arrived(self, feed: Feed) -> None:
        if self._feed is not None and feed.version <= self._feed.version:
            return
        self._feed = feed
        self._look_at_feed()

    def _look_at_feed(self) -> None:
        feed = self._feed
        if feed is None or not self._has_joined:
            return
        self._view = view_of(feed)
        self._outer.view_changed(self._view)
        self._router.keep_only(peer.hotkey for peer in feed.peers)
        self._watch.keep_only(peer.hotkey for peer in feed.peers)

    def _stranger_asked(self, now_s: float) -> None:
        """The wait for the next feed may have been lost on the way, and with it word of a validator's permit: whoever
        does not look again would seem to withhold its log."""
        if now_s >= self._refresh_s:
            self._refresh_s = now_s + FEED_REFRESH_S
            self._effects.append(RefreshFeed())

    # --- what is due --------------------------------------------------------------------------------------------------

    def _advance(self, now_s: float) -> None:
        view = self._view
        step = self._outer.training_step(view)
        if step is not None and self._outer.begin_if_due(step, now_s):
            self._table.begin(step, self._oplog.microbatches(step))
            self._injection.paused()
            self._flow.begin()
            self._leasing.begin(now_s)
        moment = self._moment(now_s)
        self._repair.advance(moment)
        self._flow.advance(moment)
        self._outbound.advance(moment)
        self._leasing.advance(moment)
        self._work.advance(moment)
        if view is not None:
            self._outer.advance(view, now_s, device_is_idle=not len(self._work))
            self._notices.advance(view.stage.outer_step, now_s)
        elif self._feed is not None and not self._feed.finished and not self._is_joining and now_s >= self._join_s:
            self._is_joining = True
            self._effects.append(RequestJoin())
        report = self._reports.next_report(now_s, is_urgent=not len(self._table))
        if report is not None:
            self._effects.append(SendReport(report))

    def _moment(self, now_s: float) -> Moment:
        local = self._outer.local
        return Moment(
            view=self._view,
            outer_step=self._outer.training_step(self._view),
            inner_steps=0 if local is None else local.inner_steps,
            now_s=now_s,
        )
