"""Whether the miners that hold our microbatches are still there. Pure: time comes in.

Owns what is known of each peer's life: when it was last heard, how long it takes to answer, how long a microbatch takes
there and back, and whether it is given up. Must not know what is done about a peer that is lost (`repair`).

A peer that holds something of ours and is silent is asked whether it lives, every `SILENCE_S`. A process that was
killed refuses the connection, so it is found within that time; one that was stopped, or that packets no longer reach,
does not answer within its own measured time, twice. One whose device hangs answers and brings nothing: it is lost when
nothing came for several times what a microbatch takes there and back. A peer that is lost gets nothing until it answers
again.

Who was itself away blames nobody: a process that stood still for longer than `AWAY_S` measured its own silence, and
every limit that ran out meanwhile starts anew.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass

from orion.common.ids import Hotkey

SILENCE_S = 0.5
"""A peer that holds something of ours is asked when nothing was heard of it for this long."""
MISSES_MAX = 2
"""Questions in a row without an answer after which a peer is lost: one may be a hiccup."""
SUSPECT_PAUSE_S = 2.0
"""Between two questions to a peer that is lost."""
ANSWER_PRIOR_S = 1.5
"""What a peer gets for its first answer."""
ANSWER_MIN_S, ANSWER_MAX_S = 0.75, 5.0
"""Bounds of the time for an answer: a loaded machine pauses, and nobody is waited for without end."""
PATIENCE_MIN_S = 5.0
PATIENCE_TIMES = 4.0
"""A peer that brings nothing for this many times the longest usual way there and back is lost."""
AWAY_S = 1.0
"""A miner that is waiting for others looks at everything at least twice in this time, unless it does not run."""
_MEAN_SHARE, _SPREAD_SHARE, _SPREADS = 0.125, 0.25, 4.0
"""Weights of a new measurement, and how many spreads lie above the mean: those of TCP's retransmission timer."""


@dataclass(slots=True)
class Usual:
    """Mean and spread of a duration; None until it was measured."""

    mean_s: float | None = None
    spread_s: float = 0.0

    def add(self, seconds: float) -> None:
        if self.mean_s is None:
            self.mean_s, self.spread_s = seconds, seconds / 2
            return
        self.spread_s += _SPREAD_SHARE * (abs(seconds - self.mean_s) - self.spread_s)
        self.mean_s += _MEAN_SHARE * (seconds - self.mean_s)

    @property
    def longest_s(self) -> float | None:
        """What it usually stays under."""
        return None if self.mean_s is None else self.mean_s + _SPREADS * self.spread_s


@dataclass(slots=True)
class _Life:
    heard_s: float
    """When it last said anything."""
    brought_s: float
    """When it last brought a gradient, or had nothing to bring."""
    num_missed: int = 0
    """Questions in a row without an answer."""
    is_asked: bool = False
    """A question is on its way."""
    is_excused: bool = False
    """That question was asked before this miner was away: no answer to it says nothing."""
    is_lost: bool = False
    ask_s: float = 0.0
    """Earliest time of the next question."""


class Watch:
    """What is known of peers' lives."""

    def __init__(self) -> None:
        self._lives: dict[Hotkey, _Life] = {}
        self._answer: dict[Hotkey, Usual] = {}
        self._way = Usual()
        """There and back, over all replicas of the next stage: one that never brought anything has no own measure."""
        self._back_s = -math.inf
        """When this miner was last back from standing still."""

    def was_away(self, now_s: float) -> None:
        """This miner stood still, and does so no longer: what it did not hear meanwhile is nobody's silence."""
        self._back_s = now_s
        for life in self._lives.values():
            life.is_excused = life.is_asked
            life.brought_s = now_s
            if not life.is_lost:
                life.num_missed = 0
            life.ask_s = min(life.ask_s, now_s)

    def is_excused(self, began_s: float) -> bool:
        """Whether an attempt that began then, and was not answered, says nothing of the peer."""
        return began_s < self._back_s

    def keep_only(self, peers: Iterable[Hotkey]) -> None:
        """Forgets everybody else."""
        wanted = set(peers)
        self._lives = {peer: life for peer, life in self._lives.items() if peer in wanted or life.is_asked}
        self._answer = {peer: usual for peer, usual in self._answer.items() if peer in wanted}

    def begins(self, peer: Hotkey, now_s: float, num_there: int) -> None:
        """A microbatch goes to the peer, which held `num_there` before."""
        life = self._life(peer, now_s)
        if num_there == 0:
            life.heard_s = max(life.heard_s, now_s)
            life.brought_s = now_s

    def heard(self, peer: Hotkey, now_s: float) -> None:
        """The peer said something: it lives."""
        life = self._life(peer, now_s)
        life.heard_s, life.num_missed, life.is_lost = now_s, 0, False

    def brought(self, peer: Hotkey, seconds: float, now_s: float) -> None:
        """A gradient came back, that long after its activation went."""
        self.heard(peer, now_s)
        self._lives[peer].brought_s = now_s
        self._way.add(seconds)

    def unreached(self, peer: Hotkey, now_s: float) -> None:
        """Something that was sent to the peer did not get there: it is asked at once whether it lives."""
        life = self._life(peer, now_s)
        life.heard_s = min(life.heard_s, now_s - SILENCE_S)
        life.ask_s = min(life.ask_s, now_s)

    def asked(self, peer: Hotkey, now_s: float) -> None:
        """A question is on its way. Ends as `answered` or `missed`."""
        life = self._life(peer, now_s)
        life.is_asked, life.is_excused = True, False

    def answered(self, peer: Hotkey, seconds: float, now_s: float) -> None:
        """The peer answered a question after that long."""
        self._answer.setdefault(peer, Usual()).add(seconds)
        self.heard(peer, now_s)
        self._lives[peer].is_asked = self._lives[peer].is_excused = False

    def missed(self, peer: Hotkey, now_s: float) -> bool:
        """The peer did not answer in time, or was not reached; whether it has just been lost by that."""
        life = self._life(peer, now_s)
        life.is_asked = False
        if life.is_excused:
            life.is_excused, life.ask_s = False, now_s
            return False
        life.num_missed += 1
        is_news = life.num_missed >= MISSES_MAX and not life.is_lost
        life.is_lost = life.num_missed >= MISSES_MAX
        life.ask_s = now_s + SUSPECT_PAUSE_S if life.is_lost else now_s
        return is_news

    def stuck(self, peer: Hotkey, now_s: float) -> None:
        """The peer is given up although it answers."""
        life = self._life(peer, now_s)
        life.is_lost, life.ask_s, life.brought_s = True, now_s + SUSPECT_PAUSE_S, now_s

    def is_lost(self, peer: Hotkey) -> bool:
        """Whether nothing should be sent there now."""
        life = self._lives.get(peer)
        return life is not None and life.is_lost

    def ask_due_s(self, peer: Hotkey, now_s: float) -> float | None:
        """When a peer that holds something of ours is to be asked; None while a question is on its way."""
        life = self._life(peer, now_s)
        if life.is_asked:
            return None
        if life.is_lost or life.num_missed:
            return life.ask_s
        return max(life.heard_s + SILENCE_S, life.ask_s)

    def answer_limit_s(self, peer: Hotkey) -> float:
        """What the peer gets for an answer."""
        longest_s = self._answer.get(peer, Usual()).longest_s
        return ANSWER_PRIOR_S if longest_s is None else min(ANSWER_MAX_S, max(ANSWER_MIN_S, longest_s))

    def stuck_s(self, peer: Hotkey, now_s: float) -> float | None:
        """When a peer that holds something of ours and brings nothing is given up; None while nothing is measured."""
        longest_s = self._way.longest_s
        if longest_s is None:
            return None
        return self._life(peer, now_s).brought_s + max(PATIENCE_MIN_S, PATIENCE_TIMES * longest_s)

    def _life(self, peer: Hotkey, now_s: float) -> _Life:
        return self._lives.setdefault(peer, _Life(heard_s=now_s, brought_s=now_s))
