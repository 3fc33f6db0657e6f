"""What each neighbour sent: how loud, how like itself, how often the same, how often unfit. Averages only. Pure.

Every receiver keeps these figures of its neighbours' tensors and tells them in heartbeats, for validators to compare
the senders of a stage with each other. They earn nothing and refuse nothing. Directions are compared by a sketch:
signed sums over a part of the values, with signs and places that only this process knows, so that they cost little time
and memory and no sender can aim at them.

Invariants: bounded by `BOUNDARY_PEERS_MAX` neighbours, each with a few sketches; what is kept and compared is finite.
"""

import math
from collections import OrderedDict, deque
from dataclasses import dataclass, field
from statistics import median_low

import torch
from torch import Tensor

from orion.common.ids import Direction, Hotkey, Phase
from orion.common.protocol.fields import BOUNDARY_PEERS_MAX
from orion.common.protocol.messages import BoundaryReport, PeerStatistics, RefusalCode, Transfer

AVERAGE_TENSORS = 64
"""Tensors after which an old one weighs a third; fewer are averaged evenly."""
LEVEL_TENSORS = 16
"""Newest tensors of a direction, whoever sent them, whose middle is the level of the moment."""
LEVEL_TENSORS_MIN = 4
"""Of these, before there is a level."""
REPORT_TENSORS = 64
"""New tensors after which a report is due while training goes on; after training any new one makes it due."""
REPEATS_REMEMBERED = 32
"""Tensors of a neighbour among which a new one may be a repeat."""
SKETCH_VALUES = 1024
"""Sums in a sketch: cosines are off by about 1 ÷ √1024."""
SKETCH_ROWS_MAX = 64
"""Values that enter a sum at most; of larger tensors, rows at even distances are looked at and no others: 65,536 values
say how loud a tensor is to half a per cent, and two megabytes cost a tenth of a millisecond instead of a whole one."""
UNFIT = frozenset({RefusalCode.NOT_FINITE, RefusalCode.BAD_TENSOR, RefusalCode.DIGEST_MISMATCH})
"""Refusals of a body that are its sender's doing."""
_RMS_MIN, _RMS_MAX = 1e-30, 1e30
_DECIMALS = 4


@dataclass(frozen=True, slots=True, eq=False)
class TensorSummary:
    """All that is kept of one tensor."""

    log_rms: float
    direction: Tensor
    """The sketch at length 1 (zeros for a tensor of zeros): float32, `SKETCH_VALUES` long."""
    fingerprint: int
    """The same for the same bytes."""


@dataclass(slots=True)
class _Averages:
    num_tensors: int = 0
    num_refused: int = 0
    log_rms: float = 0.0
    log_rms_excess: float = 0.0
    cosine_mean: float = 0.0
    cosine_previous: float = 0.0
    repeated_share: float = 0.0
    mean: Tensor | None = None
    previous: Tensor | None = None
    newest: deque[int] = field(default_factory=lambda: deque(maxlen=REPEATS_REMEMBERED))


def sender_of(transfer: Transfer) -> Hotkey:
    """Who sent an admitted tensor: its path says so, and admission has checked it."""
    return transfer.path[-1] if transfer.direction is Direction.ACTIVATION else transfer.path[transfer.to_stage + 1]


class BoundaryMonitor:
    """The neighbours of one miner."""

    def __init__(self, seed: int) -> None:
        """`seed` is this process's secret."""
        generator = torch.Generator().manual_seed(seed)
        signs = torch.randint(0, 2, (SKETCH_ROWS_MAX, SKETCH_VALUES), generator=generator)
        self._signs_RK = signs.to(torch.float32) * 2.0 - 1.0
        self._first_row_share = float(torch.rand((), generator=generator))
        self._peers: OrderedDict[tuple[Hotkey, Direction], _Averages] = OrderedDict()
        """The longest silent first."""
        self._newest = {direction: deque[float](maxlen=LEVEL_TENSORS) for direction in Direction}
        """How loud the newest tensors of all senders were."""
        self._num_new = 0

    def measure(self, tensor: Tensor) -> TensorSummary:
        """Looks at a finite tensor of any shape and floating type. Changes nothing; any thread may call it."""
        taken_RK = self._taken(tensor.detach().reshape(-1))
        num_values = max(1, min(tensor.numel(), taken_RK.numel()))
        rms = float(torch.linalg.vector_norm(taken_RK)) / math.sqrt(num_values)
        sketch_K = (taken_RK * self._signs_RK[: len(taken_RK)]).sum(dim=0)
        length = float(torch.linalg.vector_norm(sketch_K))
        fits = math.isfinite(length) and length > 0.0
        direction_K = sketch_K / length if fits else torch.zeros(SKETCH_VALUES)
        return TensorSummary(
            log_rms=math.log(min(max(rms, _RMS_MIN), _RMS_MAX)),
            direction=direction_K,
            fingerprint=hash((rms, sketch_K.numpy().tobytes())),
        )

    def took(self, peer: Hotkey, direction: Direction, summary: TensorSummary) -> None:
        """A neighbour's tensor was accepted."""
        averages = self._of(peer, direction)
        averages.num_tensors += 1
        share = max(1.0 / averages.num_tensors, 1.0 / AVERAGE_TENSORS)
        averages.log_rms += share * (summary.log_rms - averages.log_rms)
        averages.log_rms_excess += share * (self._excess(direction, summary.log_rms) - averages.log_rms_excess)
        averages.repeated_share += share * ((summary.fingerprint in averages.newest) - averages.repeated_share)
        averages.newest.append(summary.fingerprint)
        if averages.mean is None or averages.previous is None:
            averages.mean = summary.direction.clone()
        else:
            # The first tensor has nothing to be compared with.
            pair_share = max(1.0 / (averages.num_tensors - 1), 1.0 / AVERAGE_TENSORS)
            cosine_mean = _cosine(summary.direction, averages.mean)
            cosine_previous = _cosine(summary.direction, averages.previous)
            averages.cosine_mean += pair_share * (cosine_mean - averages.cosine_mean)
            averages.cosine_previous += pair_share * (cosine_previous - averages.cosine_previous)
            averages.mean += share * (summary.direction - averages.mean)
        averages.previous = summary.direction

    def refused(self, peer: Hotkey, direction: Direction, code: RefusalCode) -> None:
        """The body that a neighbour had been admitted to send was refused."""
        if code in UNFIT:
            self._of(peer, direction).num_refused += 1

    def due_report(self, outer_step: int, phase: Phase) -> BoundaryReport | None:
        """What to tell now, None while there is too little news. Until `reported` it is due again."""
        if self._num_new == 0 or (phase is Phase.TRAIN and self._num_new < REPORT_TENSORS):
            return None
        return BoundaryReport(
            outer_step=outer_step,
            peers=tuple(
                PeerStatistics(
                    peer=peer,
                    direction=direction,
                    num_tensors=averages.num_tensors,
                    num_refused=averages.num_refused,
                    log_rms=round(averages.log_rms, _DECIMALS),
                    log_rms_excess=round(averages.log_rms_excess, _DECIMALS),
                    cosine_mean=round(averages.cosine_mean, _DECIMALS),
                    cosine_previous=round(averages.cosine_previous, _DECIMALS),
                    repeated_share=round(averages.repeated_share, _DECIMALS),
                )
                for (peer, direction), averages in self._peers.items()
            ),
        )

    def reported(self) -> None:
        """The newest report was heard."""
        self._num_new = 0

    def _excess(self, direction: Direction, log_rms: float) -> float:
        """How far a tensor is above the middle of the newest ones before it, whoever sent them."""
        newest = self._newest[direction]
        excess = log_rms - median_low(newest) if len(newest) >= LEVEL_TENSORS_MIN else 0.0
        newest.append(log_rms)
        return excess

    def _of(self, peer: Hotkey, direction: Direction) -> _Averages:
        self._num_new += 1
        averages = self._peers.setdefault((peer, direction), _Averages())
        self._peers.move_to_end((peer, direction))
        if len(self._peers) > BOUNDARY_PEERS_MAX:
            self._peers.popitem(last=False)
        return averages

    def _taken(self, values_N: Tensor) -> Tensor:
        """The values that are looked at, fp32, in rows of `SKETCH_VALUES`; what fills no whole row is left out."""
        if values_N.numel() < SKETCH_VALUES:
            values_N = torch.nn.functional.pad(values_N, (0, SKETCH_VALUES - values_N.numel()))
        num_rows = values_N.numel() // SKETCH_VALUES
        rows_RK = values_N[: num_rows * SKETCH_VALUES].view(num_rows, SKETCH_VALUES)
        distance = math.ceil(num_rows / SKETCH_ROWS_MAX)
        return rows_RK[int(self._first_row_share * distance) :: distance].to(torch.float32)


def _cosine(first: Tensor, second: Tensor) -> float:
    lengths = float(torch.linalg.vector_norm(first)) * float(torch.linalg.vector_norm(second))
    return min(1.0, max(-1.0, float(first @ second) / lengths)) if lengths > 0.0 else 0.0
