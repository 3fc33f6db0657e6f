"""The life of a microbatch on this miner: admitted, run forward, sent on, its gradient awaited, run backward, returned.

Owns every transition of `MicrobatchTable`'s records. Must not decide what the device does (`scheduler`), which replica
is good (`router`) or which phase it is (`view`). Level-triggered where it can be: `advance` looks at each record and
ends what cannot end well any more (deadline, neighbour gone, phase over, too stale), then sends what is due.

Invariants: an admitted microbatch ends exactly once and is freed in the same moment; what is being read or computed
ends when that has ended, and everything else at once; the first stage reports each end.
"""

from orion.common.config import RunSpec
from orion.common.ids import Direction, Hotkey, MicrobatchId, Outcome
from orion.common.protocol.messages import (
    Accepted,
    Cancel,
    Lease,
    MicrobatchEnd,
    Refusal,
    RefusalCode,
    Transfer,
)
from orion.miner import splice
from orion.miner.admission import Adoption, Duplicate, Situation, admit_backward, admit_forward
from orion.miner.credit_pace import CreditPace
from orion.miner.effects import Accept, DropGraph, FreeAllButGradient, FreeTensors, ReadBody, Refuse, SendCancel
from orion.miner.events import (
    BackwardDone,
    BackwardOffered,
    BodyEnded,
    BodyRef,
    CancelArrived,
    ForwardDone,
    ForwardOffered,
)
from orion.miner.injection import Injection, TripTimes
from orion.miner.moment import Emit, Moment
from orion.miner.reports import Reports
from orion.miner.router import Router
from orion.miner.table import BETWEEN_PASSES, OPERATING, WITH_NEXT, Held, MicrobatchTable, Stand
from orion.miner.transfers import activation_transfer, gradient_transfer, receipt_of
from orion.miner.view import View
from orion.miner.watch import Watch

TOO_LATE = "its deadline has passed"
TOO_STALE = "too many inner steps since its forward"


class Flow:
    """The microbatches of one miner."""

    def __init__(
        self,
        spec: RunSpec,
        hotkey: Hotkey,
        *,
        table: MicrobatchTable,
        router: Router,
        watch: Watch,
        reports: Reports,
        injection: Injection,
        emit: Emit,
    ) -> None:
        self._spec = spec
        self._hotkey = hotkey
        self._table = table
        self._router = router
        self._watch = watch
        self._reports = reports
        self._injection = injection
        self._emit = emit
        self._pace = CreditPace()
        self.staleness = [0] * (spec.flow.staleness_max + 1)
        """Backward passes by the inner steps since their forward."""
        self.num_rerouted = 0
        """Microbatches that went past a lost or unreached replica of the next stage, and forward anew from there on."""
        self.num_spliced = 0
        """Microbatches with which this miner took the place of a lost one."""

    def begin(self) -> None:
        """Work for an outer step begins: what came before the pause says nothing about its pace."""
        self._pace.paused()

    # --- offers -------------------------------------------------------------------------------------------------------

    def forward_offered(self, moment: Moment, event: ForwardOffered) -> None:
        """Admits an activation, or not; an admitted one holds a credit from here on."""
        transfer = event.transfer
        answer = admit_forward(self._situation(moment), self._table, event.sender, transfer)
        if isinstance(answer, Adoption):
            self._adopt(transfer)
        if answer is not None:
            if isinstance(answer, Refusal) and answer.queued is not None:
                self._pace.turned_away(moment.now_s)
            self._answer(event.request_id, answer)
            return
        longest_s = moment.now_s + self._spec.time_limits.microbatch_s
        self._table.admit(
            Held(
                microbatch_id=transfer.microbatch_id,
                data_id=transfer.data_id,
                outer_step=transfer.outer_step,
                path=transfer.path,
                deadline_s=min(transfer.deadline_s, longest_s),
                stand=Stand.RECEIVING,
                input_digest=transfer.digest,
                request_id=event.request_id,
                offer=transfer,
                is_repaired=transfer.continues_at is not None,
                adopter=transfer.continues_at,
            )
        )
        self._emit(ReadBody(event.request_id))

    def backward_offered(self, moment: Moment, event: BackwardOffered) -> None:
        """Admits a gradient, or not."""
        answer = admit_backward(self._situation(moment), self._table, event.sender, event.transfer)
        if answer is not None:
            self._answer(event.request_id, answer)
            return
        item = self._table.get(event.transfer.microbatch_id)
        assert item is not None, "a gradient was admitted for nothing"
        if item.stand is Stand.SENDING:
            self.sent_on(item, adopted=item.next_hop == item.adopter)
        item.stand = Stand.GRADIENT_RECEIVING
        item.request_id, item.offer = event.request_id, event.transfer
        self._emit(ReadBody(event.request_id))

    def body_ended(self, moment: Moment, event: BodyEnded) -> None:
        """The body of an admitted offer is in the cache, or is not."""
        item = self._table.by_request(event.request_id)
        if item is None:
            return
        offer = item.offer
        assert offer is not None
        item.request_id = item.offer = None
        refusal = event.refusal
        if refusal is None and item.cancelled is not None:
            refusal = Refusal(code=RefusalCode.CONFLICT, message=f"cancelled: {item.cancelled}"[:500])
        if refusal is not None:
            self._emit(Refuse(event.request_id, refusal))
            self._without_body(moment, item, offer, refusal)
            return
        item.waiting_s = moment.now_s
        if item.stand is Stand.RECEIVING:
            item.stand = Stand.FORWARD_QUEUED
        else:
            assert item.next_hop is not None
            item.gradient, item.loss = offer, offer.loss
            # The sender may not have heard who took a lost one's place before us.
            item.full_path = (*item.path, *offer.path[len(item.path) :])
            # Nobody can have kept it waiting for longer than it was away.
            item.waited_s += min(offer.waited_s, max(0.0, moment.now_s - item.sent_s))
            self._router.completed(item.next_hop, item.sent_s, moment.now_s)
            self._watch.brought(item.next_hop, moment.now_s - item.sent_s, moment.now_s)
            self._router.released(item.next_hop)
            item.stand = Stand.BACKWARD_QUEUED
        sender = item.path[-1] if offer.direction is Direction.ACTIVATION else item.next_hop
        assert sender is not None
        self._reports.add_receipt(receipt_of(offer, sender, self._hotkey))
        self._emit(Accept(event.request_id, self._accepted()))

    def cancel_arrived(self, moment: Moment, event: CancelArrived) -> None:
        """A neighbour on the microbatch's path gave up; anyone else is ignored."""
        item = self._table.get(event.cancel.microbatch_id)
        if item is None or item.outer_step != event.cancel.outer_step:
            return
        from_next = event.sender == item.next_hop and item.stand in WITH_NEXT
        from_previous = event.sender == item.previous_hop and item.orphaned_s is None
        if not from_next and not from_previous:
            return
        reason = f"cancelled by a peer: {event.cancel.reason}"
        self._cancel(moment, item, reason, tell_previous=from_next, tell_next=not from_next)

    def leased(self, moment: Moment, lease: Lease) -> None:
        """Queues leased microbatches; one that cannot be started is reported as cancelled, so that it is not lost."""
        for granted in lease.microbatches:
            microbatch_id = granted.microbatch_id
            ended = self._table.ended(microbatch_id)
            if self._table.get(microbatch_id) is not None or (ended is not None and ended.outcome is Outcome.APPLIED):
                continue
            reason = None
            if ended is not None:
                reason = "lost with the process that had it"
            elif lease.outer_step != moment.outer_step or self._table.room < 1:
                reason = "leased too late"
            if reason is not None:
                self._reports.add_end(
                    MicrobatchEnd(microbatch_id=microbatch_id, outcome=Outcome.CANCELLED, reason=reason)
                )
                continue
            self._table.admit(
                Held(
                    microbatch_id=microbatch_id,
                    data_id=granted.data_id,
                    outer_step=lease.outer_step,
                    path=(),
                    deadline_s=lease.deadline_s,
                    stand=Stand.FORWARD_QUEUED,
                    input_digest=None,
                )
            )

    # --- the device ---------------------------------------------------------------------------------------------------

    @property
    def num_queued(self) -> int:
        """Passes that the device has before it, the one under way included."""
        waiting = (Stand.FORWARD_QUEUED, Stand.FORWARDING, Stand.BACKWARD_QUEUED, Stand.BACKWARDING)
        return sum(item.stand in waiting for item in self._table.held())

    def computing(self, moment: Moment, microbatch_id: MicrobatchId) -> Held:
        """The device is given its next operation on the microbatch."""
        item = self._item(microbatch_id)
        is_forward = item.stand is Stand.FORWARD_QUEUED
        if item.path or not is_forward:
            # What is leased ahead waits for its turn on purpose.
            item.waited_s += max(0.0, moment.now_s - item.waiting_s)
        item.stand = Stand.FORWARDING if is_forward else Stand.BACKWARDING
        if is_forward:
            item.begun_s, item.begun_in_flight = moment.now_s, self._table.num_started
            if not item.path:
                self._injection.started(moment.now_s)
        return item

    def forwarded(self, moment: Moment, done: ForwardDone) -> None:
        """The forward has been computed; on the last stage, that was all there is to compute."""
        item = self._item(done.microbatch_id)
        item.version = moment.inner_steps
        item.output = done.output
        if len(item.path) < self._spec.num_stages - 1:
            item.stand, item.waiting_s = Stand.SEND_DUE, moment.now_s
            if item.cancelled is not None:
                self._end(moment, item, item.cancelled)
            return
        item.loss, item.full_path = done.loss, (*item.path, self._hotkey)
        self._applied(moment, item, done.output)

    def backwarded(self, moment: Moment, done: BackwardDone) -> None:
        """The backward has been computed: whatever else happens, the microbatch is applied here."""
        item = self._item(done.microbatch_id)
        self.staleness[min(len(self.staleness) - 1, moment.inner_steps - item.version)] += 1
        self._applied(moment, item, done.output)

    def compute_refused(self, moment: Moment, microbatch_id: MicrobatchId, reason: str) -> None:
        """The device could not use what came in."""
        item = self._item(microbatch_id)
        self._end(moment, item, item.cancelled or reason, tell_previous=item.cancelled is None)

    # --- looking after everything that is held ------------------------------------------------------------------------

    def advance(self, moment: Moment) -> None:
        """Ends what cannot end well any more."""
        for item in self._table.held():
            doom = self._doom(moment, item)
            if doom is not None:
                if doom == TOO_LATE and item.stand is Stand.AWAITING_GRADIENT:
                    assert item.next_hop is not None
                    self._router.lost(item.next_hop, item.sent_s, moment.now_s)
                # At the end of a phase everybody frees by itself.
                tells = item.outer_step == moment.outer_step
                self._cancel(moment, item, doom, tell_previous=tells, tell_next=tells)

    def before_inner_step(self, moment: Moment) -> None:
        """Ends what the inner step would leave too stale, so that its version of the parameters is free before the
        step makes another: no more than `staleness_max` + 1 are ever alive."""
        for item in self._table.held():
            if item.stand in BETWEEN_PASSES and moment.inner_steps - item.version >= self._spec.flow.staleness_max:
                self._cancel(moment, item, TOO_STALE, tell_previous=True, tell_next=True)

    def wake_times_s(self) -> list[float]:
        """When `advance` may have something to end; times that have passed mean nothing."""
        times = [item.deadline_s for item in self._table.held()]
        orphaned = [item.orphaned_s for item in self._table.held() if item.orphaned_s is not None]
        return times + [orphaned_s + splice.ORPHAN_S for orphaned_s in orphaned]

    def sent_on(self, item: Held, *, adopted: bool) -> None:
        """A replica of the next stage has accepted the activation, or goes on with that of a lost miner instead."""
        assert item.stand is Stand.SENDING and item.next_hop is not None
        item.stand = Stand.AWAITING_GRADIENT
        self.num_spliced += adopted
        # A replacement that was told where to go on counts for itself.
        self.num_rerouted += item.is_repaired and not adopted and item.continues_at is None
        item.is_repaired, item.continues_at = False, None
        if adopted:
            return  # what we offered was not taken: there is nothing that both ends could say of it
        self._reports.add_receipt(receipt_of(activation_transfer(item, self._hotkey), self._hotkey, item.next_hop))

    def returned(self, moment: Moment, item: Held) -> None:
        """The stage before has accepted the input gradient."""
        assert item.stand is Stand.RETURNING and item.previous_hop is not None
        self._reports.add_receipt(receipt_of(gradient_transfer(item), self._hotkey, item.previous_hop))
        if len(item.path) < 2:
            self._end(moment, item, "")  # what the first stage has begun dies with it
            return
        if not item.is_aside:
            self._emit(FreeAllButGradient(item.microbatch_id))
            self._pace.freed(moment.now_s)
        oldest = self._table.set_aside(item)
        if oldest is not None:
            self._end(moment, oldest, "")

    def give_up(self, moment: Moment, item: Held, reason: str) -> None:
        """Nobody takes what is to be sent."""
        self._end(moment, item, reason, tell_previous=True)

    def tell(
        self, view: View | None, peer: Hotkey | None, microbatch_id: MicrobatchId, outer_step: int, reason: str
    ) -> None:
        """Sends a cancel, if the peer can be reached at all."""
        entry = None if view is None or peer is None else view.peers.get(peer)
        if peer is None or entry is None:
            return
        cancel = Cancel(microbatch_id=microbatch_id, outer_step=outer_step, reason=reason[:500])
        self._emit(SendCancel(peer, entry.url, cancel))

    # --- inside -------------------------------------------------------------------------------------------------------

    def _doom(self, moment: Moment, item: Held) -> str | None:
        """Why the microbatch cannot end well any more."""
        view = moment.view
        if view is None or item.outer_step != moment.outer_step:
            return "the train phase has ended"
        if item.deadline_s <= moment.now_s:
            return TOO_LATE
        if item.previous_hop is not None and not view.is_active(item.previous_hop, len(item.path) - 1):
            if item.stand is not Stand.RETURNED:
                splice.orphan(item, moment.now_s)
            if not splice.can_wait(moment, item):
                return "the stage before is gone"
        if splice.is_forsaken(moment, item):
            return "nobody took the place of the stage before"
        if item.stand in BETWEEN_PASSES and moment.inner_steps - item.version > self._spec.flow.staleness_max:
            return TOO_STALE
        return None

    def _cancel(self, moment: Moment, item: Held, reason: str, *, tell_previous: bool, tell_next: bool) -> None:
        """Ends it now, or as soon as the operation under way has ended."""
        if item.stand not in OPERATING:
            self._end(moment, item, reason, tell_previous=tell_previous, tell_next=tell_next)
            return
        if item.cancelled is None:
            item.cancelled = reason
            self._tell_both(moment, item, reason, tell_previous, tell_next)
            if item.stand is Stand.GRADIENT_RECEIVING:
                # The body may take long; what the device holds until then is of no more use.
                self._emit(DropGraph(item.microbatch_id))

    def _end(
        self, moment: Moment, item: Held, reason: str, *, tell_previous: bool = False, tell_next: bool = False
    ) -> None:
        self._tell_both(moment, item, reason, tell_previous, tell_next)
        if item.stand in WITH_NEXT:
            assert item.next_hop is not None
            self._router.released(item.next_hop)
        outcome = self._table.end(item)
        self._emit(FreeTensors(item.microbatch_id))
        if not item.is_aside:
            self._pace.freed(moment.now_s)
        if item.path:
            return
        if outcome is Outcome.APPLIED:
            if not item.is_repaired:
                num_in_flight = (item.begun_in_flight + self._table.num_started + 1) / 2
                self._injection.ended(TripTimes(num_in_flight, moment.now_s - item.begun_s, item.waited_s))
            end = MicrobatchEnd(microbatch_id=item.microbatch_id, outcome=outcome, loss=item.loss, path=item.full_path)
        else:
            end = MicrobatchEnd(microbatch_id=item.microbatch_id, outcome=outcome, reason=reason[:500])
        self._reports.add_end(end)

    def _tell_both(self, moment: Moment, item: Held, reason: str, tell_previous: bool, tell_next: bool) -> None:
        if tell_previous and not item.is_applied:
            self.tell(moment.view, item.previous_hop, item.microbatch_id, item.outer_step, reason)
        if tell_next and item.stand in WITH_NEXT:
            self.tell(moment.view, item.next_hop, item.microbatch_id, item.outer_step, reason)

    def _without_body(self, moment: Moment, item: Held, offer: Transfer, refusal: Refusal) -> None:
        if item.cancelled is not None or item.stand is Stand.RECEIVING:
            # The sender of an activation hears the refusal; it need not be told twice.
            self._end(moment, item, item.cancelled or refusal.message)
            return
        assert offer.direction is Direction.GRADIENT
        item.stand = Stand.AWAITING_GRADIENT

    def _applied(self, moment: Moment, item: Held, output: BodyRef | None) -> None:
        item.is_applied = True
        item.output = output
        if item.previous_hop is None or item.cancelled is not None:
            self._end(moment, item, "")
            return
        item.stand = Stand.RETURN_DUE

    def _situation(self, moment: Moment) -> Situation:
        return Situation(
            self._spec,
            self._hotkey,
            moment,
            self._pace.hint_s(moment.now_s),
            self._reports.has_backlog,
            self.num_queued,
        )

    def _adopt(self, transfer: Transfer) -> None:
        item = self._item(transfer.microbatch_id)
        if splice.fits_orphan(item, transfer):  # or the offer is only repeated
            splice.adopt(item, transfer)

    def _answer(self, request_id: int, answer: Refusal | Duplicate | Adoption) -> None:
        if isinstance(answer, Refusal):
            self._emit(Refuse(request_id, answer))
        else:
            self._emit(Accept(request_id, self._accepted(adopted=isinstance(answer, Adoption))))

    def _accepted(self, *, adopted: bool = False) -> Accepted:
        return Accepted(credits=self._table.room, queued=self.num_queued, adopted=adopted)

    def _item(self, microbatch_id: MicrobatchId) -> Held:
        item = self._table.get(microbatch_id)
        assert item is not None, f"microbatch {microbatch_id} is not held"
        return item
