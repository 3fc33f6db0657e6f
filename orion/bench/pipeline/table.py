"""Every system under every setting, several times, in turn; and what comes of it: medians, spreads, the bar.

Each repetition goes over everything before the next begins, so that whatever else the machine does hits all alike, and
ratios are between measurements of one repetition. Within it, what the bar is about comes first: a study that is broken
off has told the most important.
"""

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from orion.bench.pipeline.plan import RATIO_BAR, UNSHAPED, Setting, System, Window, Workload
from orion.bench.pipeline.window import Measurement

WHAT_IS_TIMED = (
    "tokens applied from the end of inner step {first} to the end of inner step {last}, a step having ended when the "
    "last stage has taken it: forward, backward, transfers and optimizer; start, warm-up and Orion's outer step are "
    "outside; torch without a boundary is timed over fewer steps where links make it very slow (`torch_steps`)"
)
LOSS_SYSTEMS = (System.SINGLE, System.TORCH, System.ORION)
IN_TURN = (System.ORION, System.TORCH_BOUNDARY, System.TORCH)
"""Behind links, whose measurements come first: what the bar is about, its fair control, the slow reference."""


class Measures(Protocol):
    """What carries out one measurement (`PipelineBench`)."""

    def measure(self, system: System, setting: Setting) -> Measurement: ...


@dataclass(frozen=True, slots=True)
class Row:
    """What one setting gave, a measurement for each repetition; empty where a system was not measured."""

    setting: Setting
    window: Window
    torch_window: Window
    measured: dict[System, tuple[Measurement, ...]]
    ratios: tuple[float, ...]
    """Orion ÷ co-located torch of the same repetition."""

    @property
    def ratio(self) -> float | None:
        """Their median; None: not measured."""
        return statistics.median(self.ratios) if self.ratios else None

    @property
    def holds(self) -> bool:
        """Whether Orion was seen to reach the bar."""
        return self.ratio is not None and self.ratio >= RATIO_BAR

    def tokens_per_s(self, system: System) -> float | None:
        """The median; None: not measured."""
        return _median([one.tokens_per_s for one in self.measured[system]])

    def loss(self, system: System) -> float | None:
        """The median; None: not measured."""
        return _median([one.loss for one in self.measured[system]])

    def as_json(self) -> dict[str, Any]:
        """The row's keys."""
        measured = self.measured
        return {
            "name": self.setting.name,
            "upload_mbit": self.setting.upload_mbit,
            "rtt_ms": self.setting.rtt_ms,
            "tokens_per_s": {system.value: self.tokens_per_s(system) for system in System},
            "tokens_per_s_spread": {
                system.value: _spread([one.tokens_per_s for one in measured[system]]) for system in System
            },
            "cpu_s_per_1000_tokens": {
                system.value: _median([one.cpu_s for one in measured[system]]) for system in System
            },
            "idle_share": {system.value: _median([one.idle_share for one in measured[system]]) for system in System},
            "ratio_to_colocated": self.ratio,
            "ratio_spread": _spread(self.ratios),
            "loss": {system.value: self.loss(system) for system in LOSS_SYSTEMS},
            "loss_torch_1f1b_boundary": self.loss(System.TORCH_BOUNDARY),
            "staleness": _median([one.staleness for one in measured[System.ORION]]),
            "steps": _steps(self.window),
            "torch_steps": _steps(self.torch_window),
        }


@dataclass(frozen=True, slots=True)
class Table:
    """All settings."""

    workload: Workload
    repetitions: int
    is_whole: bool
    """Whether everything was measured."""
    rows: tuple[Row, ...]

    def misses(self) -> list[str]:
        """The settings in which Orion was not seen to reach the bar, with how it did."""
        return [
            f"{row.setting.name}: {'not measured' if row.ratio is None else f'{row.ratio:.3f}'}"
            for row in self.rows
            if not row.holds
        ]

    def as_json(self) -> dict[str, Any]:
        """The table as one JSON object."""
        window, spec = self.workload.window, self.workload.spec
        return {
            "settings": [row.as_json() for row in self.rows],
            "repetitions": self.repetitions,
            "is_whole": self.is_whole,
            "bar": RATIO_BAR,
            "holds": self.is_whole and not self.misses(),
            "timed": WHAT_IS_TIMED.format(first=window.num_warm_up, last=window.num_steps),
            "num_stages": spec.num_stages,
            "params": sum(spec.stage_sizes),
            "tokens_per_microbatch": spec.tokens_per_microbatch,
            "microbatches_per_step": spec.microbatches_per_step,
            "boundary_ratio": spec.model.boundary.ratio,
            "in_flight_max": spec.flow.in_flight_max,
            "staleness_max": spec.flow.staleness_max,
        }


class Study:
    """Takes the measurements; may be asked for the table whenever one has ended."""

    def __init__(self, workload: Workload, settings: Sequence[Setting], repetitions: int) -> None:
        """The unshaped setting is always measured, because everything is compared with it."""
        self._workload = workload
        self._settings = (UNSHAPED, *(setting for setting in settings if setting != UNSHAPED))
        self._repetitions = repetitions
        self._measured: dict[tuple[Setting, System], list[Measurement]] = {}

    def run(self, bench: Measures, on_measured: Callable[[Setting, System, Measurement], None]) -> None:
        """Measures everything."""
        for _ in range(self._repetitions):
            for setting, system in turns(self._settings):
                one = bench.measure(system, setting)
                self._measured.setdefault((setting, system), []).append(one)
                on_measured(setting, system, one)

    def table(self) -> Table:
        """What was measured so far."""
        rows = tuple(self._row(setting) for setting in self._settings)
        num_measured = sum(len(ones) for ones in self._measured.values())
        is_whole = num_measured == self._repetitions * len(turns(self._settings))
        return Table(self._workload, self._repetitions, is_whole, rows)

    def _row(self, setting: Setting) -> Row:
        ours = {system: tuple(self._measured.get((setting, system), ())) for system in System}
        # One process meets no network: its figures hold for every setting.
        ours[System.SINGLE] = tuple(self._measured.get((UNSHAPED, System.SINGLE), ()))
        # Of a repetition that was broken off, what lacks its counterpart is in no ratio.
        pairs = zip(ours[System.ORION], self._measured.get((UNSHAPED, System.TORCH), ()), strict=False)
        ratios = tuple(orion.tokens_per_s / torch.tokens_per_s for orion, torch in pairs)
        window_of = self._workload.window_of
        return Row(setting, window_of(System.ORION, setting), window_of(System.TORCH, setting), ours, ratios)


def turns(settings: Sequence[Setting]) -> list[tuple[Setting, System]]:
    """One repetition, in order: everything unshaped, then system by system behind every link."""
    behind_links = [setting for setting in settings if setting.profile is not None]
    return [
        *((setting, system) for setting in settings if setting.profile is None for system in setting.systems),
        *((setting, system) for system in IN_TURN for setting in behind_links if system in setting.systems),
    ]


def _steps(window: Window) -> dict[str, int]:
    return {"warm_up": window.num_warm_up, "timed": window.num_measured}


def _median(figures: Sequence[float | None]) -> float | None:
    """Of those that there are; None when there are none."""
    known = [figure for figure in figures if figure is not None]
    return statistics.median(known) if known else None


def _spread(figures: Sequence[float]) -> list[float] | None:
    """Least and most; None when there are none."""
    return [min(figures), max(figures)] if figures else None
