"""Effects towards orchestrator and chain that are tried again until they succeed or have failed too often. Pure."""

from dataclasses import asdict, dataclass

from orion.validator.events import (
    FetchLedger,
    FetchMerge,
    FetchMetagraph,
    FetchSigns,
    Notice,
    OrchestratorErrand,
    SendScores,
    SendVerdict,
    SetWeights,
)

Errandable = OrchestratorErrand | FetchMetagraph | SetWeights

PAUSE_S = 1.0
"""After the first failure; doubles with each further one."""
PAUSE_S_MAX = 30.0
FAILURES_MAX = 12
"""About five minutes: an orchestrator that was restarted is back by then."""


@dataclass(slots=True)
class Errand:
    """Where the tries of one effect stand."""

    effect: Errandable
    in_flight: bool = False
    num_failures: int = 0
    not_before_s: float = 0.0

    def due(self, now_s: float) -> bool:
        """Whether to try (again) now."""
        return not self.in_flight and now_s >= self.not_before_s

    def failed(self, now_s: float) -> bool:
        """Records a failure; whether that was the last try."""
        self.in_flight = False
        self.not_before_s = now_s + min(PAUSE_S_MAX, PAUSE_S * 2**self.num_failures)
        self.num_failures += 1
        return self.num_failures >= FAILURES_MAX


class Errands:
    """The errands that are under way, at most one for equal effects."""

    def __init__(self) -> None:
        self._errands: list[Errand] = []

    def __len__(self) -> int:
        return len(self._errands)

    def __contains__(self, effect: Errandable) -> bool:
        return any(errand.effect == effect for errand in self._errands)

    def add(self, effect: Errandable) -> None:
        """Takes on an effect, unless it is under way already."""
        if effect not in self:
            self._errands.append(Errand(effect))

    def pump(self, now_s: float) -> list[Errandable]:
        """The effects to carry out now."""
        due = [errand for errand in self._errands if errand.due(now_s)]
        for errand in due:
            errand.in_flight = True
        return [errand.effect for errand in due]

    def succeeded(self, effect: Errandable) -> None:
        """Ends an errand, if it is under way."""
        self._errands = [errand for errand in self._errands if errand.effect != effect]

    def ledger_arrived(self) -> None:
        """Ends every errand for the ledger: whichever was answered, its window holds what the others need."""
        self._errands = [errand for errand in self._errands if not isinstance(errand.effect, FetchLedger)]

    @property
    def has_ledger(self) -> bool:
        """Whether the ledger is being asked for."""
        return any(isinstance(errand.effect, FetchLedger) for errand in self._errands)

    @property
    def has_verdicts(self) -> bool:
        """Whether a verdict is on its way."""
        return any(isinstance(errand.effect, SendVerdict) for errand in self._errands)

    def failed(self, effect: Errandable, retry: bool, now_s: float) -> bool:
        """Records a failure; whether the errand is given up by it."""
        for errand in self._errands:
            if errand.effect == effect and errand.in_flight:
                given_up = errand.failed(now_s) or not retry
                if given_up:
                    self._errands.remove(errand)
                return given_up
        return False


def notice_of_missing(effect: Errandable, detail: str) -> Notice | None:
    """What to say of an errand that was given up and without which everything else goes on; None for any other."""
    match effect:
        case FetchSigns():
            return Notice("warning", "signs_not_known", {"detail": detail})
        case FetchMerge():
            return Notice("warning", "merge_not_known", {**asdict(effect), "detail": detail})
        case SendVerdict():
            return Notice("warning", "verdict_not_sent", {"miner": effect.verdict.miner, "detail": detail})
        case SendScores():
            return Notice("warning", "scores_not_sent", {"detail": detail})
        case _:
            return None
