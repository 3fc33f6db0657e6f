"""Which connections members wait for the feed on, and what it means when one of them breaks off. Pure; time comes in.

A member asks for the feed again as soon as it has an answer, so it nearly always waits on one connection; when it does
not, the connection of its newest question still stands, and is closed with its process. Owns what was seen of
connections and turns it into the core's events; decides nothing about members. Invariants: one loss is told for each
connection at most, and a return only after a loss; a question that is read after its connection was closed tells
nothing, as its sender may have died with it.
"""

from collections import OrderedDict
from collections.abc import Hashable
from dataclasses import dataclass, field

from orion.common.ids import Hotkey
from orion.common.protocol.fields import MINERS_MAX
from orion.orchestrator.events import ConnectionLost, ConnectionSeen

_FADES = 0.9
"""Of the longest time between an answer and the next question, with each question: what happened once is forgotten."""
_USUAL_S_MAX = 60.0


@dataclass(slots=True)
class _Asker:
    newest: Hashable
    waiting: set[Hashable] = field(default_factory=set)
    answered_s: float | None = None
    """When its newest question that waited was answered; None: it has asked since."""
    usual_s: float = 0.0
    """Longest time from an answer to the next question, lately."""
    is_lost: bool = False


class FeedConnections:
    """Of one server process."""

    def __init__(self) -> None:
        self._open: set[Hashable] = set()
        self._askers: OrderedDict[Hotkey, _Asker] = OrderedDict()
        self._hotkey_of: dict[Hashable, Hotkey] = {}
        """Of connections that carry a question now, or carried their asker's newest."""

    def opened(self, connection: Hashable) -> None:
        """Somebody has connected; ends as `broke_off`."""
        self._open.add(connection)

    def asked(self, hotkey: Hotkey, connection: Hashable, now_s: float) -> ConnectionSeen | None:
        """A signed question for the feed has come; what is news about its sender."""
        if connection not in self._open:
            return None
        asker = self._askers.get(hotkey)
        if asker is None:
            asker = self._askers[hotkey] = _Asker(connection)
            while len(self._askers) > MINERS_MAX:
                self._forget(next(iter(self._askers)))
        self._askers.move_to_end(hotkey)
        if asker.answered_s is not None:
            took_s = min(_USUAL_S_MAX, max(0.0, now_s - asker.answered_s))
            asker.usual_s = max(took_s, _FADES * asker.usual_s)
            asker.answered_s = None
        if asker.newest not in asker.waiting:
            self._hotkey_of.pop(asker.newest, None)
        asker.newest = connection
        asker.waiting.add(connection)
        self._hotkey_of[connection] = hotkey
        was_lost, asker.is_lost = asker.is_lost, False
        return ConnectionSeen(hotkey=hotkey) if was_lost else None

    def answered(self, hotkey: Hotkey, connection: Hashable, now_s: float) -> None:
        """The question on this connection is being answered."""
        asker = self._askers.get(hotkey)
        if asker is None or connection not in asker.waiting:
            return  # it broke off meanwhile
        asker.waiting.discard(connection)
        if connection == asker.newest:
            asker.answered_s = now_s
        else:
            self._hotkey_of.pop(connection, None)

    def broke_off(self, connection: Hashable) -> ConnectionLost | None:
        """A connection was closed; whom it was the last one of, if anybody."""
        self._open.discard(connection)
        hotkey = self._hotkey_of.pop(connection, None)
        if hotkey is None:
            return None
        asker = self._askers[hotkey]
        asker.waiting.discard(connection)
        if asker.waiting or asker.is_lost:
            return None
        asker.is_lost, asker.answered_s = True, None
        return ConnectionLost(hotkey=hotkey, usual_s=asker.usual_s)

    def _forget(self, hotkey: Hotkey) -> None:
        asker = self._askers.pop(hotkey)
        for connection in (asker.newest, *asker.waiting):
            self._hotkey_of.pop(connection, None)
