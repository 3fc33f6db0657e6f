"""When chain weights are due and what they are, from the ledger and the chain as they are then. Pure.

Owns the rate limit, the permit and what a refusal means. Must not know of checks, only whether some are under way: what
they find should reach the ledger before weights follow from it, so weights that could not be set between two rounds
wait for the round's end, unless the chain's next epoch would come first. Each attempt reads the ledger and the subnet
afresh, so that it never acts on what it knew before it had to wait, nor without a verdict that it has delivered.
"""

import math

from orion.common.config import RunSpec
from orion.common.ledger.scoring import window_start
from orion.common.ledger.sheet import make_sheet, weights_of
from orion.common.protocol.records import Ledger
from orion.validator.errand import Errands
from orion.validator.events import (
    ChainFailed,
    ChainView,
    FetchLedger,
    FetchMetagraph,
    Notice,
    OrchestratorFailed,
    SendScores,
    SendVerdict,
    SetWeights,
    WeightsRefused,
)

REFUSALS_MAX = 20
"""Refusals in a row that say "later" before a set of weights is given up."""

BLOCKS_TO_SET = 3
"""Blocks before an epoch in which weights are set at the latest: one that takes them in, one for a second try, and one
that passes while ledger and subnet are read."""

PERMIT_LOOKS = 3
"""Looks for a permit: at once and after each of the next two epochs, as it comes at an epoch."""


class WeightDuty:
    """Sets weights once for each request, as soon as the chain allows it; a request while one is open renews it."""

    def __init__(self, spec: RunSpec, errands: Errands) -> None:
        self._spec = spec
        self._errands = errands
        self._outer_step = 0
        self._is_due = False
        self._not_before_s = 0.0
        self._has_waited = False
        """Whether the chain let the round's end pass without weights: then the next round may be under way."""
        self._hold_until_s: float | None = None
        """While that round is under way; None = not held."""
        self._is_outdated = False
        """Whether the ledger that is on its way may lack a verdict."""
        self._ledger: Ledger | None = None
        self._view: ChainView | None = None
        self._setting: SetWeights | None = None
        self._num_refusals = 0
        self._num_looks = 0
        self.last_set: SetWeights | None = None
        """What the chain took last from this process."""

    @property
    def is_open(self) -> bool:
        """Whether a request has not come to its end yet."""
        return self._is_due or self._setting is not None

    def request(self, outer_step: int) -> None:
        """Weights are due that count the work up to `outer_step`."""
        self._is_due = True
        self._outer_step = outer_step
        self._ledger = None
        self._view = None
        self._num_refusals = 0
        self._num_looks = 0
        self._has_waited = False
        self._hold_until_s = None

    def pump(self, now_s: float, *, is_checking: bool) -> list[Notice]:
        """Asks for what is missing, and sets the weights when nothing is; `is_checking`: a round is under way."""
        if not self._is_due or self._setting is not None or now_s < self._not_before_s:
            return []
        if self._hold_until_s is not None:
            if is_checking and now_s < self._hold_until_s:
                return []
            self._hold_until_s, self._has_waited = None, False
        if self._ledger is None:
            self._errands.add(FetchLedger(window_start(self._outer_step, self._spec)))
        if self._view is None:
            self._errands.add(FetchMetagraph())
        if self._ledger is None or self._view is None:
            return []
        return self._decide(self._ledger, self._view, now_s, is_checking=is_checking)

    def on_ledger(self, ledger: Ledger, now_s: float) -> None:
        """The ledger has come."""
        is_outdated, self._is_outdated = self._is_outdated, False
        if self._is_due and self._setting is None and now_s >= self._not_before_s and not is_outdated:
            self._ledger = ledger

    def on_sent(self, sent: SendVerdict | SendScores) -> None:
        """Something of this validator's has reached the ledger; after a verdict that must be read again."""
        if isinstance(sent, SendVerdict):
            self._ledger = None
            self._is_outdated = self._errands.has_ledger

    def on_view(self, view: ChainView, now_s: float) -> None:
        """The subnet has been read."""
        if self._is_due and self._setting is None and now_s >= self._not_before_s:
            self._view = view

    def on_set(self) -> list[Notice]:
        """The chain has taken the weights."""
        if self._setting is None:
            return []
        self._errands.succeeded(self._setting)
        self.last_set, self._setting = self._setting, None
        return [Notice("info", "weights_set", {"weights": dict(self.last_set.weights)})]

    def on_refused(self, event: WeightsRefused, now_s: float) -> list[Notice]:
        """The chain said no: later, or for good."""
        if self._setting is None:
            return []
        self._errands.succeeded(self._setting)
        self._setting = None
        self._num_refusals += 1
        if event.retry_after_s is None or self._num_refusals >= REFUSALS_MAX:
            return [self._abandon("refused", event.detail)]
        self._is_due = True
        self._wait(event.retry_after_s, now_s)
        return [Notice("info", "weights_postponed", {"detail": event.detail, "wait_s": event.retry_after_s})]

    def on_given_up(self, event: OrchestratorFailed | ChainFailed) -> list[Notice]:
        """One of this duty's errands has failed too often."""
        if not self.is_open:
            return []
        self._setting = None
        return [self._abandon("unreachable", event.detail)]

    def _decide(self, ledger: Ledger, view: ChainView, now_s: float, *, is_checking: bool) -> list[Notice]:
        if not view.has_permit:
            self._num_looks += 1
            if self._num_looks >= PERMIT_LOOKS or view.next_epoch_s is None:
                return [self._abandon("no permit", "this hotkey may not set weights on the subnet")]
            self._wait(view.next_epoch_s + view.block_s, now_s)
            return []
        if view.last_update_block is not None:
            blocks_left = view.last_update_block + view.weights_rate_limit_blocks - view.block
            if blocks_left > 0:
                self._wait(blocks_left * view.block_s, now_s)
                return []
        if is_checking and self._has_waited and (hold_s := _time_to_hold(view)) > 0:
            self._wait(0.0, now_s)
            self._hold_until_s = now_s + hold_s
            return [Notice("info", "weights_held", {"wait_s_max": hold_s, "detail": "checks are under way"})]
        sheet = make_sheet(ledger, self._spec, view.uids, view.owner_uid, view.weight_max)
        weights = weights_of(sheet)
        if not weights:
            return [self._abandon("empty", "nobody with a slot has earned anything yet")]
        self._is_due = False
        self._setting = SetWeights(weights)
        self._errands.add(SendScores(sheet))
        self._errands.add(self._setting)
        return []

    def _wait(self, wait_s: float, now_s: float) -> None:
        self._not_before_s = now_s + wait_s
        self._has_waited = True
        self._ledger = None
        self._view = None

    def _abandon(self, reason: str, detail: str) -> Notice:
        self._is_due = False
        return Notice("warning", "weights_not_set", {"reason": reason, "detail": detail})


def _time_to_hold(view: ChainView) -> float:
    """Seconds for which weights can wait and still be there at the next epoch; without epochs any."""
    return math.inf if view.next_epoch_s is None else view.next_epoch_s - BLOCKS_TO_SET * view.block_s
