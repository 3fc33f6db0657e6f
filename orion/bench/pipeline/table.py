"""Every system under every setting, several times, in turn; and what comes of it: medians, spreads, the bar.

Each repetition goes over everything before the next begins, so that whatever else the machine does hits all alike, and
ratios are between measurements of one repetition.
"""

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from orion.bench.pipeline.plan import RATIO_BAR, UNSHAPED, Setting, System, Workload
from orion.bench.pipeline.window import Measurement

WHAT_IS_TIMED = (
    "tokens applied from the end of inner step {first} to the end of inner step {last}, a step having ended when the "
    "last stage has taken it: forward, backward, transfers and optimizer; start, warm-up and Orion's outer step are "
    "outside"
)
LOSS_SYSTEMS = (System.SINGLE, System.TORCH, System.ORION)


class Measures(Protocol):
    """What carries out one measurement (`PipelineBench`)."""

    def measure(self, system: System, setting: Setting) -> Measurement: ...


@dataclass(frozen=True, slots=True)
class Row:
    """What one setting gave, a measurement for each repetition; empty where a system was not measured."""

    setting: Setting
    measured: dict[System, tuple[Measurement, ...]]
    ratios: tuple[float, ...]
    """Orion ÷ co-located torch of the same repetition."""

    @property
    def ratio(self) -> float:
        """Their median."""
        return statistics.median(self.ratios)

    @property
    def holds(self) -> bool:
        """Whether Orion reaches the bar."""
        return self.ratio >= RATIO_BAR

    def tokens_per_s(self, system: System) -> float | None:
        """The median; None: not measured."""
        rates = [one.tokens_per_s for one in self.measured[system]]
        return statistics.median(rates) if rates else None

    def cpu_s(self, system: System) -> float | None:
        """Processor time for 1,000 tokens, the median; None: not measured."""
        times_s = [one.cpu_s for one in self.measured[system]]
        return statistics.median(times_s) if times_s else None

    def loss(self, system: System) -> float | None:
        """The median; None: not measured."""
        losses = [one.loss for one in self.measured[system]]
        return statistics.median(losses) if losses else None

    def as_json(self) -> dict[str, Any]:
        """The row's keys."""
        rates = {system: [one.tokens_per_s for one in self.measured[system]] for system in System}
        return {
            "name": self.setting.name,
            "upload_mbit": self.setting.upload_mbit,
            "rtt_ms": self.setting.rtt_ms,
            "tokens_per_s": {system.value: self.tokens_per_s(system) for system in System},
            "tokens_per_s_spread": {system.value: _spread(rates[system]) for system in System},
            "cpu_s_per_1000_tokens": {system.value: self.cpu_s(system) for system in System},
            "ratio_to_colocated": self.ratio,
            "ratio_spread": _spread(self.ratios),
            "loss": {system.value: self.loss(system) for system in LOSS_SYSTEMS},
        }


@dataclass(frozen=True, slots=True)
class Table:
    """All settings."""

    workload: Workload
    repetitions: int
    rows: tuple[Row, ...]

    def misses(self) -> list[str]:
        """The settings in which Orion misses the bar, with how it did."""
        return [f"{row.setting.name}: {row.ratio:.3f}" for row in self.rows if not row.holds]

    def as_json(self) -> dict[str, Any]:
        """The table as one JSON object."""
        window, spec = self.workload.window, self.workload.spec
        return {
            "settings": [row.as_json() for row in self.rows],
            "repetitions": self.repetitions,
            "bar": RATIO_BAR,
            "holds": not self.misses(),
            "timed": WHAT_IS_TIMED.format(first=window.num_warm_up, last=window.num_steps),
            "num_stages": spec.num_stages,
            "params": sum(spec.stage_sizes),
            "tokens_per_microbatch": spec.tokens_per_microbatch,
            "microbatches_per_step": spec.microbatches_per_step,
            "boundary_ratio": spec.model.boundary.ratio,
        }


def measure_all(
    bench: Measures,
    workload: Workload,
    settings: Sequence[Setting],
    repetitions: int,
    on_measured: Callable[[Setting, System, Measurement], None],
) -> Table:
    """Measures; the unshaped setting always, because everything is compared with it."""
    wanted = [UNSHAPED, *(setting for setting in settings if setting != UNSHAPED)]
    measured: dict[tuple[Setting, System], list[Measurement]] = {}
    for _ in range(repetitions):
        for setting in wanted:
            for system in setting.systems:
                one = bench.measure(system, setting)
                measured.setdefault((setting, system), []).append(one)
                on_measured(setting, system, one)
    colocated = measured[UNSHAPED, System.TORCH]
    rows = []
    for setting in wanted:
        ours = {system: tuple(measured.get((setting, system), ())) for system in System}
        # One process meets no network: its figures hold for every setting.
        ours[System.SINGLE] = tuple(measured[UNSHAPED, System.SINGLE])
        pairs = zip(ours[System.ORION], colocated, strict=True)
        ratios = tuple(orion.tokens_per_s / torch.tokens_per_s for orion, torch in pairs)
        rows.append(Row(setting, ours, ratios))
    return Table(workload, repetitions, tuple(rows))


def _spread(figures: Sequence[float]) -> list[float] | None:
    """Least and most; None when there are none."""
    return [min(figures), max(figures)] if figures else None
