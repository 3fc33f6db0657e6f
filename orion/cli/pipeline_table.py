"""`orion bench pipeline` for people: progress while it measures, and the table."""

import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.table import Table as RichTable

from orion.bench.pipeline.plan import MORE_SETTINGS, RATIO_BAR, SETTINGS, Setting, System
from orion.bench.pipeline.table import Table
from orion.bench.pipeline.window import Measurement
from orion.common.errors import ConfigError


def settings_named(names: str) -> tuple[Setting, ...]:
    """The settings of a list with commas; empty = the usual ones. Raises ConfigError."""
    if not names:
        return SETTINGS
    known = {setting.name: setting for setting in (*SETTINGS, *MORE_SETTINGS)}
    if unknown := [name for name in names.split(",") if name not in known]:
        raise ConfigError(f"no setting {', '.join(unknown)}; there are {', '.join(known)}")
    return tuple(known[name] for name in names.split(","))


@contextmanager
def ending_like_ctrl_c() -> Iterator[None]:
    """Within it SIGTERM is a KeyboardInterrupt, so that a benchmark that is broken off tells what it has measured."""
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def print_measurement(setting: Setting, system: System, one: Measurement) -> None:
    """A line on standard error, so that standard output holds results alone."""
    told = [f"{one.tokens_per_s:,.0f} tokens/s", f"{one.cpu_s:.2f} s of processor for 1,000"]
    told.append(f"processors idle {one.idle_share:.0%}")
    if one.loss is not None:
        told.append(f"loss {one.loss:.3f}")
    if one.staleness is not None:
        told.append(f"staleness {one.staleness:.2f}")
    print(f"{setting.name}: {system} {', '.join(told)}", file=sys.stderr, flush=True)


def print_table(table: Table) -> None:
    """The medians, and what misses the bar."""
    shown = RichTable("setting", *System, "ratio to co-located", "least to most", title="tokens/s")
    for row in table.rows:
        rates = [row.tokens_per_s(system) for system in System]
        cells = ["" if rate is None else f"{rate:,.0f}" for rate in rates]
        ratio = "" if row.ratio is None else f"{row.ratio:.3f}"
        spread = f"{min(row.ratios):.3f} to {max(row.ratios):.3f}" if row.ratios else ""
        shown.add_row(row.setting.name, *cells, ratio, spread)
    console = Console(width=None if sys.stdout.isatty() else 140)
    console.print(shown)
    if not table.is_whole:
        console.print("broken off: this is what was measured until then", highlight=False)
    for miss in table.misses():
        console.print(f"below {RATIO_BAR} of torch's 1F1B, co-located: {miss}", highlight=False)
