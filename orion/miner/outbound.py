"""What leaves this miner: activations to a replica of the next stage, input gradients back to where they came from.

Owns the attempts: whom to ask, when to ask again, when to stop. An activation goes to another replica when one is busy,
refuses or is not reached; a gradient has one place to go. All attempts end by the microbatch's deadline at the latest.

A peer that was not reached while this miner itself stood still is offered the same again: it takes it once. Any other
peer that was not reached may hold the tensor all the same. It is told to let go, and is not asked again for this
microbatch; so no two replicas work on one trip for long.
"""

from orion.common.ids import Direction, Hotkey, Outcome
from orion.common.protocol.messages import RefusalCode
from orion.miner import splice
from orion.miner.admission import LAG_RETRY_S
from orion.miner.effects import SendTensor
from orion.miner.events import SendEnded, SendOutcome
from orion.miner.flow import Flow
from orion.miner.moment import Emit, Moment
from orion.miner.router import Router
from orion.miner.table import Held, MicrobatchTable, Stand
from orion.miner.transfers import activation_transfer, gradient_transfer
from orion.miner.watch import Watch

RETURNS_MAX = 5
"""Attempts to reach the stage before."""
RETURN_RETRY_S = 0.2
"""After the first that failed; doubles."""
BUSY_RETRY_S = 0.2
"""After a BUSY without a hint."""
BUSY_RETRY_MAX_S = 2.0
"""Longest that a peer's hint is believed."""

LAGGING = frozenset({RefusalCode.WRONG_PHASE, RefusalCode.FORBIDDEN, RefusalCode.NOT_MEMBER})
"""Refusals of a peer whose feed may be behind ours: it is asked again."""


class Outbound:
    """The sends of one miner."""

    def __init__(
        self, hotkey: Hotkey, *, table: MicrobatchTable, router: Router, watch: Watch, flow: Flow, emit: Emit
    ) -> None:
        self._hotkey = hotkey
        self._table = table
        self._router = router
        self._watch = watch
        self._flow = flow
        self._emit = emit

    def advance(self, moment: Moment) -> None:
        """Sends what is due and can go."""
        for item in self._table.standing(Stand.RETURN_DUE):
            if item.retry_s <= moment.now_s and item.orphaned_s is None:
                self._return(moment, item)
        for item in self._table.standing(Stand.SEND_DUE):
            self._send(moment, item)

    def send_ended(self, moment: Moment, event: SendEnded) -> None:
        """An attempt has ended; late answers count for the router only."""
        if event.direction is Direction.GRADIENT:
            self._return_ended(moment, event)
            return
        item = self._table.get(event.microbatch_id)
        is_excused = (
            event.outcome is SendOutcome.UNREACHABLE
            and item is not None
            and item.next_hop == event.peer
            and self._watch.is_excused(item.sent_s)
        )
        self._note(moment, event, is_excused=is_excused)
        if item is None:
            ended = self._table.ended(event.microbatch_id)
            is_orphan = ended is not None and ended.outcome is Outcome.CANCELLED
            if is_orphan and moment.outer_step is not None and event.outcome is SendOutcome.ACCEPTED:
                # The cancel that we sent when it ended may have arrived before the activation did.
                self._flow.tell(moment.view, event.peer, event.microbatch_id, moment.outer_step, "ended meanwhile")
            return
        if item.next_hop != event.peer:
            if event.outcome is SendOutcome.ACCEPTED and event.peer in item.tried:
                # It was taken for lost meanwhile, and another one has the microbatch.
                self._flow.tell(moment.view, event.peer, item.microbatch_id, item.outer_step, "replaced")
            return
        if item.stand is not Stand.SENDING:
            return
        if event.outcome is SendOutcome.ACCEPTED:
            self._flow.sent_on(item, adopted=event.adopted)
            return
        self._router.released(event.peer)
        item.stand, item.next_hop, item.waiting_s = Stand.SEND_DUE, None, moment.now_s
        if is_excused and event.peer in self._usable(moment, item):
            self._offer(moment, item, event.peer)
            return
        if event.outcome is SendOutcome.BUSY and event.peer == item.adopter:
            item.retry_s = moment.now_s + _hint_s(event)
        if event.outcome is SendOutcome.UNREACHABLE:
            item.is_repaired = True
            self._flow.tell(moment.view, event.peer, item.microbatch_id, item.outer_step, "not reached")
        if event.outcome is SendOutcome.UNREACHABLE or (
            event.outcome is SendOutcome.REFUSED and event.code not in LAGGING
        ):
            item.tried.add(event.peer)

    def wake_times_s(self, moment: Moment) -> list[float]:
        """When attempts are due; times that have passed mean nothing."""
        times = [item.retry_s for item in self._table.standing(Stand.RETURN_DUE)]
        for item in self._table.standing(Stand.SEND_DUE):
            usable_s = self._router.next_usable_s(self._usable(moment, item))
            if usable_s is not None:
                times.append(max(usable_s, item.retry_s))
        return times

    def _send(self, moment: Moment, item: Held) -> None:
        candidates = self._candidates(moment, item)
        if not candidates and item.tried:
            self._flow.give_up(moment, item, "no replica of the next stage takes it")
            return
        if item.lost_hop is not None or item.retry_s > moment.now_s:
            return
        usable = self._usable(moment, item)
        peer = item.adopter if item.adopter in usable else self._router.choose(usable, moment.now_s)
        if peer is not None:
            self._offer(moment, item, peer)

    def _offer(self, moment: Moment, item: Held, peer: Hotkey) -> None:
        self._watch.begins(peer, moment.now_s, self._router.in_flight(peer))
        item.waited_s += max(0.0, moment.now_s - item.waiting_s)
        item.stand, item.next_hop, item.sent_s = Stand.SENDING, peer, moment.now_s
        self._router.sent(peer)
        assert moment.view is not None
        self._emit(SendTensor(peer, moment.view.peers[peer].url, activation_transfer(item, self._hotkey)))

    def _return(self, moment: Moment, item: Held) -> None:
        view, peer = moment.view, item.previous_hop
        assert view is not None and peer is not None, "a gradient is to be returned by no member or to nobody"
        item.stand = Stand.RETURNING
        self._emit(SendTensor(peer, view.peers[peer].url, gradient_transfer(item)))

    def _return_ended(self, moment: Moment, event: SendEnded) -> None:
        item = self._table.get(event.microbatch_id)
        if item is None or item.stand is not Stand.RETURNING or item.previous_hop != event.peer:
            return
        if event.outcome is SendOutcome.ACCEPTED:
            self._flow.returned(moment, item)
            return
        if item.orphaned_s is not None:
            item.stand = Stand.RETURN_DUE
            return
        match event.outcome:
            case SendOutcome.REFUSED:
                self._flow.give_up(moment, item, "the stage before does not take the gradient")
            case SendOutcome.BUSY:
                item.stand = Stand.RETURN_DUE
                item.retry_s = moment.now_s + _hint_s(event)
            case SendOutcome.UNREACHABLE:
                item.num_returns += 1
                item.stand = Stand.RETURN_DUE
                item.retry_s = moment.now_s + RETURN_RETRY_S * 2.0 ** (item.num_returns - 1)
                if item.num_returns >= RETURNS_MAX and splice.can_wait(moment, item):
                    splice.orphan(item, moment.now_s)
                elif item.num_returns >= RETURNS_MAX:
                    self._flow.give_up(moment, item, "the stage before is not reached")

    def _note(self, moment: Moment, event: SendEnded, *, is_excused: bool) -> None:
        """Tells the router, and the watch, how the peer answered."""
        if is_excused:
            self._router.unheard(event.peer)
            return
        if event.outcome is SendOutcome.UNREACHABLE:
            self._watch.unreached(event.peer, moment.now_s)
        else:
            self._watch.heard(event.peer, moment.now_s)
        match event.outcome:
            case SendOutcome.ACCEPTED:
                self._router.accepted(event.peer, moment.now_s, event.queued or 0, event.credits)
            case SendOutcome.BUSY:
                self._router.busy(event.peer, moment.now_s + _hint_s(event))
            case SendOutcome.REFUSED if event.code in LAGGING:
                self._router.busy(event.peer, moment.now_s + LAG_RETRY_S)
            case SendOutcome.REFUSED:
                self._router.refused(event.peer)
            case SendOutcome.UNREACHABLE:
                self._router.failed(event.peer, moment.now_s)

    def _candidates(self, moment: Moment, item: Held) -> tuple[Hotkey, ...]:
        """Replicas of the next stage that may be asked now."""
        next_stage = len(item.path) + 1
        view = moment.view
        if view is None or not view.trains(next_stage, item.outer_step):
            return ()
        return tuple(peer for peer in view.active(next_stage) if peer not in item.tried)

    def _usable(self, moment: Moment, item: Held) -> tuple[Hotkey, ...]:
        """Those of them that are not lost at present."""
        return tuple(peer for peer in self._candidates(moment, item) if not self._watch.is_lost(peer))


def _hint_s(event: SendEnded) -> float:
    hint_s = BUSY_RETRY_S if event.retry_after_s is None else event.retry_after_s
    return min(hint_s, BUSY_RETRY_MAX_S)
