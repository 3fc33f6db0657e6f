"""Draws a running swarm in the terminal: a live picture where there is one, plain lines elsewhere. Decides nothing."""

from collections.abc import Mapping

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from orion.cli.progress import Progress
from orion.common.ids import Hotkey, MemberState, Phase
from orion.common.protocol.records import (
    MinerStatus,
    Repairs,
    RunStatus,
)

PHASE_STYLE = {Phase.TRAIN: "green", Phase.UPLOAD: "yellow", Phase.MERGE: "cyan", Phase.DONE: "dim"}
STATE_STYLE = {
    MemberState.ACTIVE: "green",
    MemberState.READY: "cyan",
    MemberState.JOINING: "yellow",
    MemberState.GONE: "red",
}
PLAIN_LINE_EVERY_S = 10.0
NOTICES_SHOWN = 4


class SwarmView:
    """Context manager; `show` after every new status."""

    def __init__(self, console: Console, names: Mapping[Hotkey, str]) -> None:
        self._console = console
        self._names = names
        self._live = Live(console=console, refresh_per_second=4) if console.is_terminal else None
        self._last_line_s = 0.0
        self._last_place: tuple[int, tuple[Phase, ...]] | None = None
        self._notices_seen: set[str] = set()

    def __enter__(self) -> "SwarmView":
        if self._live is not None:
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._live is not None:
            self._live.stop()

    def say(self, line: str) -> None:
        """One line that stays, above the live picture."""
        self._console.print(line, highlight=False, markup=False, soft_wrap=True)

    def show(self, status: RunStatus, progress: Progress) -> None:
        if self._live is not None:
            self._live.update(picture(status, progress, self._names))
            return
        for notice in status.notices:
            if notice not in self._notices_seen:
                self._notices_seen.add(notice)
                self.say(f"  ! {with_names(notice, self._names)}")
        place = (status.outer_step, tuple(stage.phase for stage in status.stages))
        if place != self._last_place or status.now_s - self._last_line_s >= PLAIN_LINE_EVERY_S:
            self._last_place, self._last_line_s = place, status.now_s
            self.say(plain_line(status, progress))


def plain_line(status: RunStatus, progress: Progress) -> str:
    """The run in one line."""
    phases = " ".join(stage.phase.value for stage in status.stages)
    active = sum(miner.state is MemberState.ACTIVE for miner in status.miners)
    return (
        f"outer step {status.outer_step}/{status.outer_steps} [{phases}]  loss {_number(progress.loss)}  "
        f"{progress.tokens_per_s:,.0f} tokens/s  microbatches {status.microbatches_applied} applied, "
        f"{progress.in_flight} in flight, {status.microbatches_repaired.total} repaired, "
        f"{status.microbatches_cancelled} cancelled  "
        f"{active} miners active  {progress.fraction:4.0%}{_remaining(progress)}"
    )


def repair_kinds(repairs: Repairs) -> str:
    """What saved the microbatches that a lost miner had; nothing where no miner was lost."""
    if not repairs.total:
        return ""
    return f" ({repairs.rerouted} rerouted, {repairs.spliced} spliced, {repairs.released} leased again)"


def picture(status: RunStatus, progress: Progress, names: Mapping[Hotkey, str]) -> RenderableType:
    """The whole run at a glance."""
    head = Text.assemble(
        (f"outer step {status.outer_step}/{status.outer_steps}", "bold"),
        f"   loss {_number(progress.loss)}   {progress.tokens_per_s:,.0f} tokens/s   "
        f"{status.num_checks} checks, {status.num_verdicts_failed} failed",
    )
    microbatches = Text(
        f"microbatches  {status.microbatches_applied} applied, {progress.in_flight} in flight, "
        f"{status.microbatches_repaired.total} repaired{repair_kinds(status.microbatches_repaired)}, "
        f"{status.microbatches_cancelled} cancelled"
    )
    health = Text(
        f"devices  {_share(progress.busy)} busy, {progress.flops_per_s:.3g} FLOP/s   "
        f"staleness {_number(progress.staleness)}   "
    )
    health.append(*(("replicas equal", "") if status.anchors_equal else ("REPLICAS HAVE DIFFERED", "bold red")))
    if status.checkpoint is not None:
        health.append(f"   checkpoint of outer step {status.checkpoint.outer_step}")
    phases = Text("phases  ")
    for stage in status.stages:
        phases.append(f"{stage.stage_index}:{stage.phase.value} ", style=PHASE_STYLE[stage.phase])
    bar = Table.grid(padding=(0, 1))
    bar.add_row(
        ProgressBar(total=1.0, completed=progress.fraction, width=48), f"{progress.fraction:.0%}{_remaining(progress)}"
    )
    notices = [Text(f"! {with_names(notice, names)}", style="yellow") for notice in status.notices[-NOTICES_SHOWN:]]
    return Panel(
        Group(head, microbatches, health, phases, bar, miner_table(status.miners, names), *notices),
        title=f"Orion · {status.run_id}",
        title_align="left",
    )


def miner_table(miners: tuple[MinerStatus, ...], names: Mapping[Hotkey, str]) -> Table:
    """One row per miner, in order of stage."""
    table = Table(box=None, padding=(0, 1), header_style="dim")
    for column in ("miner", "stage", "state"):
        table.add_column(column)
    for column in ("tokens/s", "busy", "in flight", "applied", "inner step"):
        table.add_column(column, justify="right")
    for miner in sorted(miners, key=lambda miner: (miner.stage_index, names.get(miner.hotkey, miner.hotkey))):
        beat = miner.heartbeat
        figures = (
            ("", "", "", "", "")
            if beat is None
            else (
                f"{beat.tokens_per_s:,.0f}",
                f"{beat.busy_share:.0%}",
                str(beat.in_flight),
                str(beat.applied),
                str(beat.inner_step),
            )
        )
        state = Text(miner.state.value, style=STATE_STYLE[miner.state])
        table.add_row(names.get(miner.hotkey, miner.hotkey[:12]), str(miner.stage_index), state, *figures)
    return table


def with_names(text: str, names: Mapping[Hotkey, str]) -> str:
    """A notice as people read it: hotkeys that have a name are called by it."""
    for hotkey, name in names.items():
        text = text.replace(hotkey, name)
    return text


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def _share(value: float | None) -> str:
    return "-" if value is None else f"{value:.0%}"


def _remaining(progress: Progress) -> str:
    if progress.remaining_s is None:
        return ""
    minutes, seconds = divmod(round(progress.remaining_s), 60)
    return f", {minutes}:{seconds:02d} left"
