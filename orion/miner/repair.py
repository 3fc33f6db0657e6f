"""What is done about a miner of the next stage that is lost while it holds our microbatches.

Owns the questions whether it lives (when they are due, what their ends mean; measured by `watch`) and the way of a
microbatch out of its hands: somebody of the stage after it is found who holds what it had sent on, a replacement gets
the input with that name, and the lost one is told to let go. `outbound` sends; `splice` has the other end's rules.

Invariants: nothing is taken from a peer while there is no other replica to give it to; a microbatch waits `SEEK_S` at
most for word of who holds it further on; questions are one at a time for each peer.
"""

from collections.abc import Iterable

from orion.common.config import RunSpec
from orion.common.ids import Hotkey
from orion.common.protocol.fields import BATCH_MAX
from orion.common.protocol.messages import Holds, HoldsQuery, Refusal, RefusalCode
from orion.miner import splice
from orion.miner.effects import AnswerHolds, AskHolds, Refuse
from orion.miner.events import HoldsAsked, HoldsEnded, SendOutcome
from orion.miner.flow import Flow
from orion.miner.moment import Emit, Moment
from orion.miner.router import Router
from orion.miner.table import WITH_NEXT, Held, MicrobatchTable, Stand
from orion.miner.watch import AWAY_S, Watch

SEEK_S = 1.0
"""How long a replacement is kept waiting for word of who holds the microbatch after the lost one. Without it the way
from there on is gone again, so this may cost about what that does."""
LAG_RETRY_S = 0.1
LOOK_S = AWAY_S / 2
"""Between two looks while something is with others."""


class Repair:
    """Takes microbatches out of the hands of lost miners."""

    def __init__(
        self, spec: RunSpec, *, table: MicrobatchTable, router: Router, watch: Watch, flow: Flow, emit: Emit
    ) -> None:
        self._num_stages = spec.num_stages
        self._table = table
        self._router = router
        self._watch = watch
        self._flow = flow
        self._emit = emit

    def take(self, moment: Moment, event: HoldsAsked | HoldsEnded) -> None:
        """A question of another miner, or the end of one of ours."""
        if isinstance(event, HoldsAsked):
            self.holds_asked(moment, event)
        else:
            self.holds_ended(moment, event)

    # --- the stage after a lost one -----------------------------------------------------------------------------------

    def holds_asked(self, moment: Moment, event: HoldsAsked) -> None:
        """A miner of the stage before asks what we hold from it, or one further back what we hold from a lost one."""
        query, view = event.query, moment.view
        back = 1 if query.lost is None else 2
        if view is None or not view.is_active(event.sender, view.stage_index - back):
            message = "the sender is no active member of that stage"
            refusal = Refusal(code=RefusalCode.FORBIDDEN, message=message, retry_after_s=LAG_RETRY_S)
            self._emit(Refuse(event.request_id, refusal))
            return
        held = []
        # Of who is no member nothing is taken anyway.
        is_member = query.lost is not None and view.is_active(query.lost, view.stage_index - 1)
        for microbatch_id in query.microbatch_ids:
            if query.lost is not None and is_member and query.outer_step == moment.outer_step:
                self._table.take_over(microbatch_id, (event.sender, query.lost))
            item = self._table.get(microbatch_id)
            if item is None or item.outer_step != query.outer_step:
                continue
            if query.lost is not None and item.path[-2:] == (event.sender, query.lost):
                splice.orphan(item, moment.now_s)
            if splice.is_held_from(item, event.sender, query.lost):
                held.append(microbatch_id)
        self._emit(AnswerHolds(event.request_id, Holds(microbatch_ids=tuple(held))))

    # --- the stage before a lost one ----------------------------------------------------------------------------------

    def holds_ended(self, moment: Moment, event: HoldsEnded) -> None:
        """A question has ended."""
        if event.query.lost is not None:
            self._sought(event)
            return
        peer, now_s = event.peer, moment.now_s
        match event.outcome:
            case SendOutcome.UNREACHABLE:
                if self._watch.missed(peer, now_s):
                    self._take_all(moment, peer)
            case SendOutcome.ACCEPTED:
                self._watch.answered(peer, event.seconds, now_s)
                for microbatch_id in set(event.query.microbatch_ids) - set(event.held):
                    item = self._table.get(microbatch_id)
                    if item is not None and item.next_hop == peer and item.stand is Stand.AWAITING_GRADIENT:
                        self._take(moment, item)
            case _:
                # Its feed lags, or it was just started again and takes no signature yet: it lives.
                self._watch.answered(peer, event.seconds, now_s)

    def advance(self, moment: Moment) -> None:
        """Takes back what lost peers hold, and asks the silent ones."""
        there = self._there()
        for peer, items in there.items():
            is_gone = moment.view is None or not moment.view.is_active(peer, len(items[0].path) + 1)
            stuck_s = self._watch.stuck_s(peer, moment.now_s)
            if not is_gone and stuck_s is not None and stuck_s <= moment.now_s and self._can_take(moment, items[0]):
                self._watch.stuck(peer, moment.now_s)
            if is_gone or self._watch.is_lost(peer):
                self._take_all(moment, peer)
        self._seek(moment)
        self._let_go(moment)
        if moment.view is None or moment.outer_step is None:
            return
        for peer in self._watched(moment):
            due_s = self._watch.ask_due_s(peer, moment.now_s)
            if due_s is not None and due_s <= moment.now_s:
                self._ask(moment, peer, None, [item for item in self._there().get(peer, ()) if _is_with_it(item)])
                self._watch.asked(peer, moment.now_s)

    def wake_times_s(self, moment: Moment) -> list[float]:
        """When a question is due, a wait over, or a look that shows that this miner runs; past times mean nothing."""
        times = [item.seek_until_s for item in self._table.standing(Stand.SEND_DUE) if item.seeking]
        for peer in self._watched(moment):
            times.append(moment.now_s + LOOK_S)
            due_s = self._watch.ask_due_s(peer, moment.now_s)
            if due_s is not None:
                times.append(due_s)
            stuck_s = self._watch.stuck_s(peer, moment.now_s)
            if stuck_s is not None and peer in self._there():
                times.append(stuck_s)
        return times

    # --- inside -------------------------------------------------------------------------------------------------------

    def _there(self) -> dict[Hotkey, list[Held]]:
        """What each miner of the next stage holds, or may hold."""
        there: dict[Hotkey, list[Held]] = {}
        for item in self._table.held():
            if item.stand in WITH_NEXT:
                assert item.next_hop is not None
                there.setdefault(item.next_hop, []).append(item)
        return there

    def _watched(self, moment: Moment) -> list[Hotkey]:
        """Peers that hold something, and lost ones that may have come back."""
        view = moment.view
        if view is None or moment.outer_step is None:
            return []
        there = self._there()
        return [peer for peer in view.active(view.stage_index + 1) if peer in there or self._watch.is_lost(peer)]

    def _take_all(self, moment: Moment, peer: Hotkey) -> None:
        for item in self._there().get(peer, ()):
            self._take(moment, item)

    def _take(self, moment: Moment, item: Held) -> None:
        """Takes a microbatch back from the next hop; its output is to be sent again. Nothing happens while the body of
        its gradient is being read, or while nobody else could have it."""
        if item.stand is Stand.GRADIENT_RECEIVING or not self._can_take(moment, item):
            return
        lost = item.next_hop
        assert lost is not None
        self._router.lost(lost, item.sent_s, moment.now_s)
        self._router.released(lost)
        item.tried.add(lost)
        item.stand, item.next_hop, item.continues_at = Stand.SEND_DUE, None, None
        item.lost_hop, item.is_repaired = lost, True
        view = moment.view
        after = len(item.path) + 2
        item.seeking = set(view.active(after)) if view is not None and after < self._num_stages else set()
        item.seek_until_s = moment.now_s + SEEK_S
        item.is_sought = not item.seeking

    def _can_take(self, moment: Moment, item: Held) -> bool:
        """Whether another replica could have it; with a lost peer that is gone there is no choice."""
        view, stage_index = moment.view, len(item.path) + 1
        if view is None:
            return False
        assert item.next_hop is not None
        if not view.is_active(item.next_hop, stage_index):
            return True
        return any(
            peer not in item.tried and peer != item.next_hop and not self._watch.is_lost(peer)
            for peer in view.active(stage_index)
        )

    def _seek(self, moment: Moment) -> None:
        """Asks the stage after the lost ones who holds what they had sent on: one question for each lost one there."""
        by_lost: dict[Hotkey, list[Held]] = {}
        for item in self._table.standing(Stand.SEND_DUE):
            if item.lost_hop is not None and not item.is_sought:
                item.is_sought = True
                by_lost.setdefault(item.lost_hop, []).append(item)
        for lost, items in by_lost.items():
            for peer in sorted(set[Hotkey]().union(*(item.seeking for item in items))):
                self._ask(moment, peer, lost, items)

    def _sought(self, event: HoldsEnded) -> None:
        """Somebody after a lost miner has said what it holds, or has not answered."""
        for microbatch_id in event.query.microbatch_ids:
            item = self._table.get(microbatch_id)
            if item is None or item.stand is not Stand.SEND_DUE or item.lost_hop != event.query.lost:
                continue
            item.seeking.discard(event.peer)
            if microbatch_id in event.held:
                item.continues_at = event.peer
                item.seeking.clear()

    def _let_go(self, moment: Moment) -> None:
        """Ends the search where all have answered or time is up, and tells the lost miner to let go. Not earlier: it
        might live, and would have the one after it let go too."""
        for item in self._table.standing(Stand.SEND_DUE):
            if item.lost_hop is None or not item.is_sought:
                continue
            if item.seeking and item.seek_until_s > moment.now_s:
                continue
            item.seeking.clear()
            self._flow.tell(moment.view, item.lost_hop, item.microbatch_id, item.outer_step, "replaced")
            item.lost_hop = None

    def _ask(self, moment: Moment, peer: Hotkey, lost: Hotkey | None, items: Iterable[Held]) -> None:
        view = moment.view
        assert view is not None and moment.outer_step is not None
        entry = view.peers.get(peer)
        if entry is None:
            return
        ids = tuple(item.microbatch_id for item in items)[:BATCH_MAX]
        query = HoldsQuery(outer_step=moment.outer_step, microbatch_ids=ids, lost=lost)
        limit_s = SEEK_S if lost is not None else self._watch.answer_limit_s(peer)
        self._emit(AskHolds(peer, entry.url, query, limit_s))


def _is_with_it(item: Held) -> bool:
    """Whether the next hop has said that it took the microbatch."""
    return item.stand is Stand.AWAITING_GRADIENT
