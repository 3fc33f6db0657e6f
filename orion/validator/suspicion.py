"""How suspicious each miner is, from what others saw of it. Pure; an alarm that draws checks, never a verdict.

Two kinds of signs: CLASP's effects on losses (`clasp`), and what receivers report of the tensors they were sent
(`BoundaryReport`). A receiver compares the senders of one stage with each other, so what all replicas share (a hard
batch, a late phase of training) cancels out; a miner's oddness is then the middle one of its receivers' views, the
lower where there are two. So one lying receiver frames nobody, and a miner that a single receiver saw is not judged by
it. With two replicas nobody can say which is the odd one: both are.

What it does not see: a harm that most replicas of a stage share, receivers that lie together, and tensors that look
right in norm, direction and novelty.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import median

from orion.common.ids import Direction, Hotkey
from orion.common.protocol.messages import PeerStatistics
from orion.common.protocol.records import BoundaryRecord
from orion.validator.clasp import MemberEffect

ODDNESS_MIN = 5.0
"""Robust standard deviations from the other replicas beyond which a miner is odd; honest ones stay below three."""
SUSPICION_MAX = 10.0
"""So that one glaring case does not take every draw from the others."""
TENSORS_MIN = 4
"""Tensors of a sender that a receiver must have seen."""
_FLOOR_TENSORS = 32.0
"""Means of few tensors differ by chance: below about this many, differences weigh less."""
_MAD_TO_SPREAD = 1.4826


@dataclass(frozen=True, slots=True)
class Measure:
    """One figure of a sender's tensors, and the spread that is never remarkable among honest replicas."""

    name: str
    floor: float


MEASURES = (
    Measure("log_rms_excess", 0.02),
    Measure("cosine_mean", 0.02),
    Measure("cosine_previous", 0.02),
    Measure("repeated_share", 0.01),
    Measure("refused_share", 0.01),
)


def suspicions(
    effects: Iterable[MemberEffect], records: Sequence[BoundaryRecord], stages: Mapping[Hotkey, int]
) -> dict[Hotkey, float]:
    """Miners that should be looked at soon, each with a suspicion from 1 to `SUSPICION_MAX`; all others are missing.

    `stages` says where every miner is now: reports of or about others count for nothing.
    """
    found: dict[Hotkey, float] = {}
    for effect in effects:
        if effect.is_alarming:
            found[effect.hotkey] = min(SUSPICION_MAX, 1.0 + effect.lower / effect.standard_error)
    for hotkey, deviation in oddness(records, stages).items():
        if deviation >= ODDNESS_MIN:
            found[hotkey] = max(found.get(hotkey, 0.0), min(SUSPICION_MAX, deviation / ODDNESS_MIN))
    return found


def oddness(records: Sequence[BoundaryRecord], stages: Mapping[Hotkey, int]) -> dict[Hotkey, float]:
    """How far each miner is from the other replicas of its stage, in robust standard deviations.

    The largest over directions and measures of the lower middle over receivers; who was seen by less than two
    receivers is missing.
    """
    seen: dict[tuple[int, Direction], list[list[PeerStatistics]]] = {}
    for record in records:
        if stages.get(record.hotkey) == record.stage_index:
            for direction in Direction:
                group = seen.setdefault((record.stage_index, direction), [])
                group.append(_seen(record, direction, stages))
    found: dict[Hotkey, float] = {}
    for group in seen.values():
        for measure in MEASURES:
            for peer, deviations in _deviations(group, measure).items():
                if len(deviations) >= 2:
                    middle = sorted(deviations)[(len(deviations) - 1) // 2]
                    found[peer] = max(found.get(peer, 0.0), middle)
    return found


def _seen(record: BoundaryRecord, direction: Direction, stages: Mapping[Hotkey, int]) -> list[PeerStatistics]:
    """What the reporter says of the miners that can have sent it tensors of that direction, each once."""
    sender_stage = record.stage_index + (-1 if direction is Direction.ACTIVATION else 1)
    fitting = {
        peer.peer: peer
        for peer in record.report.peers
        if peer.direction is direction and stages.get(peer.peer) == sender_stage and _num_offered(peer) >= TENSORS_MIN
    }
    return list(fitting.values())


def _deviations(reports: Sequence[Sequence[PeerStatistics]], measure: Measure) -> dict[Hotkey, list[float]]:
    """Each sender's distances from the middle of the others, one for every receiver that can compare it.

    The unit is the largest of three spreads: of the receivers' views of one sender, of the other senders, the floor.
    """
    views: dict[Hotkey, list[tuple[float, int]]] = {}
    for report in reports:
        values = {peer.peer: _value(peer, measure.name) for peer in report}
        for peer in report:
            others = [value for hotkey, value in values.items() if hotkey != peer.peer]
            if others:
                view = (values[peer.peer] - median(others), _num_offered(peer))
                views.setdefault(peer.peer, []).append(view)
    middles = {hotkey: median(off for off, _ in own) for hotkey, own in views.items()}
    noise = _spread([off - middles[hotkey] for hotkey, own in views.items() for off, _ in own], 0.0)
    found: dict[Hotkey, list[float]] = {}
    for hotkey, own in views.items():
        other_middles = [middle for other, middle in middles.items() if other != hotkey]
        unit = max(noise, _spread(other_middles, median(other_middles)) if other_middles else 0.0)
        floors = [measure.floor * math.sqrt(1.0 + _FLOOR_TENSORS / num_tensors) for _, num_tensors in own]
        found[hotkey] = [abs(off) / max(unit, floor) for (off, _), floor in zip(own, floors, strict=True)]
    return found


def _spread(values: Sequence[float], middle: float) -> float:
    """Robust standard deviation around a middle; 0 without values."""
    return _MAD_TO_SPREAD * median(abs(value - middle) for value in values) if values else 0.0


def _num_offered(peer: PeerStatistics) -> int:
    return peer.num_tensors + peer.num_refused


def _value(peer: PeerStatistics, name: str) -> float:
    match name:
        case "log_rms_excess":
            return peer.log_rms_excess
        case "cosine_mean":
            return peer.cosine_mean
        case "cosine_previous":
            return peer.cosine_previous
        case "repeated_share":
            return peer.repeated_share
        case "refused_share":
            return peer.num_refused / _num_offered(peer)
    raise AssertionError(f"no measure is called {name}")
