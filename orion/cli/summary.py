"""The end of a local run, for people."""

from collections.abc import Sequence

from rich.console import Console
from rich.table import Table

from orion.cli.live_view import repair_kinds
from orion.cli.outcome import SwarmOutcome
from orion.common.protocol.records import Repairs


def print_summary(console: Console, outcome: SwarmOutcome, problems: Sequence[str]) -> None:
    """Figures, what each miner earned, files, sample, and the verdict of the run on itself."""
    figures = Table.grid(padding=(0, 3))
    for label, value in _figures(outcome):
        figures.add_row(label, value)
    console.print()
    console.print(figures, highlight=False)
    earnings = Table(box=None, padding=(0, 3), header_style="dim")
    earnings.add_column("miner")
    earnings.add_column("score", justify="right")
    earnings.add_column("chain weight", justify="right")
    earnings.add_column("incentive", justify="right")
    for name in sorted(outcome.scores.keys() | outcome.chain_weights.keys()):
        score, weight = outcome.scores.get(name, 0.0), outcome.chain_weights.get(name, 0.0)
        earnings.add_row(name, f"{score:.3g}", f"{weight:.4f}", f"{outcome.incentives.get(name, 0.0):.4f}")
    console.print(earnings, highlight=False)
    console.print("\nsample  ", _printable(outcome.sample), style="italic", highlight=False, markup=False)
    console.print(f"checkpoint  {outcome.checkpoint}\nloss curve  {outcome.plot}", highlight=False, markup=False)
    for notice in outcome.notices:
        console.print(f"notice: {notice}", style="yellow", highlight=False, markup=False)
    for problem in problems:
        console.print(f"problem: {problem}", style="bold red", highlight=False, markup=False)
    if not problems:
        console.print("the run checked itself: all is well", style="bold green")


def _figures(outcome: SwarmOutcome) -> list[tuple[str, str]]:
    rows = [
        ("tokens", f"{outcome.tokens:,} in {outcome.seconds:.0f} s: {outcome.tokens_per_s:,.0f} tokens/s"),
        ("outer steps", str(outcome.outer_steps)),
        ("loss", f"{_loss(outcome.loss_first)} first, {_loss(outcome.loss_last)} last"),
        ("held-out loss", f"{outcome.heldout_loss:.3f} merged model, {outcome.heldout_loss_untrained:.3f} untrained"),
        ("replica anchors byte-equal", "yes" if outcome.anchors_equal else "NO"),
        (
            "microbatches",
            f"{outcome.microbatches_started} started, {outcome.microbatches_applied} applied, "
            f"{outcome.microbatches_cancelled} cancelled{_repairs(outcome.microbatches_repaired)}",
        ),
        ("validator", f"{outcome.checks} checks, {outcome.verdicts_failed} failed"),
    ]
    if outcome.tokens_per_s_single_process is not None and outcome.heldout_loss_single_process is not None:
        speed = outcome.tokens_per_s / outcome.tokens_per_s_single_process
        gap = outcome.heldout_loss / outcome.heldout_loss_single_process - 1
        rows.append(
            (
                "against one process",
                f"held-out {outcome.heldout_loss_single_process:.3f} (swarm {gap:+.1%}), "
                f"{outcome.tokens_per_s_single_process:,.0f} tokens/s (swarm {speed:.0%})",
            )
        )
    return rows


def _repairs(repairs: Repairs) -> str:
    """Nothing where no miner was lost."""
    if not repairs.total:
        return ""
    return f"; {repairs.total} outlived a lost miner{repair_kinds(repairs)}"


def _printable(text: str) -> str:
    """A hardly trained model writes control characters too; the terminal must not obey them."""
    return "".join(letter if letter.isprintable() or letter == "\n" else "�" for letter in text)


def _loss(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"
