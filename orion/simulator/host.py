"""A simulated process: it is reached at an address, waits in virtual time, and asks others.

It owns what every role's process has in common; the roles' own processes are in `orchestrator_host`, `miner_host` and
`validator_host`. Work of several steps is an ordinary coroutine that awaits `Ask` and `Pause` and nothing else; the
host drives it from the heap, so there is no event loop. Coroutines of production that only await what they were given
can thus be run here unchanged. Invariant: once a process has ended, nothing of it goes on: no timer, no answer, no
coroutine.
"""

from collections.abc import Callable, Coroutine, Generator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from orion.common.protocol.messages import Message
from orion.simulator.clock import Timer, VirtualClock
from orion.simulator.network import Address, Network, OnBroken, Respond

ORCHESTRATOR: Address = "orchestrator"
STORE: Address = "store"
"""Names that no hotkey has."""

MESSAGE_BYTES = 400
"""What a small signed message costs on the wire, headers included."""
RECORD_BYTES = 150
"""What each record within a message adds."""


@dataclass(frozen=True, slots=True)
class Ask:
    """Awaited: sends a request and gives its answer, None when the target was unreachable."""

    target: Address
    request: object
    size_bytes: int = MESSAGE_BYTES
    timeout_s: float | None = None

    def __await__(self) -> Generator["Ask", object | None, object | None]:
        return (yield self)


@dataclass(frozen=True, slots=True)
class AskAll:
    """Awaited: sends several requests at once and gives their answers in the same order."""

    asks: Sequence[Ask]

    def __await__(self) -> Generator["AskAll", object | None, list[object | None]]:
        answers = yield self
        assert isinstance(answers, list)
        return answers


@dataclass(frozen=True, slots=True)
class Pause:
    """Awaited: lets that many virtual seconds pass."""

    seconds: float

    def __await__(self) -> Generator["Pause", object | None, None]:
        yield self


Work = Coroutine[Any, Any, None]
"""One piece of work. What goes wrong in it and is not caught ends the simulation."""


class Host:
    """One process. Subclasses take requests in `serve` and begin their loops in `start`."""

    def __init__(self, address: Address, clock: VirtualClock, network: Network, *, rate_share: float = 1.0) -> None:
        self.address = address
        self.clock = clock
        self.network = network
        self.is_alive = False
        self.is_stopped = False
        self._missed: list[Callable[[], None]] = []
        """What would have happened while it was stopped, in order."""
        self._rate_share = rate_share
        self._work: dict[Work, None] = {}
        self.on_broken: OnBroken | None = None
        """What is done when another process has ended that may have had connections to this one."""

    def start(self) -> None:
        """The process comes up."""
        self.is_alive = True
        self.network.attach(self.address, self._take_request, self._rate_share, self.on_broken)

    def kill(self) -> None:
        """The process ends without a word."""
        self.is_alive = False
        self.network.detach(self.address)
        self._missed.clear()
        for work in tuple(self._work):
            work.close()
        self._work.clear()

    def stop(self) -> None:
        """The process is stopped (SIGSTOP): its connections stay, and nothing of it goes on until `resume`."""
        self.is_stopped = True

    def resume(self) -> None:
        """The process goes on, with all that came meanwhile."""
        self.is_stopped = False
        missed, self._missed = self._missed, []
        for action in missed:
            self.run_or_defer(action)

    def run_or_defer(self, action: Callable[[], None]) -> None:
        """`action` happens now if the process runs, once it is resumed if it is stopped, and never if it has ended."""
        if not self.is_alive:
            return
        if self.is_stopped:
            self._missed.append(action)
        else:
            action()

    def serve(self, source: Address, request: object, respond: Respond) -> None:
        """Takes a request that arrived."""
        raise NotImplementedError

    def after(self, delay_s: float, action: Callable[[], None]) -> Timer:
        """`action` happens after that long, if the process still runs."""
        return self.clock.schedule(delay_s, lambda: self.run_or_defer(action))

    def spawn(self, work: Work) -> None:
        """Begins a piece of work; it goes on by itself until it ends or the process does."""
        self._work[work] = None
        self._resume(work, None)

    def cancel(self, work: Work) -> bool:
        """Ends a piece of work where it waits; whether it had not ended by itself."""
        if work not in self._work:
            return False
        del self._work[work]
        work.close()
        return True

    def _take_request(self, source: Address, request: object, respond: Respond) -> None:
        self.run_or_defer(lambda: self.serve(source, request, respond))

    def _resume(self, work: Work, answer: object | None) -> None:
        if work not in self._work:
            return
        try:
            step = work.send(answer)
        except StopIteration:
            del self._work[work]
            return
        match step:
            case Pause():
                self.after(step.seconds, lambda: self._resume(work, None))
            case Ask():
                self._send(step, lambda heard: self._resume(work, heard))
            case AskAll():
                self._send_all(work, step.asks)
            case _:
                raise AssertionError(f"a simulated process awaits {step!r}, which nobody ends")

    def _send(self, ask: Ask, on_end: Callable[[object | None], None]) -> None:
        limit_s = self.clock.now_s() + (self.network.timeout_s if ask.timeout_s is None else ask.timeout_s)

        def end(answer: object | None) -> None:
            # One that was stopped looks at its clock first: what lay there by then has come too late.
            on_end(answer if self.clock.now_s() < limit_s else None)

        def heard(answer: object | None) -> None:
            self.run_or_defer(lambda: end(answer))

        self.network.request(self.address, ask.target, ask.request, ask.size_bytes, heard, timeout_s=ask.timeout_s)

    def _send_all(self, work: Work, asks: Sequence[Ask]) -> None:
        answers: list[object | None] = [None] * len(asks)
        num_waiting = len(asks)

        def collect(place: int, answer: object | None) -> None:
            nonlocal num_waiting
            answers[place] = answer
            num_waiting -= 1
            if num_waiting == 0:
                self._resume(work, answers)

        if not asks:
            self.after(0.0, lambda: self._resume(work, answers))
        for place, ask in enumerate(asks):
            self._send(ask, partial(collect, place))


def wire_bytes(message: Message) -> int:
    """About what a message costs on the wire; cheaper than building its JSON."""
    num_records = sum(len(value) for value in message.__dict__.values() if isinstance(value, tuple))
    return MESSAGE_BYTES + RECORD_BYTES * num_records
